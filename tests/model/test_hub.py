"""model/hub.py against a fake hub on 127.0.0.1: downloads, the offline cache, revisions, and refusals."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.hub import TINY, resolve
from tests.folders import ROOT

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
REPOSITORY = {
    "config.json": b'{"model_type": "gemma3_text"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"turns",
    "pytorch_model.bin": b"a pickle, which is not downloaded",
    "README.md": b"read me",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
OUT_OF_REACH = "http://127.0.0.1:9"
CALL = """
import sys
from model.hub import resolve
try:
    print(resolve(*sys.argv[1:]))
except ValueError as e:
    print(e)
    sys.exit(2)
"""


class Hub(BaseHTTPRequestHandler):
    """Answers snapshot_download: model info at a revision, the file tree, and each file (HEAD, then GET)."""

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if m := re.fullmatch(r"/api/models/(me/\w+)/(revision|tree)/(\w+)", path):
            self.api(*m.groups())
        elif m := re.fullmatch(r"/(me/\w+)/resolve/(\w+)/([\w.]+)", path):
            self.file(*m.groups())
        else:
            self.answer(404)

    do_HEAD = do_GET

    def api(self, name, kind, revision):
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if name not in ("me/open", "me/gated", "me/scoped", "me/pickled"):
            self.answer(401)  # The real hub answers so, without a login, for a model that does not exist.
        elif commit is None:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            info = {"id": name, "modelId": name, "sha": commit, "siblings": [], "tags": []}
            self.answer(200, body=json.dumps(info).encode())
        else:
            sizes = {p: len(b) for p, b in self.files(name).items()}
            files = [{"type": "file", "path": p, "size": n, "oid": "0" * 40} for p, n in sizes.items()]
            self.answer(200, body=json.dumps(files).encode())

    def files(self, name):
        return {p: b for p, b in REPOSITORY.items() if name != "me/pickled" or p != "model.safetensors"}

    def file(self, name, commit, path):
        if name == "me/gated":
            self.answer(403 if self.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"})
        elif name == "me/scoped":
            enable = "Please enable access to public gated repositories in your fine-grained token settings"
            self.answer(403, {"X-Error-Message": enable})
        else:
            body = self.files(name)[path] + (commit[:1].encode() if path == "model.safetensors" else b"")
            self.answer(200, {"ETag": f'"{path}-{commit[:4]}"', "X-Repo-Commit": commit}, body)

    def answer(self, status, headers=None, body=b"{}"):
        self.send_response(status)
        plain = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for key, value in (plain | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(hub, tmp_path):
    """Calls resolve in a process of its own, because huggingface_hub reads its settings only once.

    The process runs in tmp_path and has its cache in tmp_path/home.
    """
    theirs = ("HF_", "HUGGING", "TRANSFORMERS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(theirs) and "proxy" not in k.lower()}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    clean["HF_HUB_DISABLE_TELEMETRY"] = "1"

    def call(*args, **env):
        command, pipes = [sys.executable, "-c", CALL, *args], {"capture_output": True, "text": True}
        return subprocess.run(command, cwd=tmp_path, env=clean | env, timeout=60, **pipes)

    return call


@pytest.fixture
def downloaded(ask, hub) -> str:
    """The folder of me/open in the cache; the hub's list of requests is empty again."""
    folder = ask("me/open").stdout
    hub.asked.clear()
    return folder


def refusal(done, *parts: str) -> None:
    """Checks that stdout is one line with these parts."""
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("\n") == 1 and all(part in done.stdout for part in parts), done.stdout


# names that need no hub


def test_tiny_is_the_folder_in_this_checkout():
    assert resolve("tiny") == TINY == ROOT / "assets" / "tiny"


def test_an_existing_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name") == Path("org/name"), "a folder comes before a hub id"
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name",
    ["./typo", "../typo", "/no/such/folder", "typo", "a/b/c", "", "org/", "org/na me", "C:\\models\\gemma"],
)
def test_what_is_neither_folder_nor_hub_id_says_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a folder .* nor a hub id .*check the spelling") as caught:
        resolve(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_not_a_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="is a file; a model is the folder that holds config.json"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_folder_of_gguf_files_alone_says_to_name_the_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"never read")
    with pytest.raises(ValueError, match=f"has no config.json; .* name the file: {file}"):
        resolve(str(tmp_path))


