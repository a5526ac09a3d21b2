"""exporting/registry.py against a registry of our own with faults, and against Debian's docker-registry with skopeo pulling."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

import exporting.registry as ours
from exporting.credentials import find_credentials
from exporting.oci import write_layout
from exporting.registry import parse_reference, push
from exporting.registry_client import Answer
from tests.exporting.gguf_files import read_gguf, write_gguf
from tests.exporting.registry_server import BASIC, PASSWORD, USER, registry

CHUNK = 4096  # the GGUF is four chunks of it and a rest


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Small chunks, no waiting, nobody logged in."""
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
    """{digest: bytes} of all that a push uploads as blobs; the manifest lies among them on the disk."""
    manifest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    files = {f"sha256:{p.name}": p.read_bytes() for p in (layout / "blobs" / "sha256").iterdir()}
    return {digest: content for digest, content in files.items() if digest != manifest}


def total(layout: Path) -> int:
    return sum(map(len, blobs_of(layout).values()))


def pushed(layout: Path, state, **settings) -> str:
    """Pushes, and sees that the registry has the same bytes."""
    digest = push(layout, f"127.0.0.1:{state.port}/me/model:v1", **settings)
    assert state.blobs == blobs_of(layout)
    content, kind = state.manifests["v1"]
    assert (
        content == (layout / "blobs" / "sha256" / digest[7:]).read_bytes()
        and kind == "application/vnd.oci.image.manifest.v1+json"
    )
    return digest


def refused(layout: Path, reference: str, *words: str) -> str:
    """The message of a push that must not work: one line."""
    with pytest.raises(ValueError) as e:
        push(layout, reference)
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def log_in(monkeypatch, password: str = PASSWORD) -> None:
    monkeypatch.setenv("LOUPE_REGISTRY_USER", USER)
    monkeypatch.setenv("LOUPE_REGISTRY_PASSWORD", password)


def write_config(**config) -> None:
    folder = Path(os.environ["DOCKER_CONFIG"])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def methods(state, *wanted: str) -> list[str]:
    return [method for method, _, _ in state.asked if method in wanted]


# the way of a blob


def test_a_push_brings_the_same_bytes_in_chunks(layout):
    seen = []
    with registry() as state:
        pushed(layout, state, progress=seen.append)
    assert methods(state, "PATCH") == ["PATCH"] * 6  # five of the GGUF, one of the config
    assert seen == sorted(seen) and seen[:2] == [CHUNK, 2 * CHUNK] and seen[-1] == total(layout)


def test_the_config_and_then_the_manifest_come_last(layout):
    with registry() as state:
        pushed(layout, state)
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


@pytest.mark.parametrize(("lose", "received"), [("chunk", "all"), ("half", "less"), ("session", "more")])
def test_a_connection_broken_inside_a_blob_resumes(layout, lose, received):
    """The third PATCH breaks half-way: what came is gone, is kept, or the whole session is gone with the two chunks before."""
    with registry(break_patches=(2,), lose=lose) as state:
        pushed(layout, state)
    assert state.received - total(layout) == {"all": 0, "less": -CHUNK // 2, "more": 2 * CHUNK}[received]


def test_an_upload_that_keeps_breaking_ends_in_one_line(layout):
    with registry(break_patches=tuple(range(1, 100))) as state:
        refused(
            layout,
            f"127.0.0.1:{state.port}/me/model:v1",
            "broke off at byte 4096 of 18752",
            f"({ours.TRIES} times in a row)",
            "push again",
        )
    assert len(methods(state, "PATCH")) == 1 + ours.TRIES and not state.manifests


def test_breaks_between_which_bytes_arrive_are_not_counted_together(layout):
    """Every second PATCH breaks: ours.TRIES would be too few for all of them."""
    with registry(break_patches=tuple(range(0, 100, 2))) as state:
        seen = []
        ours_chunk, ours.CHUNK = ours.CHUNK, 1024
        try:
            pushed(layout, state, progress=seen.append)
        finally:
            ours.CHUNK = ours_chunk
    assert len(seen) > 2 * ours.TRIES


def test_a_session_that_dies_at_the_same_place_for_ever_ends_too(layout):
    """Each new session gets two chunks through: no progress, though bytes arrive."""
    with registry(break_patches=tuple(range(2, 100, 3)), lose="session") as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "broke off at byte 8192", "times in a row")


