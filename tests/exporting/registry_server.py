"""A registry on 127.0.0.1 for tests: the upload half of opencontainers/distribution-spec, with logins, and with the faults that a test asks for."""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

USER, PASSWORD = "ada", "correct horse"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass
class State:
    """What the registry holds, what it was asked, and how it behaves."""

    auth: str | None = None  # "basic" | "bearer"
    may_push: bool = True  # bearer: whether the token that it hands out is good for pushing
    token_lasts: int = 10**9  # requests that a token is good for
    break_patches: tuple[
        int, ...
    ] = ()  # of the PATCHes, counted from 0, those whose connection is cut half-way through the body
    lose: str = "chunk"  # what a cut costs: "chunk" (all of it), "half" (the half that had not come), "session" (404 from then on)
    lost_answers: int = 0  # last PUTs that are carried out and whose answer is never sent
    refuse: dict = field(default_factory=dict)  # {method: [statuses]} to answer with first
    elsewhere: str | None = None  # where PATCHes are redirected to
    blobs: dict = field(default_factory=dict)
    manifests: dict = field(default_factory=dict)
    sessions: dict = field(default_factory=dict)  # {URL's key: bytes}; the key is another after each chunk
    asked: list = field(default_factory=list)  # (method, path, Authorization)
    received: int = 0  # bytes of PATCH bodies that came in whole
    patches: int = 0
    keys: int = 0
    tokens: int = 0
    token_uses: int = 0
    port: int = 0

    def key(self) -> str:
        self.keys += 1
        return f"s{self.keys}"


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        state, (path, query) = (
            self.server.state,
            (urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)),
        )
        state.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if path == "/token":
            return self.token(query)
        if not self.allowed():
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return None
        if state.refuse.get(self.command):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return self.answer(
                state.refuse[self.command].pop(0),
                body=json.dumps({"errors": [{"code": "BUSY", "message": "come\nback later"}]}),
            )
        if m := re.fullmatch(r"/v2/me/model/blobs/(sha256:\w+)", path):
            return self.answer(200 if m[1] in state.blobs else 404)
        if path == "/v2/me/model/blobs/uploads/":
            key = state.key()
            state.sessions[key] = b""
            return self.answer(202, Location=f"/v2/me/model/blobs/uploads/{key}?_state=x")
        if m := re.fullmatch(r"/v2/me/model/blobs/uploads/(\w+)", path):
            return self.session(m[1], query)
        if m := re.fullmatch(r"/v2/me/model/manifests/([\w.]+)", path):
            state.manifests[m[1]] = (
                self.rfile.read(int(self.headers["Content-Length"])),
                self.headers["Content-Type"],
            )
            return self.answer(201)
        return self.answer(
            404, body=json.dumps({"errors": [{"code": "NAME_UNKNOWN", "message": "no such repository"}]})
        )

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_any

    def session(self, key, query):
        state = self.server.state
        if self.command == "PATCH" and state.elsewhere:
            self.rfile.read(int(self.headers["Content-Length"]))
            return self.answer(307, Location=state.elsewhere)
        if key not in state.sessions:  # an older URL of a session counts as none
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return self.answer(
                404,
                body=json.dumps({"errors": [{"code": "BLOB_UPLOAD_UNKNOWN", "message": "unknown upload"}]}),
            )
        held = state.sessions[key]
        if self.command == "GET":
            return self.answer(
                204, Range=f"0-{max(len(held) - 1, 0)}", Location=f"/v2/me/model/blobs/uploads/{key}?_state=y"
            )
        if self.command == "PATCH":
            return self.patch(key, held)
        digest = query["digest"][0]
        del state.sessions[key]
        if digest != "sha256:" + hashlib.sha256(held).hexdigest():
            return self.answer(
                400, body=json.dumps({"errors": [{"code": "DIGEST_INVALID", "message": "other bytes"}]})
            )
        state.blobs[digest] = held
        if state.lost_answers:
            state.lost_answers -= 1
            return self.cut()
        return self.answer(201)

    def patch(self, key, held):
        state, length = self.server.state, int(self.headers["Content-Length"])
        number, state.patches = state.patches, state.patches + 1
        if number in state.break_patches:
            half = self.rfile.read(length // 2)
            if state.lose == "session":
                del state.sessions[key]
            elif state.lose == "half":
                state.sessions[key] = held + half
            return self.cut()
        chunk = self.rfile.read(length)
        if self.headers["Content-Range"] != f"{len(held)}-{len(held) + length - 1}":
            return self.answer(416)
        del state.sessions[key]
        key = state.key()
        state.sessions[key] = held + chunk
        state.received += length
        query = "?_state=z" if len(held) else ""  # some have one, some have none
        return self.answer(
            202,
            Location=f"http://127.0.0.1:{state.port}/v2/me/model/blobs/uploads/{key}{query}",
            Range=f"0-{len(held) + length - 1}",
        )

    def allowed(self):
        """Answers 401 with a challenge, and returns False, where the login is not good."""
        state, shown = self.server.state, self.headers.get("Authorization")
        if state.auth is None or (state.auth == "basic" and shown == BASIC):
            return True
        if (
            state.auth == "bearer"
            and shown == f"Bearer t{state.tokens}"
            and state.may_push
            and state.token_uses < state.token_lasts
        ):
            state.token_uses += 1
            return True
        realm = f"http://127.0.0.1:{state.port}/token"
        challenge = (
            'Basic realm="the registry"'
            if state.auth == "basic"
            else f'Bearer realm="{realm}",service="registry, of tests",scope="x:y:pull"'
        )
        self.answer(
            401,
            body=json.dumps({"errors": [{"code": "DENIED", "message": "insufficient scope"}]}),
            **{"WWW-Authenticate": challenge},
        )
        return False

    def token(self, query):
        state = self.server.state
        if self.headers.get("Authorization") != BASIC:
            return self.answer(401)
        assert query == {"service": ["registry, of tests"], "scope": ["repository:me/model:pull,push"]}
        state.tokens += 1
        state.token_uses = 0
        return self.answer(200, body=json.dumps({"token": f"t{state.tokens}"}))

    def answer(self, status, body="", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


@contextmanager
def registry(**behaviour):
    """A running registry's State; its repository is me/model on 127.0.0.1:<state.port>."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.daemon_threads, server.state = True, State(**behaviour)
    server.state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
