"""exporting/registry.py against a registry in this process and Debian's docker-registry, read with skopeo."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

import exporting.registry as ours
from exporting.oci import write_layout
from exporting.registry import parse_reference, push
from tests.exporting.gguf_files import read_gguf, write_gguf
from tests.exporting.registry_server import BASIC, PASSWORD, USER, registry

CHUNK = 4096  # the GGUF is four chunks of it and a rest


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Uses small chunks, does not wait after failures, and has no login."""
    monkeypatch.setattr(ours, "CHUNK", CHUNK)
    monkeypatch.setattr(ours, "BACK_OFF", 0.001)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for name in ("LOUPE_REGISTRY_USER", "LOUPE_REGISTRY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def layout(tmp_path):
    gguf = write_gguf(tmp_path / "x.gguf", rows=67)
    write_layout(gguf, tmp_path / "layout", **read_gguf(gguf))
    return tmp_path / "layout"


def blobs_of(layout: Path) -> dict:
    """Returns {digest: bytes} of the blobs that a push uploads: all but the manifest."""
    manifest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    files = {f"sha256:{p.name}": p.read_bytes() for p in (layout / "blobs" / "sha256").iterdir()}
    return {digest: content for digest, content in files.items() if digest != manifest}


def total(layout: Path) -> int:
    return sum(map(len, blobs_of(layout).values()))


def pushed(layout: Path, state, **settings) -> str:
    """Pushes, and asserts that the registry has the same bytes."""
    digest = push(layout, f"127.0.0.1:{state.port}/me/model:v1", **settings)
    assert state.blobs == blobs_of(layout)
    content, kind = state.manifests["v1"]
    assert (
        content == (layout / "blobs" / "sha256" / digest[7:]).read_bytes()
        and kind == "application/vnd.oci.image.manifest.v1+json"
    )
    return digest


def refused(layout: Path, reference: str, *words: str) -> str:
    """Returns the message of a push that must fail, and asserts that it is one line with `words`."""
    with pytest.raises(ValueError) as e:
        push(layout, reference)
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def log_in(monkeypatch, password: str = PASSWORD) -> None:
    monkeypatch.setenv("LOUPE_REGISTRY_USER", USER)
    monkeypatch.setenv("LOUPE_REGISTRY_PASSWORD", password)


def docker_login(**config) -> None:
    folder = Path(os.environ["DOCKER_CONFIG"])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def methods(state, *wanted: str) -> list[str]:
    return [method for method, _, _ in state.asked if method in wanted]


# the way of a blob


def test_a_push_brings_the_same_bytes_in_chunks_config_and_manifest_last(layout):
    seen = []
    with registry() as state:
        pushed(layout, state, progress=seen.append)
    assert methods(state, "PATCH") == ["PATCH"] * 6  # five of the GGUF, one of the config
    assert seen == sorted(seen) and seen[:2] == [CHUNK, 2 * CHUNK] and seen[-1] == total(layout)
    ends = [path for method, path, _ in state.asked if method == "PUT"]
    config = json.loads(state.manifests["v1"][0])["config"]["digest"]
    assert len(ends) == 3 and config[7:] in ends[1] and ends[2] == "/v2/me/model/manifests/v1"


def test_a_blob_that_is_there_is_not_sent_again(layout):
    with registry() as state:
        pushed(layout, state)
        state.asked.clear()
        seen = []
        pushed(layout, state, progress=seen.append)
    assert methods(state, "POST", "PATCH") == [] and seen[-1] == total(layout)


@pytest.mark.parametrize("faults", [{"broken": {3}}, {"lost": {3}}, {"lost": {2, 5}}, {"busy": 3}])
def test_broken_connections_lost_uploads_and_a_busy_registry_are_survived(layout, faults):
    with registry(**faults) as state:
        pushed(layout, state)


@pytest.mark.parametrize("faults", [{"broken": set(range(2, 99))}, {"lost": set(range(2, 99))}, {"busy": 99}])
def test_faults_without_end_give_one_line(layout, faults):
    with registry(**faults) as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "push again later")


# logins


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_user_and_password_of_the_environment_open_the_registry(layout, monkeypatch, auth):
    log_in(monkeypatch)
    with registry(auth=auth) as state:
        pushed(layout, state)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_docker_login_opens_the_registry(layout, auth):
    with registry(auth=auth) as state:
        docker_login(auths={f"127.0.0.1:{state.port}": {"auth": BASIC.removeprefix("Basic ")}})
        pushed(layout, state)


@pytest.mark.parametrize("kind", ["credHelpers", "credsStore"])
def test_a_credential_helper_opens_the_registry(layout, tmp_path, monkeypatch, kind):
    helper = tmp_path / "docker-credential-mine"
    helper.write_text(f"""#!/bin/sh\necho '{json.dumps({"Username": USER, "Secret": PASSWORD})}'\n""")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with registry(auth="basic") as state:
        host = f"127.0.0.1:{state.port}"
        docker_login(**{kind: {host: "mine"} if kind == "credHelpers" else "mine"})
        pushed(layout, state)


