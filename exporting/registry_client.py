"""One repository of a registry over HTTP: requests that log in where they are asked to, and errors in one line.

Source: opencontainers/distribution-spec, spec.md; distribution/distribution, docs/spec/auth/token.md (Bearer).  The standard library's urllib, no more.
"""

import base64
import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from exporting.credentials import PASSWORD, USER, find_credentials

TIMEOUT = 300  # seconds of silence; a registry hashes a large blob before it answers the last PUT
DOCKER_HUB = "registry-1.docker.io"
CHALLENGE = re.compile(r'(\w+)\s+((?:[\w-]+=(?:"[^"]*"|[^\s,"]+)\s*,?\s*)+)')
PARAMETER = re.compile(r'([\w-]+)=(?:"([^"]*)"|([^\s,"]+))')


class Interrupted(Exception):
    """A request that another try may mend: the connection broke, the server was busy, or the upload's session is gone."""


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def received(self) -> int | None:
        """How many bytes an upload has, by its Range: 0-N; None where it does not say.  0-0 is an empty one to some and one byte to others: 0 here."""
        match = re.fullmatch(r"(?:bytes[= ])?0-(\d+)", self.headers.get("Range") or "")
        return match and (int(match[1]) + 1 if match[1] != "0" else 0)


class Client:
    """What speaks with one repository: http for this machine, https for all others."""

    def __init__(self, host: str, repository: str):
        self.host, self.repository = host, repository
        self.local = _is_loopback(host)
        self.base = f"{'http' if self.local else 'https'}://{host}"
        self.url = f"{self.base}/v2/{repository}"
        self.authorization: str | None = None
        self.user: str | None = None
        self.reached = False
        # without a handler for them redirects come back as answers; what is local must not go through a proxy
        handlers = [_NoRedirect()] + ([urllib.request.ProxyHandler({})] if self.local else [])
        self.opener = urllib.request.build_opener(*handlers)

    def call(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        content_type: str = "application/octet-stream",
        *,
        expect: tuple[int, ...],
        again: tuple[int, ...] = (),
        content_range: str | None = None,
    ) -> Answer:
        """A request, with a login where the registry asks for one.  Raises Interrupted for a broken line, a busy server or a status in `again`,
        ValueError for any other status that is not in `expect`."""
        headers = {"Content-Type": content_type} if body is not None else {}
        headers |= {"Content-Range": content_range} if content_range else {}
        ours = _origin(url) == _origin(self.base)  # an upload may go to another host, a login may not
        answer = self._request(method, url, body, headers | self._proof(ours))
        if answer.status == 401 and ours:
            self._log_in(answer)
            answer = self._request(method, url, body, headers | self._proof(ours))
        if answer.status in expect:
            return answer
        said = f"{answer.status} {_message(answer.body)}".strip()
        if answer.status >= 500 or answer.status in (408, 429, *again):
            raise Interrupted(f"{self.host} answered {said}")
        if answer.status == 401 and ours and self.authorization and self.authorization.startswith("Basic"):
            raise ValueError(f"{self.host} refuses user {self.user} with this password; {self._remedy()}")
        if answer.status in (401, 403):
            raise ValueError(
                f"{self.host} does not let {self.user or 'someone without a login'} push to {self.repository} ({said}); take a repository that is "
                f"yours, or {self._remedy()}"
            )
        raise ValueError(
            f"{self.host} answered {method} {urlsplit(url).path} with {said}, which no push expects; check that this is a registry's address"
        )

    def _request(self, method: str, url: str, body: bytes | None, headers: dict) -> Answer:
        if _origin(url)[0] not in ("http", "https"):  # urllib would open a file: too
            raise ValueError(
                f"{self.host} points to {url[:100]!r}, which is no web address; check that it is a registry"
            )
        request = urllib.request.Request(
            url, data=body, headers={"User-Agent": "loupe"} | headers, method=method
        )
        try:
            try:
                response = self.opener.open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as e:
                response = e
            with response:
                answer = Answer(response.status, response.headers, response.read(2**20))
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", None) or e
            if not self.reached:
                raise ValueError(
                    f"{urlsplit(url).netloc} is out of reach ({reason}); check the name, the connection and proxies (only localhost goes "
                    "without https)"
                ) from e
            raise Interrupted(str(reason) or type(reason).__name__) from e
        self.reached = True
        return answer

    # logging in

    def _proof(self, ours: bool) -> dict:
        return {"Authorization": self.authorization} if ours and self.authorization else {}

    def _log_in(self, refusal: Answer) -> None:
        """Takes up the challenge of a 401: Bearer before Basic."""
        challenges = {
            scheme.lower(): {key: quoted or plain for key, quoted, plain in PARAMETER.findall(rest)}
            for header in refusal.headers.get_all("WWW-Authenticate", [])
            for scheme, rest in CHALLENGE.findall(header)
        }
        login = find_credentials(self.host)
        self.user = login and login[0]
        basic = login and "Basic " + base64.b64encode(":".join(login).encode()).decode()
        if "bearer" in challenges:
            self.authorization = f"Bearer {self._token(challenges['bearer'], basic)}"
        elif "basic" in challenges and basic:
            self.authorization = basic
        elif "basic" in challenges:
            raise ValueError(f"{self.host} asks for a password and there is none; {self._remedy()}")
        else:
            raise ValueError(
                f"{self.host} asks for a login other than Basic or Bearer, which Loupe does not know; use skopeo copy oci:FOLDER docker://..."
            )

    def _token(self, challenge: dict, basic: str | None) -> str:
        """Asks the realm for the right to push; the password goes there, so it has to be https, or this machine."""
        realm = challenge.get("realm", "")
        if _origin(realm)[0] != "https" and not (self.local and _is_loopback(urlsplit(realm).netloc)):
            raise ValueError(
                f"{self.host} sends logins to {realm!r}, which is not https; no password was sent"
            )
        query = {"service": challenge["service"]} if "service" in challenge else {}
        query["scope"] = f"repository:{self.repository}:pull,push"
        answer = self._request(
            "GET",
            f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}",
            None,
            {"Authorization": basic} if basic else {},
        )
        if answer.status in (400, 401, 403):
            who = (
                f"refuses user {self.user} with this password"
                if basic
                else "asks for a password and there is none"
            )
            raise ValueError(f"{self.host} {who}; {self._remedy()}")
        if answer.status >= 500 or answer.status == 429:
            raise Interrupted(f"{urlsplit(realm).netloc} answered {answer.status}")
        try:
            found = json.loads(answer.body)
            return found.get("token") or found["access_token"]
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{urlsplit(realm).netloc} answered {answer.status} without a token; check that {self.host} is a registry's address"
            ) from None

    def _remedy(self) -> str:
        name = "" if self.host == DOCKER_HUB else f" {self.host}"
        return f"run docker login{name}, or set {USER} and {PASSWORD}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects come back as answers: nothing of ours goes where a third host points."""

    def redirect_request(self, *_):
        return None


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _origin(url: str) -> tuple:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _message(body: bytes) -> str:
    """The first message of a registry's error body, on one line; "" where there is none."""
    try:
        error = json.loads(body)["errors"][0]
        return " ".join(str(error.get("message") or error.get("code", "")).split())[:200]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ""