def test_neither_torch_nor_huggingface_hub_is_imported_for_a_folder():
    code = "import sys; from model.hub import resolve; resolve('tiny'); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "huggingface_hub"} & set(done.stdout.split())


# downloads


def test_a_hub_id_downloads_config_tokenizer_and_weights_and_nothing_else(ask, hub):
    hub.asked.clear()
    done = ask("me/open")
    folder = Path(done.stdout.strip())
    assert {p.name for p in folder.iterdir()} == WANTED
    assert (folder / "config.json").read_bytes() == REPOSITORY["config.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weightsa"
    assert not any("pytorch_model.bin" in path or "README" in path for _, path in hub.asked)
    assert "4/4" in done.stderr, "huggingface_hub's progress is shown"


@pytest.mark.fault("hub")
def test_a_cached_model_is_found_offline_and_with_the_hub_out_of_reach(ask, hub, downloaded):
    assert ask("me/open", HF_HUB_OFFLINE="1").stdout == downloaded
    assert ask("me/open", HF_ENDPOINT=OUT_OF_REACH).stdout == downloaded
    assert hub.asked == []


def test_a_model_downloaded_before_is_not_downloaded_again(ask, hub, downloaded):
    assert ask("me/open").stdout == downloaded
    assert not any("/resolve/" in path for _, path in hub.asked)


@pytest.mark.parametrize("revision", ["v2", "b" * 40])
def test_a_revision_is_a_branch_a_tag_or_a_commit(ask, revision):
    folder = Path(ask("me/open", revision).stdout.strip())
    assert folder.name == COMMITS["v2"] and (folder / "model.safetensors").read_bytes() == b"weightsb"


def test_a_missing_revision_is_named(ask, hub):
    refusal(ask("me/open", "v3"), "me/open has no revision 'v3'", f"{hub.url}/me/open/tree/main")


def test_weights_are_downloaded_only_when_they_are_asked_for(ask):
    def files(*args) -> set[str]:
        return {p.name for p in Path(ask("me/open", *args).stdout.strip()).iterdir()}

    assert files("main", "") == WANTED - {"model.safetensors"}
    assert files() == WANTED


# refusals


@pytest.mark.fault("hub")
@pytest.mark.parametrize(
    "name, token",
    [("me/gated", None), ("me/gated", "hf_nobody"), ("me/scoped", "hf_nobody")],
    ids=["401 without a token", "403 without the licence", "403 by the token's scope"],
)
def test_a_gated_model_tells_to_accept_the_licence_and_log_in(ask, hub, name, token):
    done, licence = ask(name, **({"HF_TOKEN": token} if token else {})), f"{hub.url}/{name}"
    refusal(done, f"{name} is gated: accept the licence at {licence}", "`hf auth login` or set HF_TOKEN")


@pytest.mark.parametrize("name", ["me/nothing", "runs/typo"])
def test_a_model_that_is_not_there_tells_to_check_the_id(ask, hub, name):
    refusal(ask(name), f"{name} is neither a folder here", hub.url, "check the id", "HF_TOKEN")


@pytest.mark.fault("hub")
def test_offline_without_a_cache_tells_how_to_go_online(ask, tmp_path):
    done = ask("me/open", HF_HUB_OFFLINE="1")
    refusal(done, "me/open is not in the cache", "set HF_HUB_OFFLINE=0", str(tmp_path / "home"))


def test_a_hub_out_of_reach_is_named_with_the_reason(ask):
    done = ask("me/open", HF_ENDPOINT=OUT_OF_REACH)
    refusal(done, f"{OUT_OF_REACH} did not serve it", "refused", "check the connection")


def test_a_name_the_hub_would_not_accept_is_called_neither_folder_nor_id(ask):
    refusal(ask("org/na--me"), "'org/na--me' is neither a folder here nor a hub id")


@pytest.mark.fault("pickle")
def test_a_hub_model_of_pickles_only_is_refused(ask):
    refusal(ask("me/pickled"), "me/pickled: no config.json with *.safetensors")


def test_a_full_disk_is_not_mistaken_for_the_hubs_fault(tmp_path, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left on device"):
        resolve("me/open")