def test_a_registry_that_counts_other_bytes_than_ours_gets_the_blob_from_its_start(layout, monkeypatch):
    """After a break the session says more than was ever sent."""
    with registry(break_patches=(1,)) as state:
        monkeypatch.setattr(Answer, "received", lambda self: 10**6 if self.status == 204 else None)
        pushed(layout, state)
    assert (
        methods(state, "POST", "PUT") == ["POST", "POST", "PUT", "POST", "PUT", "PUT"]
        and state.received == total(layout) + CHUNK
    )


def test_a_last_put_whose_answer_is_lost_is_not_repeated(layout):
    with registry(lost_answers=1) as state:
        pushed(layout, state)
    assert len(methods(state, "POST")) == 2 and state.received == total(layout)


@pytest.mark.parametrize(
    ("method", "statuses"),
    [
        ("HEAD", [503]),
        ("POST", [500, 502]),
        ("PATCH", [429]),
        ("PATCH", [404]),
        ("PUT", [503]),
        ("PUT", [400]),
    ],
)
def test_a_busy_registry_is_asked_again(layout, method, statuses):
    with registry(refuse={method: list(statuses)}) as state:
        pushed(layout, state)
    assert not state.refuse[method]


def test_a_manifest_that_is_refused_ends_in_one_line_with_the_registrys_words(layout):
    with registry() as state:
        pushed(layout, state)  # so that the manifest's is the only PUT
        state.refuse = {"PUT": [400]}
        refused(layout, f"127.0.0.1:{state.port}/me/model:v2", "400 come back later")


# logins


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_user_and_password_from_the_environment_open_the_registry(layout, monkeypatch, auth):
    log_in(monkeypatch)
    with registry(auth=auth) as state:
        pushed(layout, state)


def test_a_token_that_runs_out_is_renewed(layout, monkeypatch):
    log_in(monkeypatch)
    with registry(auth="bearer", token_lasts=3) as state:
        pushed(layout, state)
    assert state.tokens > 2


@pytest.mark.parametrize("name", ["{host}", "http://{host}", "https://{host}/v1/", "https://{host}/v2/"])
def test_a_docker_login_opens_the_registry(layout, name):
    with registry(auth="basic") as state:
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        write_config(
            auths={
                "other.example": {"auth": "eDp5"},
                name.format(host=f"127.0.0.1:{state.port}"): {"auth": auth},
            }
        )
        pushed(layout, state)


def write_helper(folder: Path, name: str, answer: str, code: int = 0) -> None:
    """A docker-credential-<name> on PATH that notes what it was asked."""
    folder.mkdir(exist_ok=True)
    program = folder / f"docker-credential-{name}"
    program.write_text(
        f"#!/bin/sh\n{{ echo $1; cat; }} > {folder}/{name}.asked\ncat <<'END'\n{answer}\nEND\nexit {code}\n"
    )
    program.chmod(0o755)


GOOD = json.dumps({"ServerURL": "x", "Username": USER, "Secret": PASSWORD})


