"""A registry in this process: it implements pushes of the distribution spec, with faults on demand."""

import base64
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, PASSWORD = "ada", "s3cret-of-ada"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass
class State:
    port: int = 0
    auth: str = ""  # "basic", "bearer", or none
    broken: set[int] = field(default_factory=set)  # numbers of the PATCHes whose connection breaks
    lost: set[int] = field(default_factory=set)  # numbers of the PATCHes that are answered with 404
    busy: int = 0  # requests that are answered with 503 first
    forbidden: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    sent: bytes = b""
    patches: int = 0
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Authorization


@contextmanager
def registry(**faults):
    """Yields the State of a registry that serves on a free port of this machine."""
    state = State(**faults)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", **headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = self.headers.get("Authorization", "")
            state.asked.append((self.command, self.path, given))
            if self.path.startswith("/token"):
                scope = "push" if "push" in self.path else "pull"
                return (
                    self.answer(200, json.dumps({"token": scope}).encode())
                    if given == BASIC
                    else self.answer(401)
                )
            scope = "pull" if self.command in ("GET", "HEAD") else "pull,push"
            wanted = {"basic": [BASIC], "bearer": ["Bearer push"] + ["Bearer pull"] * (scope == "pull")}.get(
                state.auth
            )
            if wanted and given not in wanted:
                realm = f'Bearer realm="http://127.0.0.1:{state.port}/token",service="r",'
                realm += f'scope="repository:m:{scope}"'
                return self.answer(
                    401, WWW_Authenticate='Basic realm="r"' if state.auth == "basic" else realm
                )
            if state.busy and self.path != "/v2/":
                state.busy -= 1
                return self.answer(503)
            if state.forbidden and self.command == "POST":
                return self.answer(403, b'{"errors": [{"message": "not yours"}]}')
            return self.upload(body)

        def upload(self, body: bytes):
            digest = self.path.rpartition("/" if self.command == "HEAD" else "digest=")[2].replace("%3A", ":")
            if self.path == "/v2/" or (self.command == "HEAD" and digest in state.blobs):
                return self.answer(200)
            if self.command == "HEAD" or (self.command == "POST" and "/you/" in self.path):
                return self.answer(404)
            if self.command == "POST":
                state.sent = b""
                return self.answer(202, Location="/v2/upload?part=0")
            if self.command == "PATCH":
                state.patches += 1
                if state.patches in state.broken:
                    self.close_connection = True
                    return self.connection.close()
                if state.patches in state.lost:
                    return self.answer(404)
                state.sent += body
                return self.answer(202, Location=f"/v2/upload?part={len(state.sent)}")
            if "/manifests/" in self.path:
                state.manifests[self.path.rpartition("/")[2]] = body, self.headers["Content-Type"]
            else:
                state.blobs[digest] = state.sent
            return self.answer(201)

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
