"""Pushes an OCI image layout to a registry. Needs oras-py, which is optional: pip install -e ".[oci]".

oras-py has the HTTP session, the logins that docker has stored, and authentication (Basic or Bearer). The
upload is our own, because oras-py serializes the manifest again (another digest) and reports no progress.

Source: opencontainers/distribution-spec, spec.md, "Pushing a blob in chunks". The requests are HEAD blob,
POST uploads, PATCH for each chunk, PUT with the digest and, after all blobs, PUT manifests/tag.
"""

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

CHUNK = 8 * 2**20  # Bytes of one PATCH; no more of a blob is in memory.
TRIES = 5  # For a request whose connection breaks, and for a blob whose upload session is lost.
BACK_OFF = 0.5  # Seconds after the first failure; each further failure doubles them.
TIMEOUT = 120  # Seconds without a response.
USER, PASSWORD = "LOUPE_REGISTRY_USER", "LOUPE_REGISTRY_PASSWORD"
DOCKER_HUB, DOCKER_HUB_LOGIN = "registry-1.docker.io", "https://index.docker.io/v1/"

NAME = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
PORT, LABEL = r"(?::\d+)?", r"[A-Za-z0-9-]+"
HOST = rf"localhost{PORT}|\[[0-9a-fA-F:]+\]{PORT}|{LABEL}(?:\.{LABEL})+{PORT}|{LABEL}:\d+"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
REFERENCE = re.compile(rf"(?:(?P<host>{HOST})/)?(?P<repository>{NAME}(?:/{NAME})*)(?::(?P<tag>{TAG}))?")


def is_reference(out: str) -> bool:
    """Returns whether `out`, the value of --out, names a place in a registry rather than a local folder.

    A path that exists or starts with /, ./ or ../ is a folder. Another value names a registry if its first
    part is localhost or has a dot or colon, as in docker, or if its last part has a colon.
    """
    host, _, rest = out.partition("/")
    is_host = host == "localhost" or ((":" in host or "." in host) and host.strip("."))
    is_path = out.startswith(("/", "./", "../")) or Path(out).exists()
    return not is_path and bool((rest and is_host) or ":" in out.rpartition("/")[2])


def parse_reference(reference: str) -> tuple[str, str, str]:
    """Splits "registry/name:tag" into (host[:port], repository, tag); the default host is Docker Hub's."""
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
            remedy = f"give user/{reference} for Docker Hub"
            raise ValueError(f"{reference!r} has neither a registry nor a user; {remedy}")
        host = DOCKER_HUB
    return host, repository, tag


def push(layout: Path, reference: str, progress: Callable[[int], object] = lambda sent: None) -> str:
    """Pushes the OCI image layout in `layout` to "registry/name:tag" and returns the manifest's digest.

    A blob that the registry has is not sent again. `progress` receives the total of bytes that the registry
    has; it falls if a blob's upload starts again. Raises ValueError, one line with a remedy, for a bad
    reference, an unreachable host, a refused login or permission, or a connection that keeps breaking.
    """
    host, repository, tag = parse_reference(reference)
    if not (layout / "index.json").is_file():
        remedy = "give the folder that the export wrote"
        raise ValueError(f"{layout} is no OCI image layout, because it has no index.json; {remedy}")
    digest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    content = _blob(layout, digest).read_bytes()
    manifest, remote, done = json.loads(content), Remote(host, repository), 0
    for blob in [*manifest["layers"], manifest["config"]]:
        remote.push_blob(_blob(layout, blob["digest"]), blob["digest"], progress, done)
        done += blob["size"]
    headers = {"Content-Type": manifest["mediaType"]}
    remote.call("PUT", f"{remote.url}/manifests/{tag}", (201,), data=content, headers=headers)
    return digest


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / Path(*digest.split(":"))