@pytest.mark.parametrize("kind", ["credsStore", "credHelpers"])
def test_a_credential_helper_opens_the_registry(layout, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    write_helper(tmp_path / "bin", "vault", GOOD)
    with registry(auth="bearer") as state:
        host = f"127.0.0.1:{state.port}"
        write_config(
            **(
                {"credsStore": "vault"}
                if kind == "credsStore"
                else {"credHelpers": {host: "vault"}, "credsStore": "absent"}
            )
        )
        pushed(layout, state)
    assert (tmp_path / "bin" / "vault.asked").read_text() == f"get\n{host}"


def test_docker_hubs_login_is_found_under_its_old_name(tmp_path):
    write_config(auths={"https://index.docker.io/v1/": {"auth": base64.b64encode(b"ada:x:y").decode()}})
    assert find_credentials("registry-1.docker.io") == ("ada", "x:y")
    assert find_credentials("registry.example") is None


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_bad_password_gives_one_line(layout, monkeypatch, auth):
    log_in(monkeypatch, "secret-but-wrong")
    with registry(auth=auth) as state:
        message = refused(
            layout,
            f"127.0.0.1:{state.port}/me/model:v1",
            "refuses user ada with this password",
            f"docker login 127.0.0.1:{state.port}",
            "LOUPE_REGISTRY_PASSWORD",
        )
    assert "secret-but-wrong" not in message and methods(state, "POST", "PUT") == []


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_no_login_gives_one_line(layout, auth):
    with registry(auth=auth) as state:
        refused(
            layout,
            f"127.0.0.1:{state.port}/me/model:v1",
            "asks for a password and there is none",
            "docker login",
        )


def test_a_refused_permission_gives_one_line(layout, monkeypatch):
    log_in(monkeypatch)
    with registry(auth="bearer", may_push=False) as state:
        refused(
            layout,
            f"127.0.0.1:{state.port}/me/model:v1",
            "does not let ada push to me/model",
            "take a repository that is yours",
        )
    with registry(auth="basic", refuse={"POST": [403]}) as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "does not let ada push to me/model")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", ["config.json cannot be read as JSON", "repair"]),
        ("[]", ["is no docker config"]),
        ('{"auths": {"HOST": {"auth": "!"}}}', ["is not base64 of user:password", "docker login"]),
        ('{"auths": {"HOST": {"identitytoken": "abc"}}}', ["identity token", "LOUPE_REGISTRY_USER"]),
        ('{"credsStore": "absent"}', ["docker-credential-absent, which does not run", "install it"]),
        ('{"credsStore": "broken"}', ["docker-credential-broken gave no credentials", "exit code 1"]),
        ('{"credsStore": "empty"}', ["asks for a password and there is none"]),
    ],
)
def test_a_broken_docker_login_gives_one_line(layout, tmp_path, monkeypatch, config, words):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    write_helper(tmp_path / "bin", "broken", "the vault is on fire", 1)
    write_helper(tmp_path / "bin", "empty", "credentials not found in native keychain", 1)
    with registry(auth="basic") as state:
        host = f"127.0.0.1:{state.port}"
        write_config()
        (tmp_path / "docker" / "config.json").write_text(config.replace("HOST", host))
        refused(layout, f"{host}/me/model:v1", *words)


def test_half_a_login_in_the_environment_gives_one_line(layout, monkeypatch):
    monkeypatch.setenv("LOUPE_REGISTRY_USER", USER)
    with registry(auth="basic") as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "only LOUPE_REGISTRY_USER is set")


# where a login may go


def test_a_login_goes_to_no_other_host(layout, monkeypatch):
    """Another registry is named by a Location, and by a redirect: neither sees the login, and the redirect not even the bytes."""
    log_in(monkeypatch)
    with registry(auth="bearer") as other, registry(auth="basic") as state:
        monkeypatch.setattr(
            ours.Registry,
            "_open_session",
            lambda self: f"http://127.0.0.1:{other.port}/v2/me/model/blobs/uploads/far",
        )
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "does not let ada push")
        assert [(method, shown) for method, _, shown in other.asked] == [
            ("PATCH", None)
        ]  # and it is not asked for a token
    monkeypatch.undo()
    monkeypatch.setattr(ours, "CHUNK", CHUNK)
    log_in(monkeypatch)
    with (
        registry() as other,
        registry(
            auth="basic", elsewhere=f"http://127.0.0.1:{other.port}/v2/me/model/blobs/uploads/far"
        ) as state,
    ):
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "307")
        assert not other.asked and BASIC in {shown for _, _, shown in state.asked}


def test_no_password_goes_to_a_realm_without_https(layout, monkeypatch):
    log_in(monkeypatch)
    sent = []
    hub = ours.Registry("registry.example", "me/model")
    monkeypatch.setattr(ours.Registry, "_request", lambda self, *words: sent.append(words))
    for realm in ("http://login.example/token", "http://127.0.0.1:9/token", ""):
        with pytest.raises(ValueError, match="which is not https; no password was sent"):
            hub._token({"realm": realm}, "Basic x")
    assert not sent


