"""A GGUF file as an OCI artifact, the way `docker model package` writes one: docker model pull, run and push
take it from a registry.

An image layout is a folder: oci-layout, index.json, and blobs/sha256/ with the GGUF, perhaps a licence, a
config and the manifest that names them. Layout and manifest are opencontainers/image-spec's; media types,
config and annotations are docker/model-runner's (pkg/distribution: types/config.go, format/gguf.go,
builder/builder.go, internal/partial), its names for sizes gpustack/gguf-parser-go's (scalar.go).

Deviations:
1. Times are written in UTC, where model-runner writes the zone of the machine.
2. Where the header happens to end on a multiple of 32, the "size" of gguf-parser-go is 32 bytes short, as if
   another 32 followed; ours is not.
"""

import hashlib
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from common.files import sha256

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.docker.ai.model.config.v0.1+json"
GGUF = "application/vnd.docker.ai.gguf.v3"
LICENSE = "application/vnd.docker.ai.license"

LONGEST_ARRAY = 50  # elements; longer ones, the vocabulary above all, stay out of the config
# general.file_type; F32 is MOSTLY here and ALL in llama.cpp
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}
BYTE_UNITS = [
    (base, unit)
    for power in (5, 4, 3, 2, 1)
    for base, unit in ((1024**power, "KMGTP"[power - 1] + "iB"), (1000**power, "KMGTP"[power - 1] + "B"))
]
COUNT_UNITS = [(1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")]


def write_layout(
    gguf: Path,
    out: Path,
    *,
    metadata: dict,
    parameters: int,
    tensor_bytes: int,
    license: Path | None = None,
    created: datetime | None = None,
) -> str:
    """Writes the image layout of one GGUF file into the folder `out` and returns the manifest's digest,
    "sha256:...".

    metadata: {key: str, int, float, bool or list} of the file's header; parameters: its weights, counted;
    tensor_bytes: its length behind the header;
    license: a text file; created: the artifact's time (now). The GGUF becomes a hard link where the disk
    allows it, so it must not be written to in place afterwards, and is never held in memory. Raises
    ValueError for an adapter, or a file type that has no name.
    """
    if metadata.get("general.type") == "adapter":
        raise ValueError(
            f"{gguf} is an adapter, which an OCI model artifact has no layer for; merge it into its base and "
            f"export that"
        )
    described = describe(metadata, parameters, tensor_bytes)
    (out / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    layers = [_file_layer(gguf, GGUF, out)] + ([_file_layer(license, LICENSE, out)] if license else [])
    instant = created or datetime.now(UTC)
    config = {
        "config": described,
        "descriptor": {"created": _go_time(int(instant.timestamp()) * 10**9 + instant.microsecond * 1000)},
        "rootfs": {"type": "rootfs", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = _blob(
        _go_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": _blob(_go_json(config), CONFIG, out),
                "layers": layers,
            }
        ),
        MANIFEST,
        out,
    )
    (out / "oci-layout").write_bytes(_go_json({"imageLayoutVersion": "1.0.0"}))
    (out / "index.json").write_bytes(
        _go_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]})
    )
    return manifest["digest"]


def describe(metadata: dict, parameters: int, tensor_bytes: int) -> dict:
    """The "config" of the config JSON: format, quantization, parameters, architecture, size, gguf {key:
    text}, context_size, in model-runner's order.
    """
    kind, architecture = metadata.get("general.file_type"), metadata["general.architecture"]
    if kind not in FILE_TYPES:
        raise ValueError(
            f"general.file_type of the GGUF is {kind}; an OCI model artifact takes "
            f"{', '.join(FILE_TYPES.values())}: export one of these"
        )
    texts = {
        key: _go_text(value)
        for key, value in sorted(metadata.items())
        if not (isinstance(value, list) and len(value) > LONGEST_ARRAY)
    }
    described = {
        "format": "gguf",
        "quantization": f"MOSTLY_{FILE_TYPES[kind]}",
        "parameters": _scaled(parameters, COUNT_UNITS, ""),
        "architecture": architecture,
        "size": _scaled(tensor_bytes, BYTE_UNITS, "B"),
        "gguf": texts,
    }
    context = metadata.get(f"{architecture}.context_length")
    return described | ({"context_size": context} if context else {})


def _file_layer(file: Path, media_type: str, out: Path) -> dict:
    """The descriptor of a file that it puts among the blobs."""
    digest = sha256(file)
    blob, facts = out / "blobs" / "sha256" / digest, file.stat()
    if not blob.exists():
        try:
            os.link(file, blob)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(file, blob)
    about = {
        "name": file.name,
        "mode": facts.st_mode & 0o777,
        "uid": 0,
        "gid": 0,
        "size": facts.st_size,
        "mtime": _go_time(facts.st_mtime_ns),
        "typeflag": 0,
    }
    return {
        "mediaType": media_type,
        "size": facts.st_size,
        "digest": f"sha256:{digest}",
        "annotations": {
            "org.cncf.model.file.mediatype.untested": "false",
            "org.cncf.model.file.metadata+json": _go_json(about).decode(),
            "org.cncf.model.filepath": file.name,
        },
    }


def _blob(content: bytes, media_type: str, out: Path) -> dict:
    digest = hashlib.sha256(content).hexdigest()
    (out / "blobs" / "sha256" / digest).write_bytes(content)
    return {"mediaType": media_type, "size": len(content), "digest": f"sha256:{digest}"}


def _go_json(value) -> bytes:
    """JSON as Go's encoding/json writes it: no spaces, and what HTML or JavaScript would trip over as \\u
    escapes.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # these stand inside strings only
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


def _go_text(value) -> str:
    """%d, %t, %f or %s of Go's fmt by the value's type; the elements of a list behind one another, with
    commas.
    """
    if isinstance(value, list):
        return ", ".join(map(_go_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:f}" if isinstance(value, float) else str(value)


def _go_time(nanoseconds: int) -> str:
    """Unix time -> RFC 3339 in UTC with as many decimals as it needs: 2026-01-02T03:04:05.5Z."""
    seconds, rest = divmod(nanoseconds, 10**9)
    decimals = f".{rest:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{decimals}Z"


def _scaled(value: int, units: list, smallest: str) -> str:
    """4_201_000 -> "4.20M": two decimals, none where both are zero; the largest unit that fits, binary before
    decimal.
    """
    base, unit = next(((base, unit) for base, unit in units if value >= base), (1, smallest))
    return f"{value / base:.2f}".removesuffix(".00") + unit
