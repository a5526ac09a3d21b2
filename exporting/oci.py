"""Writes a GGUF file as an OCI artifact, which Docker Model Runner can pull and run.

The artifact is a folder, an OCI image layout: oci-layout, index.json and blobs/sha256/. The blobs are the
GGUF file, a licence if one is given, a config, and a manifest that lists the other blobs. Sources:
opencontainers/image-spec for layout and manifest; docker/model-runner for media types, config and annotations
(pkg/distribution: types/config.go, format/gguf.go, builder/builder.go, internal/partial);
gpustack/gguf-parser-go (scalar.go) for sizes as text.

Deviations:
1. Times are in UTC. model-runner writes local time.
2. "size" is exact; gguf-parser-go's is 32 bytes too small if the header ends at a multiple of 32.
"""

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import sha256
from common.progress import bar
from exporting.gguf_model import export_gguf
from exporting.registry import parse_reference, push
from exporting.source import Source
from exporting.target import link_or_copy
from ggml.container import GGUFFile
from model.config import read_config

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.docker.ai.model.config.v0.1+json"
GGUF = "application/vnd.docker.ai.gguf.v3"
LICENSE = "application/vnd.docker.ai.license"

LONGEST_ARRAY = 50  # The config leaves out longer arrays, above all the vocabulary.
# The names of general.file_type. llama.cpp calls its F32 "all", and model-runner "mostly", as the others.
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K"}
FILE_TYPES |= {11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S"}
FILE_TYPES |= {17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}
# Units from large to small; of each size, the binary unit comes before the decimal one.
BYTE_UNITS = [
    unit
    for power, prefix in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K"))
    for unit in ((1024**power, f"{prefix}iB"), (1000**power, f"{prefix}B"))
]
COUNT_UNITS = [(10**15, "Q"), (10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")]


def export_layout(
    source: Source, out: Path, name: str, quant: str, verified_by: str | None, context_size: int | None
) -> str:
    """Writes the merged model as an OCI image layout to the new folder `out`; takes export_gguf's arguments.

    Returns a summary with the manifest's digest. Raises ValueError if `context_size`, the tokens of a
    conversation for which Docker Model Runner reserves memory, exceeds the model's positions.
    """
    positions = read_config(source.folder).max_position_embeddings
    if context_size and context_size > positions:
        raise ValueError(f"--context-size {context_size}: the model has {positions} positions; give no more")
    out.mkdir()
    gguf = out / "model.gguf"
    summary = export_gguf(source, gguf, name, quant, verified_by)
    file = GGUFFile(gguf)
    parameters, size = sum(math.prod(t.shape) for t in file.tensors.values()), file.size - file.data_start
    digest = write_layout(
        gguf,
        out,
        metadata=file.metadata,
        parameters=parameters,
        tensor_bytes=size,
        context_size=context_size,
    )
    gguf.unlink()  # The layout has it under its digest.
    return f"{summary}, digest {digest}"


def push_artifact(
    source: Source,
    scratch: Path,
    reference: str,
    quant: str,
    verified_by: str | None,
    context_size: int | None,
) -> str:
    """Writes the OCI image layout to `scratch`, pushes it to "registry/name:tag", and returns a summary."""
    _, repository, _ = parse_reference(reference)
    layout = scratch / "layout"
    summary = export_layout(source, layout, Path(repository).name, quant, verified_by, context_size)
    size = sum(blob.stat().st_size for blob in (layout / "blobs" / "sha256").iterdir())
    with bar(size, "pushing", "B") as progress:
        push(layout, reference, progress=lambda sent: progress.update(sent - progress.n))
    return summary


def write_layout(
    gguf: Path,
    out: Path,
    *,
    metadata: dict[str, Any],
    parameters: int,
    tensor_bytes: int,
    context_size: int | None = None,
    license: Path | None = None,
    created: datetime | None = None,
) -> str:
    """Writes the OCI image layout of a GGUF file to the folder `out`, and returns the manifest's digest.

    The blob is a hard link to the GGUF file where the disk allows it, so do not change the file afterwards.

    Args:
        metadata: {key: value} of the GGUF file's header.
        parameters: the number of the model's parameters.
        tensor_bytes: the size of the file without its header, in bytes.
        context_size: the tokens for which the model is started; None takes the model's largest number.
        license: the path of a text file, or None.
        created: the creation time to store; None stores the current time.

    Raises ValueError if the file is a LoRA adapter, or its general.file_type is not in FILE_TYPES.
    """
    if metadata.get("general.type") == "adapter":
        remedy = "merge it into its base and export that"
        raise ValueError(f"{gguf} is an adapter, for which an OCI model artifact has no layer; {remedy}")
    described = describe(metadata, parameters, tensor_bytes, context_size)
    (out / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    layers = [_file_layer(gguf, GGUF, out)] + ([_file_layer(license, LICENSE, out)] if license else [])
    instant = created or datetime.now(UTC)
    config = {
        "config": described,
        "descriptor": {"created": _go_time(int(instant.timestamp()) * 10**9 + instant.microsecond * 1000)},
        "rootfs": {"type": "rootfs", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": _blob(_go_json(config), CONFIG, out)}
    described_manifest = _blob(_go_json(manifest | {"layers": layers}), MANIFEST, out)
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [described_manifest]}
    (out / "oci-layout").write_bytes(_go_json({"imageLayoutVersion": "1.0.0"}))
    (out / "index.json").write_bytes(_go_json(index))
    return described_manifest["digest"]


def describe(
    metadata: dict[str, Any], parameters: int, tensor_bytes: int, context_size: int | None
) -> dict[str, Any]:
    """Returns the object "config" of the artifact's config JSON, with its keys in model-runner's order.

    model-runner hands context_size to llama.cpp's --ctx-size (pkg/inference/backends/llamacpp).
    """
    kind, architecture = metadata.get("general.file_type"), metadata["general.architecture"]
    if kind not in FILE_TYPES:
        names = ", ".join(FILE_TYPES.values())
        raise ValueError(f"general.file_type of the GGUF is {kind}, which has no name; export one of {names}")
    short = {k: v for k, v in metadata.items() if not (isinstance(v, list) and len(v) > LONGEST_ARRAY)}
    described = {
        "format": "gguf",
        "quantization": f"MOSTLY_{FILE_TYPES[kind]}",
        "parameters": _scaled(parameters, COUNT_UNITS, ""),
        "architecture": architecture,
        "size": _scaled(tensor_bytes, BYTE_UNITS, "B"),
        "gguf": {key: _go_text(value) for key, value in sorted(short.items())},
    }
    context = context_size or metadata.get(f"{architecture}.context_length")
    return described | ({"context_size": context} if context else {})


def _file_layer(file: Path, media_type: str, out: Path) -> dict[str, Any]:
    """Adds a file to blobs/sha256/ and returns its OCI descriptor: media type, size, digest, annotations."""
    digest = sha256(file)
    blob, stat = out / "blobs" / "sha256" / digest, file.stat()
    if not blob.exists():
        link_or_copy(file, blob)
    tar_header = {"name": file.name, "mode": stat.st_mode & 0o777, "uid": 0, "gid": 0, "size": stat.st_size}
    tar_header |= {"mtime": _go_time(stat.st_mtime_ns), "typeflag": 0}
    annotations = {
        "org.cncf.model.file.mediatype.untested": "false",
        "org.cncf.model.file.metadata+json": _go_json(tar_header).decode(),
        "org.cncf.model.filepath": file.name,
    }
    return _descriptor(media_type, stat.st_size, digest) | {"annotations": annotations}


def _blob(content: bytes, media_type: str, out: Path) -> dict[str, Any]:
    """Writes `content` to blobs/sha256/ and returns its OCI descriptor: media type, size and digest."""
    digest = hashlib.sha256(content).hexdigest()
    (out / "blobs" / "sha256" / digest).write_bytes(content)
    return _descriptor(media_type, len(content), digest)


def _descriptor(media_type: str, size: int, digest: str) -> dict[str, Any]:
    return {"mediaType": media_type, "size": size, "digest": f"sha256:{digest}"}


def _go_json(value: Any) -> bytes:
    r"""Returns JSON as Go's encoding/json writes it: no spaces, and < > & U+2028 U+2029 as \u escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # These occur inside strings only.
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


def _go_text(value: Any) -> str:
    """Returns a value as Go's fmt prints it: six decimals for a float, ", " between the items of a list."""
    if isinstance(value, list):
        return ", ".join(map(_go_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:f}" if isinstance(value, float) else str(value)


def _go_time(nanoseconds: int) -> str:
    """Returns a Unix time in RFC 3339 and UTC, without trailing zeros, such as 2026-01-02T03:04:05.5Z."""
    seconds, rest = divmod(nanoseconds, 10**9)
    decimals = f".{rest:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{decimals}Z"


def _scaled(value: int, units: list[tuple[int, str]], smallest: str) -> str:
    """Returns `value` in the first of `units` that it reaches: 4_201_000 -> "4.20M", 4_000_000 -> "4M"."""
    base, unit = next(((base, unit) for base, unit in units if value >= base), (1, smallest))
    return f"{value / base:.2f}".removesuffix(".00") + unit
