"""exporting/hub.py against a hub in this process: the repository, every file, and refusals in one line."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from exporting.hub import check_repo
from tests.folders import ROOT, make_adapter, make_model


class Hub(BaseHTTPRequestHandler):
    """Responds to create_repo and upload_folder; a commit holds the content of its files."""

    def do_POST(self):
        body = self.read()
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body)["name"])
            return self.answer(200, {"url": f"{self.server.url}/me/model"})
        if self.path.startswith("/api/models/me/model/preupload/"):
            return self.answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                },
            )
        if self.path == "/api/validate-yaml":  # the card's front matter
            return self.answer(200, {"errors": [], "warnings": []})
        assert self.path.startswith("/api/models/me/model/commit/"), self.path
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer(
            200,
            {
                "success": True,
                "commitUrl": f"{self.server.url}/me/model/commit/1",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            },
        )

    def read(self):
        """Returns the body; a commit sends it in chunks, without a length."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self):
        self.answer(
            200,
            {"id": "me/model", "sha": "0" * 40, "siblings": [], "private": False}
            if self.path.startswith("/api/models")
            else {},
        )

    def answer(self, status, body):
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.created, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def upload(tmp_path, hub, token):
    base = make_model(tmp_path / "base")
    words = [
        "--model",
        base,
        "--adapter",
        make_adapter(tmp_path / "adapter", base),
        "--to",
        "hub",
        "--out",
        "me/model",
    ]
    online = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "export.py", *words],
        cwd=ROOT,
        env=os.environ | online,
        capture_output=True,
        text=True,
    )


def test_every_file_of_the_merged_model_arrives(tmp_path, hub):
    done = upload(tmp_path, hub, "good")
    assert done.returncode == 0, done.stderr
    assert hub.created == ["model"] and f"{hub.url}/me/model" in done.stdout
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    } <= hub.files.keys()
    assert (
        json.loads(hub.files["config.json"])["num_hidden_layers"] == 7
        and b"# me/model" in hub.files["README.md"]
    )


def test_a_bad_token_is_one_line_with_the_remedy(tmp_path, hub):
    done = upload(tmp_path, hub, "bad")
    assert (
        done.returncode == 2
        and "hf auth login" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and hub.files == {}
    )


def test_what_is_no_hub_id_is_refused_first():
    with pytest.raises(
        ValueError,
        match="^--out ./folder: not a hub id to upload to; give user/name, a hub id such as google/[^ ]+$",
    ):
        check_repo("./folder")