def test_docker_hubs_login_is_found_under_its_old_name(monkeypatch):
    docker_login(auths={"https://index.docker.io/v1/": {"auth": BASIC.removeprefix("Basic ")}})
    monkeypatch.setattr(ours.Remote, "_ping", lambda *_: "")
    assert ours.Remote("registry-1.docker.io", "me/model").oras.auth._basic_auth == BASIC.removeprefix(
        "Basic "
    )


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_wrong_password_gives_one_line_without_it(layout, monkeypatch, auth):
    log_in(monkeypatch, "wr0ng-word")
    with registry(auth=auth) as state:
        message = refused(
            layout, f"127.0.0.1:{state.port}/me/model:v1", "refuses ada or the password", "docker login"
        )
    assert "wr0ng-word" not in message


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_no_login_gives_one_line(layout, auth):
    with registry(auth=auth) as state:
        refused(
            layout, f"127.0.0.1:{state.port}/me/model:v1", "a push without a login", "docker login", ours.USER
        )


def test_a_refused_permission_gives_one_line_with_the_registrys_words(layout, monkeypatch):
    log_in(monkeypatch)
    with registry(auth="basic", forbidden=True) as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "not yours", "me/model")


def test_half_a_login_and_a_broken_docker_config_give_one_line(layout, monkeypatch):
    with registry(auth="basic") as state:
        where = f"127.0.0.1:{state.port}/me/model:v1"
        docker_login()
        (Path(os.environ["DOCKER_CONFIG"]) / "config.json").write_text("{")
        refused(layout, where, "config.json is no docker config", ours.PASSWORD)
        monkeypatch.setenv("LOUPE_REGISTRY_USER", USER)
        refused(layout, where, "only LOUPE_REGISTRY_USER is set")


def test_no_password_goes_to_a_realm_without_https(monkeypatch):
    import requests

    class Answer:
        headers = {"WWW-Authenticate": 'Bearer realm="http://elsewhere.example/token"'}  # noqa: RUF012

    log_in(monkeypatch)
    monkeypatch.setattr(requests.Session, "get", lambda *_, **__: Answer)
    with pytest.raises(ValueError, match="is not https; no password was sent"):
        ours.Remote("registry.example", "me/model")


def test_a_login_goes_to_no_other_host(monkeypatch):
    log_in(monkeypatch)
    with registry(auth="basic") as state, registry() as other:
        remote = ours.Remote(f"127.0.0.1:{state.port}", "me/model")
        remote.call("GET", f"http://127.0.0.1:{other.port}/v2/", (200,))
    assert [given for _, _, given in other.asked] == [""]


def test_a_proxy_sees_nothing_that_goes_to_this_machine(layout, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with registry() as state:
        pushed(layout, state)


# references and hosts


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("localhost:5000/gemma:v1", ("localhost:5000", "gemma", "v1")),
        ("localhost/a/b:1", ("localhost", "a/b", "1")),
        ("[::1]:5000/gemma:v1", ("[::1]:5000", "gemma", "v1")),
        ("ghcr.io/me/gemma-3_x.y:Q8_0", ("ghcr.io", "me/gemma-3_x.y", "Q8_0")),
        ("me/gemma:v1", ("registry-1.docker.io", "me/gemma", "v1")),
        ("docker.io/me/gemma:v1", ("registry-1.docker.io", "me/gemma", "v1")),
    ],
)
def test_references_are_read_as_docker_reads_them(reference, expected):
    assert parse_reference(reference) == expected


@pytest.mark.parametrize(
    ("host", "base"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("ghcr.io", "https://ghcr.io"),
        ("192.168.1.2:5000", "https://192.168.1.2:5000"),
        ("localhost.example", "https://localhost.example"),
    ],
)
def test_only_this_machine_goes_without_https(host, base, monkeypatch):
    monkeypatch.setattr(ours.Remote, "_ping", lambda *_: "")
    assert ours.Remote(host, "me/model").base == base


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("localhost:5000/gemma", ["has no tag", "localhost:5000/gemma:latest"]),
        ("me/gemma", ["has no tag", "me/gemma:latest"]),
        ("https://ghcr.io/me/gemma:v1", ["without https://"]),
        ("ghcr.io/Me/gemma:v1", ["lower case"]),
        ("me/gemma@sha256:" + "0" * 64, ["without a digest"]),
        ("gemma:v1", ["neither a registry nor a user", "user/gemma:v1"]),
        ("", ["registry/name:tag"]),
        ("me/gemma:v1\n", ["registry/name:tag"]),
        ("me/../gemma:v1", ["registry/name:tag"]),
    ],
)
def test_a_bad_reference_gives_one_line(layout, reference, words):
    refused(layout, reference, *words)


