"""Pushes an OCI image layout to a registry through oras-py, an optional extra: pip install -e ".[oci]".

oras-py has the session, docker's stored logins, and the answer to a registry's challenge (Basic, or a Bearer
token). The upload is
here: oras-py would write the manifest's JSON anew, which changes its digest, and shows no progress.

Source: opencontainers/distribution-spec, spec.md ("Pushing a blob in chunks"): HEAD blob, POST uploads, PATCH
Location, PUT Location?digest=, PUT manifests/tag.
"""

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urljoin, urlsplit

CHUNK = 8 * 2**20  # bytes of one PATCH; no more of a blob is in memory
TRIES = 5  # of a request whose connection breaks, and of a blob whose upload session is lost
BACK_OFF = 0.5  # seconds after the first failure, doubled after each
TIMEOUT = 120  # seconds without an answer
USER, PASSWORD = "LOUPE_REGISTRY_USER", "LOUPE_REGISTRY_PASSWORD"
DOCKER_HUB, DOCKER_HUB_LOGIN = "registry-1.docker.io", "https://index.docker.io/v1/"

NAME = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
PORT, LABEL = r"(?::\d+)?", r"[A-Za-z0-9-]+"
HOST = rf"localhost{PORT}|\[[0-9a-fA-F:]+\]{PORT}|{LABEL}(?:\.{LABEL})+{PORT}|{LABEL}:\d+"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
REFERENCE = re.compile(rf"(?:(?P<host>{HOST})/)?(?P<repository>{NAME}(?:/{NAME})*)(?::(?P<tag>{TAG}))?")


def push(layout: Path, reference: str, progress: Callable[[int], None] = lambda sent: None) -> str:
    """Pushes the layout that write_layout wrote to "registry/name:tag" and returns the digest of its
    manifest.

    A blob that the registry has is not sent again. `progress` receives the bytes that the registry has of all
    blobs; the number falls if a blob has to start again. Raises ValueError, in one line with the remedy, for
    a bad reference, a host out of reach, a refused login or permission, and a connection that keeps breaking.
    """
    host, repository, tag = parse_reference(reference)
    if not (layout / "index.json").is_file():
        raise ValueError(
            f"{layout} is no OCI image layout: it has no index.json; give the folder that the export wrote"
        )
    digest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    manifest = _blob(layout, digest).read_bytes()
    described = json.loads(manifest)
    remote, done = Remote(host, repository), 0
    for blob in [*described["layers"], described["config"]]:
        before = done
        remote.push_blob(
            _blob(layout, blob["digest"]), blob["digest"], lambda sent, n=before: progress(n + sent)
        )
        done += blob["size"]
    headers = {"Content-Type": described["mediaType"]}
    remote.call("PUT", f"{remote.url}/manifests/{tag}", (201,), data=manifest, headers=headers)
    return digest


def parse_reference(reference: str) -> tuple[str, str, str]:
    """ "registry/name:tag" -> (host[:port], repository, tag), by docker's rule: a first part with a dot or a
    colon is a host.
    """
    match = REFERENCE.fullmatch(reference)
    if not match:
        hints = {"://": "without https://", "@": "without a digest", "": "in lower case"}
        hint = next(hint for mark, hint in hints.items() if mark in reference)
        raise ValueError(f"{reference!r} is no place in a registry; give registry/name:tag {hint}")
    host, repository, tag = match["host"], match["repository"], match["tag"]
    if not tag:
        example = f"{reference}:latest (a folder of that name is ./{reference})"
        raise ValueError(f"{reference!r} has no tag; add one, such as {example}")
    if host in (None, "docker.io", "index.docker.io", DOCKER_HUB):
        if "/" not in repository:
            raise ValueError(
                f"{reference!r} has neither a registry nor a user; give user/{reference} for Docker Hub"
            )
        host = DOCKER_HUB
    return host, repository, tag


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / Path(*digest.split(":"))


