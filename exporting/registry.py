"""Pushes an OCI image layout to a registry: each blob in chunks that survive a broken connection, then the manifest under its tag.

Source: opencontainers/distribution-spec, spec.md ("Pushing a blob in chunks").

    HEAD blob -> there: done.   POST uploads -> Location.   PATCH Location ... -> next Location.   PUT Location?digest=.   PUT manifests/tag.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin

from exporting.registry_client import DOCKER_HUB, Client, Interrupted

CHUNK = 8 * 2**20  # bytes of one PATCH, all of a blob that is in memory at a time
TRIES = 6  # failures in a row, with no byte gained, before giving up
BACK_OFF = 0.5  # seconds after the first failure, doubled after each
REDIRECTS = (301, 302, 303, 307, 308)
SESSION_GONE = (
    400,
    404,
    416,
)  # what registries say of an upload that they have lost, or whose bytes are not ours

NAME = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
REFERENCE = re.compile(
    rf"(?:(?P<host>localhost(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+(?::\d+)?|[A-Za-z0-9-]+:\d+)/)?"
    rf"(?P<repository>{NAME}(?:/{NAME})*)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?"
)


@dataclass
class Upload:
    """How far a blob is: the session's newest URL, bytes there, the most that ever were, and failures since then."""

    digest: str
    size: int
    report: Callable[[int], None]
    location: str | None = None
    offset: int = 0
    best: int = 0
    failures: int = 0


def push(layout: Path, reference: str, *, progress: Callable[[int], None] | None = None) -> str:
    """Pushes the layout that write_layout wrote to "registry/name:tag" ("user/name:tag" is Docker Hub's) and returns its manifest's digest.

    progress is called with how many bytes of the layout's blobs the registry has; the number falls where a blob has to start again.
    Raises ValueError, in one line and with the remedy, for a bad reference, a host out of reach, a refused password or permission, and a
    connection that keeps breaking.
    """
    host, repository, tag = parse_reference(reference)
    if not (layout / "index.json").is_file():
        raise ValueError(
            f"{layout} is no OCI image layout: it has no index.json; give the folder that the export wrote"
        )
    digest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    manifest = _blob(layout, digest).read_bytes()
    described = json.loads(manifest)
    registry, done = Registry(host, repository), 0
    for blob in [*described["layers"], described["config"]]:
        registry.push_blob(
            _blob(layout, blob["digest"]),
            blob["digest"],
            lambda sent, before=done: progress(before + sent) if progress else None,
        )
        done += blob["size"]
    registry.push_manifest(manifest, described["mediaType"], tag)
    return digest


def parse_reference(reference: str) -> tuple[str, str, str]:
    """ "registry/name:tag" -> (host[:port], repository, tag), by docker's rule: a first part with a dot, a colon, or "localhost" is a host."""
    match = REFERENCE.fullmatch(reference)
    if not match:
        hint = (
            "without https://"
            if "://" in reference
            else "without a digest"
            if "@" in reference
            else "lower case but for the tag"
        )
        raise ValueError(
            f"{reference!r} is no place in a registry; give registry/name:tag, such as localhost:5000/gemma:v1, {hint}"
        )
    host, repository, tag = match["host"], match["repository"], match["tag"]
    if not tag:
        raise ValueError(
            f"{reference!r} has no tag; add one, such as {reference}:latest (a folder of that name is ./{reference})"
        )
    if host in (None, "docker.io", "index.docker.io", DOCKER_HUB):
        if "/" not in repository:
            raise ValueError(
                f"{reference!r} has neither a registry nor a user; give user/{reference} for Docker Hub, or registry/{reference}"
            )
        host = DOCKER_HUB
    return host, repository, tag


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / Path(*digest.split(":"))