class Remote:
    """One repository of a registry, reached over http on this machine and over https on any other."""

    def __init__(self, host: str, repository: str):
        """Connects and logs in; raises ValueError if oras is missing or the registry refuses."""
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
        registry.session.trust_env = not local  # No proxy between this machine and itself.
        registry.session.request = partial(registry.session.request, timeout=TIMEOUT)
        self.oras, self.user = registry, self._log_in(registry)
        # Without oras' own retries, which spend two minutes on a refused password.
        self._request = partial(type(registry).do_request.__wrapped__, registry)
        if challenge.lower().startswith("basic") and not self.user:
            self._refused("it wants a login")
        if challenge and self.user:
            self.call("GET", f"{self.base}/v2/", (200,))
            self._forget_token()

    def _ping(self, session: Any, local: bool) -> str:
        """Returns the WWW-Authenticate header or ""; raises ValueError if logins would be sent over http."""
        import requests

        session.trust_env = not local
        try:
            response = session.get(f"{self.base}/v2/", timeout=TIMEOUT)
        except requests.RequestException as e:
            remedy = "check the name, the connection and proxies"
            raise ValueError(f"{self.host} is out of reach ({_reason(e)}); {remedy}") from None
        challenge = response.headers.get("WWW-Authenticate", "")
        realm = re.match(r'bearer.*realm="((?!https://)[^"]*)"', challenge, re.IGNORECASE)
        if realm and not local:
            where = f"{realm[1]!r}, which is not https"
            raise ValueError(f"{self.host} sends logins to {where}; no password was sent")
        return challenge

    def _log_in(self, registry: Any) -> str:
        """Gives oras a login from the environment or docker's config.json; returns the user, "" for none."""
        from oras.container import Container

        user, password = os.environ.get(USER), os.environ.get(PASSWORD)
        if user and password:
            registry.auth.set_basic_auth(user, password)
            return user
        if user or password:
            only = USER if user else PASSWORD
            raise ValueError(f"only {only} is set; set {USER} and {PASSWORD}, or neither")
        where = Container(f"{self.host}/{self.repository}")
        where.registry = DOCKER_HUB_LOGIN if self.host == DOCKER_HUB else self.host
        folder = os.environ.get("DOCKER_CONFIG")
        file = Path(folder or Path.home() / ".docker") / "config.json"
        try:
            registry.auth.load_configs(where, [str(file)] if folder and file.is_file() else None)
        except (ValueError, AttributeError, KeyError, OSError) as e:
            remedy = f"repair it, or set {USER} and {PASSWORD}"
            raise ValueError(f"{file} is no docker config ({e}); {remedy}") from None
        return "the user of docker login" if getattr(registry.auth, "_basic_auth", None) else ""

    def _forget_token(self) -> None:
        """Deletes the token that oras keeps, because a token for reading is refused for writing."""
        if hasattr(self.oras.auth, "token"):
            self.oras.auth.token = None

    def call(self, method: str, url: str, expect: tuple[int, ...], **content: Any) -> Any:
        """Sends a request, up to TRIES times; raises ValueError if no response has a status of `expect`."""
        import requests

        # Another host, such as a cloud's storage, gets no login.
        send = self._request if urlsplit(url).netloc == self.host else self.oras.session.request
        for failures in range(1, TRIES + 1):
            try:
                response = send(url=url, method=method, **content)
            except requests.RequestException as e:
                problem = f"the connection broke ({_reason(e)})"
            except ValueError:  # oras-py cannot answer the challenge
                self._refused("it wants a login")
            else:
                if response.status_code in expect:
                    return response
                if response.status_code in (401, 403):
                    self._refused(_message(response))
                problem = f"{method} {urlsplit(url).path} gives {response.status_code}: {_message(response)}"
                if response.status_code < 500 and response.status_code != 429:
                    break
            if failures < TRIES:
                time.sleep(BACK_OFF * 2 ** (failures - 1))
        raise ValueError(f"{self.host}: {problem}; push again later: a blob that is there is not sent twice")

    def _refused(self, reason: str) -> NoReturn:
        who = f"{self.user} or the password" if self.user else "a push without a login"
        raise ValueError(
            f"{self.host} refuses {who} for {self.repository} ({reason}); run docker login {self.host}, or "
            f"set {USER} and {PASSWORD}"
        )

    def push_blob(self, file: Path, digest: str, progress: Callable[[int], object], before: int) -> None:
        """Uploads a file that the registry does not have; starts a lost upload again, TRIES times in all.

        `progress` receives `before` plus the number of this file's bytes that the registry has.
        """
        if self.call("HEAD", f"{self.url}/blobs/{digest}", (200, 404)).status_code == 200:
            progress(before + file.stat().st_size)
            return
        self._forget_token()
        if not any(self._upload(file, digest, progress, before) for _ in range(TRIES)):
            raise ValueError(f"{self.host} lost the upload of {digest} {TRIES} times; push again later")

    def _upload(self, file: Path, digest: str, progress: Callable[[int], object], before: int) -> bool:
        """Sends a file in one upload session; returns False if the registry no longer knows the session."""
        start, lost = f"{self.url}/blobs/uploads/", (400, 404, 416)
        response = self.call("POST", start, (202, 404))
        if response.status_code == 404:
            raise ValueError(f"{self.host} has no repository {self.repository}; create it, or check the name")
        location, sent = urljoin(start, response.headers["Location"]), 0
        headers = {"Content-Type": "application/octet-stream"}
        with file.open("rb") as f:
            while chunk := f.read(CHUNK):
                headers["Content-Range"] = f"{sent}-{sent + len(chunk) - 1}"
                response = self.call("PATCH", location, (202, 204, *lost), data=chunk, headers=headers)
                if response.status_code in lost:
                    return False
                location = urljoin(location, response.headers.get("Location", location))
                sent += len(chunk)
                progress(before + sent)
        mark = "&" if "?" in location else "?"
        return self.call("PUT", f"{location}{mark}digest={digest}", (201, 204, *lost)).status_code not in lost


def _reason(error: BaseException) -> str:
    """Returns the innermost cause of an exception of the library requests, as one line."""
    while error.args and isinstance(inner := getattr(error.args[0], "reason", error.args[0]), BaseException):
        error = inner
    return next(iter(str(error).splitlines()), type(error).__name__)


def _message(response: Any) -> str:
    """Returns the error messages in a registry's response, joined, or its HTTP reason."""
    try:
        return "; ".join(error.get("message") or error["code"] for error in response.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.reason or "no reason given"