class Remote:
    """One repository of a registry: plain http on this machine, https on others."""

    def __init__(self, host: str, repository: str):
        try:
            import oras.provider
        except ImportError:
            raise ValueError('pushing to a registry needs oras: pip install -e ".[oci]"') from None
        self.host, self.repository = host, repository
        local = urlsplit(f"//{host}").hostname in ("localhost", "127.0.0.1", "::1")
        self.base = f"{'http' if local else 'https'}://{host}"
        self.url = f"{self.base}/v2/{repository}"
        registry = oras.provider.Registry(host, insecure=local)
        challenge = self._ping(registry.session, local)
        if challenge.lower().startswith("basic"):
            registry = oras.provider.Registry(host, insecure=local, auth_backend="basic")
        registry.session.trust_env = not local  # no proxy between this machine and itself
        registry.session.request = partial(registry.session.request, timeout=TIMEOUT)
        self.oras, self.user = registry, self._log_in(registry)
        # Without oras' own retries, which take two minutes over a refused password.
        self._request = partial(type(registry).do_request.__wrapped__, registry)
        if challenge.lower().startswith("basic") and not self.user:
            self._refused("it wants a login")
        if challenge and self.user:
            self.call("GET", f"{self.base}/v2/", (200,))
            self._forget_token()

    def _ping(self, session, local: bool) -> str:
        """Returns the registry's challenge, "" for none; a login is sent to https or to this machine only."""
        import requests

        session.trust_env = not local
        try:
            answer = session.get(f"{self.base}/v2/", timeout=TIMEOUT)
        except requests.RequestException as e:
            remedy = "check the name, the connection and proxies"
            raise ValueError(f"{self.host} is out of reach ({_reason(e)}); {remedy}") from None
        challenge = answer.headers.get("WWW-Authenticate", "")
        realm = re.search(r'realm="([^"]*)"', challenge)
        if (
            challenge.lower().startswith("bearer")
            and realm
            and not local
            and not realm[1].startswith("https://")
        ):
            raise ValueError(
                f"{self.host} sends logins to {realm[1]!r}, which is not https; no password was sent"
            )
        return challenge

    def _log_in(self, registry) -> str:
        """Gives oras the login of the environment, else of docker's config.json; returns the user, "" for
        nobody.
        """
        from oras.container import Container

        user, password = os.environ.get(USER), os.environ.get(PASSWORD)
        if user and password:
            registry.auth.set_basic_auth(user, password)
            return user
        if user or password:
            raise ValueError(
                f"only {USER if user else PASSWORD} is set; set {USER} and {PASSWORD}, or neither"
            )
        where = Container(f"{self.host}/{self.repository}")
        where.registry = DOCKER_HUB_LOGIN if self.host == DOCKER_HUB else self.host
        folder = os.environ.get("DOCKER_CONFIG")
        file = Path(folder or Path.home() / ".docker") / "config.json"
        try:
            registry.auth.load_configs(where, [str(file)] if folder and file.is_file() else None)
        except (ValueError, AttributeError, KeyError, OSError) as e:
            raise ValueError(
                f"{file} is no docker config ({e}); repair it, or set {USER} and {PASSWORD}"
            ) from None
        return "the user of docker login" if getattr(registry.auth, "_basic_auth", None) else ""

    def _forget_token(self) -> None:
        """oras keeps one token for all scopes: the one for reading would be refused for writing."""
        if hasattr(self.oras.auth, "token"):
            self.oras.auth.token = None

    def call(self, method: str, url: str, expect: tuple[int, ...], **content):
        """Returns the response to one request; an unexpected status or a connection that keeps breaking is a
        ValueError.
        """
        import requests

        # Another host, such as a cloud's storage, gets no login.
        send = self._request if urlsplit(url).netloc == self.host else self._without_login
        for failures in range(1, TRIES + 1):
            try:
                answer = send(url, method, **content)
            except requests.RequestException as e:
                problem = f"the connection broke ({_reason(e)})"
            except ValueError:  # oras-py: the challenge cannot be answered
                self._refused("it wants a login")
            else:
                if answer.status_code in expect:
                    return answer
                if answer.status_code in (401, 403):
                    self._refused(_words(answer))
                problem = f"{method} {urlsplit(url).path} gives {answer.status_code}: {_words(answer)}"
                if answer.status_code < 500 and answer.status_code != 429:
                    break
            if failures < TRIES:
                time.sleep(BACK_OFF * 2 ** (failures - 1))
        raise ValueError(f"{self.host}: {problem}; push again later: a blob that is there is not sent twice")

    def _without_login(self, url: str, method: str, **content):
        return self.oras.session.request(method, url, **content)

    def _refused(self, words: str) -> None:
        who = f"{self.user} or the password" if self.user else "a push without a login"
        raise ValueError(
            f"{self.host} refuses {who} for {self.repository} ({words}); "
            f"run docker login {self.host}, or set {USER} and {PASSWORD}"
        )

    def push_blob(self, file: Path, digest: str, report: Callable[[int], None]) -> None:
        """Uploads a file unless the registry has it; it starts again, a few times, if the registry loses the
        session.
        """
        if self.call("HEAD", f"{self.url}/blobs/{digest}", (200, 404)).status_code == 200:
            return report(file.stat().st_size)
        self._forget_token()
        for _ in range(TRIES):
            if self._upload(file, digest, report):
                return None
        raise ValueError(f"{self.host} lost the upload of {digest} {TRIES} times; push again later")

    def _upload(self, file: Path, digest: str, report: Callable[[int], None]) -> bool:
        """Sends the file in one upload session; returns whether the registry has it, False if the session was
        lost.
        """
        start = f"{self.url}/blobs/uploads/"
        answer = self.call("POST", start, (202, 404))
        if answer.status_code == 404:
            raise ValueError(f"{self.host} has no repository {self.repository}; create it, or check the name")
        location, sent, lost = urljoin(start, answer.headers["Location"]), 0, (400, 404, 416)
        with file.open("rb") as f:
            while chunk := f.read(CHUNK):
                headers = {
                    "Content-Range": f"{sent}-{sent + len(chunk) - 1}",
                    "Content-Type": "application/octet-stream",
                }
                answer = self.call("PATCH", location, (202, 204, *lost), data=chunk, headers=headers)
                if answer.status_code in lost:
                    return False
                location, sent = (
                    urljoin(location, answer.headers.get("Location", location)),
                    sent + len(chunk),
                )
                report(sent)
        mark = "&" if "?" in location else "?"
        return self.call("PUT", f"{location}{mark}digest={digest}", (201, 204, *lost)).status_code not in lost


def _reason(error: Exception) -> str:
    """Returns the innermost cause of an error of requests, in one line."""
    while error.args and isinstance(getattr(error.args[0], "reason", error.args[0]), Exception):
        error = getattr(error.args[0], "reason", error.args[0])
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _words(answer) -> str:
    """Returns what the registry says of an error."""
    try:
        return "; ".join(error.get("message") or error["code"] for error in answer.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.reason or "no reason given"