class Registry(Client):
    """The pushing."""

    def push_blob(self, file: Path, digest: str, report: Callable[[int], None]) -> None:
        """Uploads one file unless the registry has it; goes on where it was, or starts it again, after a failure."""
        upload = Upload(digest, file.stat().st_size, report)
        with file.open("rb") as f:
            while True:
                try:
                    return self._send_blob(f, upload)
                except Interrupted as e:
                    upload.failures += 1
                    self._pause(
                        upload.failures, f"the upload broke off at byte {upload.best} of {upload.size}: {e}"
                    )

    def push_manifest(self, manifest: bytes, media_type: str, tag: str) -> None:
        for failures in range(1, TRIES + 1):
            try:
                self.call("PUT", f"{self.url}/manifests/{tag}", manifest, media_type, expect=(201,))
                return
            except Interrupted as e:
                self._pause(failures, str(e))

    def _pause(self, failures: int, what: str) -> None:
        if failures >= TRIES:
            raise ValueError(
                f"{self.host}: {what} ({failures} times in a row); push again when the connection holds: what is there is not sent twice"
            )
        time.sleep(BACK_OFF * 2 ** (failures - 1))

    def _send_blob(self, f, upload: Upload) -> None:
        """From where the upload is to its end; raises Interrupted on the way."""
        if upload.location:
            self._resume(upload)
        if not upload.location:
            if self._has_blob(
                upload.digest
            ):  # from an earlier push, or the last PUT came through and its answer did not
                return upload.report(upload.size)
            upload.location, upload.offset = self._open_session(), 0
        while upload.offset < upload.size:
            f.seek(upload.offset)
            self._send_chunk(upload, f.read(CHUNK))
            upload.report(upload.offset)
        mark = "&" if "?" in upload.location else "?"
        end, upload.location = (
            f"{upload.location}{mark}digest={quote(upload.digest, safe='')}",
            None,
        )  # refused or not, the session ends here
        self.call("PUT", end, b"", expect=(201, 204), again=SESSION_GONE)

    def _has_blob(self, digest: str) -> bool:
        """A redirect, which Docker Hub answers, goes to where the blob lies; it is not followed."""
        return self.call("HEAD", f"{self.url}/blobs/{digest}", expect=(200, *REDIRECTS, 404)).status != 404

    def _open_session(self) -> str:
        url = f"{self.url}/blobs/uploads/"
        answer = self.call("POST", url, b"", expect=(202, 404))
        if answer.status == 404:
            raise ValueError(
                f"{self.host} has no repository {self.repository}, or does not show it to {self.user or 'you'}; create it, or check the name"
            )
        return urljoin(url, answer.headers["Location"])

    def _send_chunk(self, upload: Upload, chunk: bytes) -> None:
        """One PATCH; the session's next URL is in its answer, and nowhere else."""
        url, upload.location, there = upload.location, None, upload.offset + len(chunk)
        try:
            answer = self.call(
                "PATCH",
                url,
                chunk,
                content_range=f"{upload.offset}-{there - 1}",
                expect=(202, 204),
                again=SESSION_GONE,
            )
        except Interrupted:
            upload.location = url  # the session may live; _resume asks
            raise
        if answer.received() not in (None, there) and there > 1:
            raise Interrupted(f"the registry has {answer.received()} bytes after {there} were sent")
        upload.location, upload.offset = urljoin(url, answer.headers.get("Location", url)), there
        if there > upload.best:
            upload.best, upload.failures = there, 0

    def _resume(self, upload: Upload) -> None:
        """Asks the session how much it has.  Goes on behind that if it is what we had sent, or a part of the broken chunk more; else forgets the session."""
        answer = self.call("GET", upload.location, expect=(200, 204, *SESSION_GONE, 405))
        there = answer.received() if answer.status < 300 else None
        if there is not None and upload.offset <= there <= min(upload.offset + CHUNK, upload.size):
            upload.location, upload.offset = (
                urljoin(upload.location, answer.headers.get("Location", upload.location)),
                there,
            )
        else:
            upload.location = None