def test_a_host_that_is_out_of_reach_gives_one_line(layout, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        refused(
            layout,
            f"127.0.0.1:{s.getsockname()[1]}/me/model:v1",
            "is out of reach",
            "refused",
            "check the name",
        )

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused(layout, "registry.example/me/model:v1", "registry.example is out of reach", "check the name")


def test_a_repository_that_is_not_there_and_a_folder_that_is_no_layout_give_one_line(layout, tmp_path):
    with registry() as state:
        refused(layout, f"127.0.0.1:{state.port}/you/model:v1", "has no repository you/model", "create it")
    refused(tmp_path, "me/gemma:v1", "is no OCI image layout")


def test_without_oras_the_remedy_is_its_extra(layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "oras.provider", None)
    refused(layout, "localhost:5000/me/gemma:v1", 'pip install -e ".[oci]"')


# Debian's docker-registry, and skopeo


def needs(*programs: str) -> None:
    packages = {"htpasswd": "apache2-utils"}
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        pytest.fail(
            f"no {', '.join(missing)}; install Debian's {' and '.join(packages.get(p, p) for p in missing)}"
        )


@contextmanager
def docker_registry(folder: Path, password: str | None = None):
    """Yields host:port of a docker-registry that keeps its data in the folder."""
    folder.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{s.getsockname()[1]}"
    config = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host},
    }
    if password:
        hashed = subprocess.run(
            ["htpasswd", "-nbB", USER, password], capture_output=True, text=True, check=True
        ).stdout
        (folder / "users").write_text(hashed)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "users")}}
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not is_up(host):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(30)


def is_up(host: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{host}/v2/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def pull(reference: str, out: Path, *more: str) -> dict:
    """Returns {digest: bytes} of the files that skopeo pulls."""
    subprocess.run(
        ["skopeo", "copy", "--src-tls-verify=false", *more, f"docker://{reference}", f"dir:{out}"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return {
        f"sha256:{p.name}": p.read_bytes()
        for p in out.iterdir()
        if p.name not in ("version", "manifest.json")
    }


@pytest.mark.external
def test_skopeo_pulls_from_docker_registry_the_bytes_that_were_pushed(layout, tmp_path):
    needs("docker-registry", "skopeo")
    with docker_registry(tmp_path / "registry") as host:
        digest = push(layout, f"{host}/me/model:v1")
        assert pull(f"{host}/me/model:v1", tmp_path / "pulled") == blobs_of(layout)
        assert (tmp_path / "pulled" / "manifest.json").read_bytes() == (
            layout / "blobs" / "sha256" / digest[7:]
        ).read_bytes()


@contextmanager
def cutting_proxy(host: str, after: int):
    """Yields host:port of a proxy that closes its first connection to `host` after so many bytes."""
    target, connections = host.split(":"), []
    server = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        moved = 0
        try:
            while data := source.recv(4096):
                moved += len(data)
                if limit and moved > limit:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for s in (source, sink):
            s.close()

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            connections.append(client)
            upstream = socket.create_connection((target[0], int(target[1])))
            limit = after if len(connections) == 1 else None
            threading.Thread(target=carry, args=(client, upstream, limit), daemon=True).start()
            threading.Thread(target=carry, args=(upstream, client, None), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}", connections
    finally:
        server.close()


@pytest.mark.external
def test_docker_registry_gets_a_blob_whose_connection_broke(layout, tmp_path):
    """A proxy closes the first connection in the middle of a chunk; the push goes on over a second one."""
    needs("docker-registry", "skopeo")
    with (
        docker_registry(tmp_path / "registry") as host,
        cutting_proxy(host, after=3 * CHUNK) as (proxy, connections),
    ):
        digest = push(layout, f"{proxy}/me/model:v1")
        assert len(connections) > 1 and pull(f"{host}/me/model:v1", tmp_path / "pulled") == blobs_of(layout)
        manifest = (tmp_path / "pulled" / "manifest.json").read_bytes()
        assert manifest == (layout / "blobs" / "sha256" / digest[7:]).read_bytes()


@pytest.mark.external
def test_docker_registry_with_a_password_takes_the_right_one_and_refuses_the_wrong_one(
    layout, tmp_path, monkeypatch
):
    needs("docker-registry", "skopeo", "htpasswd")
    with docker_registry(tmp_path / "registry", PASSWORD) as host:
        log_in(monkeypatch, "wrong")
        refused(layout, f"{host}/me/model:v1", "refuses ada or the password")
        log_in(monkeypatch)
        push(layout, f"{host}/me/model:v1")
        found = pull(f"{host}/me/model:v1", tmp_path / "pulled", f"--src-creds={USER}:{PASSWORD}")
        assert found == blobs_of(layout)