def test_a_location_that_is_a_file_is_not_opened(layout, monkeypatch):
    monkeypatch.setattr(ours.Registry, "_open_session", lambda self: Path("/etc/hostname").as_uri())
    with registry() as state:
        refused(layout, f"127.0.0.1:{state.port}/me/model:v1", "no web address")


def test_a_proxy_sees_nothing_that_goes_to_localhost(layout, monkeypatch):
    with registry() as proxy, registry() as state:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        pushed(layout, state)
    assert not proxy.asked


# references and addresses


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
def test_only_this_machine_goes_without_https(host, base):
    assert ours.Registry(host, "me/model").base == base


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


def test_a_host_that_nobody_knows_gives_one_line(layout, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused(layout, "registry.example/me/model:v1", "registry.example is out of reach", "check the name")


def test_a_port_where_nobody_listens_gives_one_line(layout):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        refused(layout, f"127.0.0.1:{s.getsockname()[1]}/me/model:v1", "is out of reach", "refused")


def test_a_repository_that_is_not_there_gives_one_line(layout):
    with registry() as state:
        refused(layout, f"127.0.0.1:{state.port}/you/model:v1", "has no repository you/model", "create it")


def test_a_folder_that_is_no_layout_gives_one_line(tmp_path):
    refused(tmp_path, "me/gemma:v1", "is no OCI image layout")


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
    """host:port of a docker-registry with its data in the folder."""
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
    """{digest: bytes} of what skopeo pulls."""
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


@pytest.mark.external
def test_docker_registry_gets_a_blob_whose_connection_broke(layout, tmp_path, monkeypatch):
    """The second PATCH is cut off after half its bytes, by a socket that closes."""
    needs("docker-registry", "skopeo")
    send, cuts = ours.Registry._request, []

    def cut_once(self, method, url, body, headers):
        if method == "PATCH" and headers["Content-Range"].startswith(f"{CHUNK}-") and not cuts:
            cuts.append(url)
            path = url.partition(self.host)[2]
            with socket.create_connection(self.host.split(":")) as s:
                lines = [
                    f"PATCH {path} HTTP/1.1",
                    f"Host: {self.host}",
                    f"Content-Length: {len(body)}",
                    *(f"{k}: {v}" for k, v in headers.items()),
                ]
                s.sendall("\r\n".join(lines + ["", ""]).encode() + body[: len(body) // 2])
            time.sleep(0.3)  # until the registry has seen it
            raise ours.Interrupted("cut off")
        return send(self, method, url, body, headers)

    monkeypatch.setattr(ours.Registry, "_request", cut_once)
    with docker_registry(tmp_path / "registry") as host:
        push(layout, f"{host}/me/model:v1")
        assert cuts and pull(f"{host}/me/model:v1", tmp_path / "pulled") == blobs_of(layout)


@pytest.mark.external
def test_docker_registry_with_a_password_takes_the_right_one_and_names_the_wrong_one(
    layout, tmp_path, monkeypatch
):
    needs("docker-registry", "skopeo", "htpasswd")
    with docker_registry(tmp_path / "registry", PASSWORD) as host:
        log_in(monkeypatch, "wrong")
        refused(layout, f"{host}/me/model:v1", "refuses user ada with this password")
        log_in(monkeypatch)
        push(layout, f"{host}/me/model:v1")
        assert pull(f"{host}/me/model:v1", tmp_path / "pulled", f"--src-creds={USER}:{PASSWORD}") == blobs_of(
            layout
        )


def test_a_push_holds_one_chunk_in_memory(layout, tmp_path):
    """64 MiB in chunks of 1 MiB, in a process that may take 24 MiB more than it starts with."""
    code = """
import resource, sys
from pathlib import Path
from exporting import registry, registry_client
registry.CHUNK = 2**20
file = Path(sys.argv[1])
with file.open("wb") as f:
    f.truncate(2**26)
def take(self, method, url, body, headers):
    from email.message import Message
    headers = Message()
    headers["Location"] = "/next"
    return registry_client.Answer({"HEAD": 404, "POST": 202, "PATCH": 202, "PUT": 201}[method], headers, b"")
registry.Registry._request = take
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, used + 24 * 2**20))
registry.Registry("localhost", "m").push_blob(file, "sha256:0", print)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(n * 2**20) for n in range(1, 65)]
