"""User and password for a registry, from where `docker login` leaves them or from the environment.

Source: docker/cli, cli/config/configfile/file.go (which store holds for a host) and docker/docker-credential-helpers (what a helper is asked).
"""

import base64
import binascii
import json
import os
import subprocess
from pathlib import Path

USER, PASSWORD = "LOUPE_REGISTRY_USER", "LOUPE_REGISTRY_PASSWORD"
DOCKER_HUB = "https://index.docker.io/v1/"  # what docker login files Docker Hub under


def find_credentials(host: str) -> tuple[str, str] | None:
    """(user, password) for a registry's host[:port], or None where nobody has logged in there.

    The environment goes first, then docker's config.json: a helper for this host, the helper for all, the file itself.  Raises ValueError for
    half a pair, and for a config or a helper that is broken.
    """
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        return user, password
    if user or password:
        raise ValueError(f"only {USER if user else PASSWORD} is set; set {USER} and {PASSWORD}, or neither")
    key = DOCKER_HUB if host == "registry-1.docker.io" else host
    file = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    config = _read(file)
    helper = config.get("credHelpers", {}).get(key) or config.get("credsStore")
    return _ask(helper, key, file) if helper else _stored(config.get("auths", {}), key, file)


def _read(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{file} cannot be read as JSON ({e}); repair it, or set {USER} and {PASSWORD}"
        ) from None
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key, {}), dict) for key in ("auths", "credHelpers")
    ):
        raise ValueError(f"{file} is no docker config; repair it, or set {USER} and {PASSWORD}")
    return config


def _stored(auths: dict, key: str, file: Path) -> tuple[str, str] | None:
    """The entry of "auths" whose key is the host, with or without scheme and path."""
    entry = next((entry for name, entry in auths.items() if _host(name) == _host(key)), None) or {}
    if entry.get("identitytoken"):
        raise ValueError(
            f"{file} holds an identity token for {_host(key)}, which Loupe cannot use; set {USER} and {PASSWORD}"
        )
    if entry.get("username") and entry.get("password"):
        return entry["username"], entry["password"]
    if not entry.get("auth"):
        return None
    try:
        user, colon, password = (
            base64.b64decode(entry["auth"], validate=True).decode().rstrip("\0").partition(":")
        )
    except (binascii.Error, UnicodeDecodeError, TypeError):
        colon = ""
    if not colon:
        raise ValueError(
            f'{file}: "auth" of {_host(key)} is not base64 of user:password; run docker login {_host(key)} again'
        )
    return user, password


def _host(name: str) -> str:
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _ask(helper: str, key: str, file: Path) -> tuple[str, str] | None:
    """Runs docker-credential-<helper> get, which reads the key and answers {"Username", "Secret"}."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, "get"], input=key, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ValueError(
            f"{file} names {program}, which does not run ({type(e).__name__}); install it, or set {USER} and {PASSWORD}"
        ) from None
    if done.returncode and "credentials not found" in done.stdout:
        return None
    try:
        answer = json.loads(done.stdout)
        pair = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError):  # its output may hold a secret: it is not repeated here
        raise ValueError(
            f"{program} gave no credentials for {key} (exit code {done.returncode}); run docker login {_host(key)}, "
            f"or set {USER} and {PASSWORD}"
        ) from None
    if pair[0] == "<token>":
        raise ValueError(
            f"{program} holds an identity token for {_host(key)}, which Loupe cannot use; set {USER} and {PASSWORD}"
        )
    return pair
