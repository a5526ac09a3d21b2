"""A model folder's safetensors, in and out: every tensor is checked by name and shape before the first is
read, and none waits for another in memory.

A folder holds model.safetensors, or shards with model.safetensors.index.json = {"metadata": {"total_size":
bytes}, "weight_map": {name: shard}}. A safetensors file: 8 bytes, the header's length (little endian); the
header, JSON of {name: {"dtype", "shape", "data_offsets"}}; the tensors' bytes.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.errors import listed
from common.files import write_together
from model.config import Gemma3Config, read_config
from model.gemma3 import Gemma3ForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.",
)  # the multimodal wrapper's, new and old, and the text model's
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64  # The alignment of a tensor in memory, in bytes: one cache line.
HASH_WHOLE, HASH_BLOCK, HASH_BLOCKS = 2**30, 2**20, 64  # bytes, bytes, blocks a file


def load_model(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Gemma3ForCausalLM:
    """Builds the model that `folder` holds, cast to `dtype`, with one copy of the weights in memory and,
    where they are cast or moved, one tensor in passing.

    Raises ValueError that lists every missing, unexpected or misshapen tensor (the first 20, then a count),
    or names the file that is broken.
    """
    return Checkpoint(folder).load(dtype, torch.device(device))


def _places(shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device):
    """An empty tensor for each name.

    On a CPU they lie in one block of numpy's, which asks Linux for huge pages: a model loads in half the
    time.
    """
    if device.type != "cpu":
        yield from ((name, torch.empty(shape, dtype=dtype, device=device)) for name, shape in shapes.items())
        return
    sizes = {name: -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED for name, shape in shapes.items()}
    block = torch.from_numpy(np.empty(sum(sizes.values()) + ALIGNED, np.uint8))
    start = -block.data_ptr() % ALIGNED
    for name, shape in shapes.items():
        yield name, block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        start += sizes[name]


class Checkpoint:
    """A folder's tensors, found to fit its config.json and read one at a time: `config`, `model` (shapes
    without numbers), `names` as the files order them.
    """

    def __init__(self, folder: str | Path):
        """Raises ValueError as load_model does, before a tensor is read."""
        folder = Path(folder)
        self.config = read_config(folder)
        with torch.device("meta"):
            self.model = Gemma3ForCausalLM(self.config)
        self._found, problems = _find_tensors(folder, self.config)
        problems += _compare(self.model, self._found, self.config)
        if problems:
            head = f"{folder}: the weights do not fit config.json:"
            raise ValueError(listed(head, problems, "download the model again, or correct config.json"))
        self.names = list(self._found)

    def load(self, dtype: torch.dtype, device: torch.device) -> Gemma3ForCausalLM:
        """`model` with its weights, cast to `dtype`."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, place in _places(shapes, dtype, device):
            module, _, leaf = name.rpartition(".")
            self.read_into(name, place)
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(place))
        return self.model

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, a view of the mapped file."""
        return _read(*self._found[name][:2])

    def read_into(self, name: str, place: torch.Tensor) -> None:
        """Fills `place`, which has the tensor's shape: with the file's own bytes where it has the type, for a
        mapped file costs the time again in page faults."""
        file, stored, _, dtype, start = self._found[name]
        if place.device.type != "cpu" or FLOATS.get(place.dtype) != dtype:
            # Copied: a view of the mapped file would crash with SIGBUS once somebody truncates it.
            place.copy_(self.read(name))
            return
        left = memoryview(place.view(-1).view(torch.uint8).numpy())
        with open(file, "rb", buffering=0) as f:
            f.seek(start)
            while left:
                count = f.readinto(left)
                if not count:
                    raise ValueError(f"{file}: ends in the middle of {stored}; download it again")
                left = left[count:]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of a matrix, as they are stored; no other page of the file is touched."""
        file, stored = self._found[name][:2]
        with _open(file) as f:
            return f.get_slice(stored)[start:stop]


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order; raises ValueError where there are none,
    or a shard is missing.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():  # looked for first, as transformers does
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix))
    if pickles:
        raise ValueError(
            f"{folder}: holds {pickles[0]} but no {SINGLE}; a pickle can run any code when it is opened, so "
            f"Loupe does not. Convert it where you "
            "trust it: transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors"
        )
    raise ValueError(
        f"{folder}: holds neither {SINGLE} nor {INDEX}; a model folder holds config.json, tokenizer.json and "
        f"*.safetensors"
    )


def _shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = list(dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path}: not an index of shards ({type(e).__name__}: {e}); download the model again"
        ) from None
    strange = [
        n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")
    ]
    if strange:
        raise ValueError(
            f"{path}: {strange[0]!r} is not the name of a safetensors file in this folder; download the "
            f"model again"
        )
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            listed(
                f"{folder}: {len(missing)} of {len(names)} shards are missing:",
                missing,
                "download the model again",
            )
        )
    return [folder / n for n in names]


def _find_tensors(folder: Path, cfg: Gemma3Config) -> tuple[dict, list[str]]:
    """{our name: (file, name in the file, shape, dtype, first byte)} of the text model's tensors, and what is
    wrong with the list itself.
    """
    found, problems = {}, []
    for file in weight_files(folder):
        with _open(file) as f:
            first_bytes = _first_bytes(file)
            for stored in f.offset_keys():
                name = _text_name(stored)
                if name is None or (name == "lm_head.weight" and cfg.tie_word_embeddings):
                    continue  # vision, or a second copy of the embedding
                if name in found:
                    problems.append(
                        f"twice: {name}, as {found[name][1]} in {found[name][0].name} and as {stored} in "
                        f"{file.name}"
                    )
                piece = f.get_slice(stored)
                found[name] = (file, stored, tuple(piece.get_shape()), piece.get_dtype(), first_bytes[stored])
    return found, problems


def _text_name(stored: str) -> str | None:
    """The name in Gemma3ForCausalLM of a tensor that may lie inside the multimodal wrapper; None for a tensor
    of the vision part.
    """
    if NOT_TEXT.match(stored):
        return None
    if stored == "language_model.lm_head.weight":
        return "lm_head.weight"
    for prefix in PREFIXES:
        if stored.startswith(prefix):
            return "model." + stored[len(prefix) :]
    return stored


def _compare(model: nn.Module, found: dict, cfg: Gemma3Config) -> list[str]:
    """One line for each tensor that is missing, unexpected, misshapen, or not stored as plain floating-point
    numbers.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [
        f"unexpected: {stored} {shape}"
        for name, (_, stored, shape, *_) in found.items()
        if name not in wanted
    ]
    for name in (n for n in wanted if n in found):
        _, stored, shape, dtype, _ = found[name]
        if name == "model.embed_tokens.weight" and shape[0] != cfg.vocab_size:
            problems.append(
                f"misshapen: {stored} has {shape[0]} rows, but config.json's vocab_size is {cfg.vocab_size}"
            )
        elif shape != wanted[name]:
            problems.append(f"misshapen: {stored} is {shape}, but config.json makes it {wanted[name]}")
        elif dtype not in FLOATS.values():
            problems.append(
                f"quantised: {stored} is stored as {dtype}; Loupe reads {', '.join(FLOATS.values())}: take "
                f"the unquantised model"
            )
    return problems


def _open(file: Path):
    """safe_open with the file's name in its errors."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{file}: not a whole safetensors file ({e}); download it again") from None


def _read(file: Path, stored: str) -> torch.Tensor:
    # Opened anew for each tensor: while a mapping lives, the pages that were read through it count as this
    # process's memory.
    with _open(file) as f:
        return f.get_tensor(stored)


def _first_bytes(file: Path) -> dict[str, int]:
    """Where a safetensors file has each tensor's first byte."""
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return {
            name: 8 + length + entry["data_offsets"][0]
            for name, entry in json.loads(f.read(length)).items()
            if name != "__metadata__"
        }


def save_model(
    model: Gemma3ForCausalLM,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and the weights, cast to `dtype`, in shards of at most `shard_bytes` (a larger
    tensor has its own), over what was there.

    No file changes before all of them are on the disk: a save that fails leaves the old model. The tied head
    is not written.
    """
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        assert parameters.keys() == dict(Gemma3ForCausalLM(model.config).named_parameters()).keys(), (
            "merge the adapters first"
        )
    save_tensors(model.config, lambda name: [parameters[name].detach()], folder, dtype, shard_bytes)


def save_tensors(
    config: Gemma3Config,
    read,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """What save_model does, for tensors that come one at a time: read(name) gives a tensor in pieces, which
    are its rows in order.
    """
    with torch.device("meta"):
        parameters = dict(Gemma3ForCausalLM(config).named_parameters())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _cut(parameters, dtype, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    files = {
        name: _tensor_file(shard, read, dtype) for name, shard in zip(names, shards, strict=True)
    }  # generators: nothing is cast yet
    if len(shards) > 1:
        size = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        files[INDEX] = _json_file({"metadata": {"total_size": size}, "weight_map": weight_map})
    files["config.json"] = _json_file(config.to_json() | {"dtype": str(dtype).removeprefix("torch.")})
    write_together(folder, files)
    for old in folder.glob("model*.safetensors*"):  # of a save with other shards: a reader would mix the two
        if old.name not in files:
            old.unlink()


def _cut(parameters: dict, dtype: torch.dtype, limit: int) -> list[dict]:
    """The parameters in order, cut into dicts of at most `limit` bytes, but at least one tensor."""
    shards, size = [{}], 0
    for name, p in parameters.items():
        bytes_ = p.numel() * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][name] = p
        size += bytes_
    return shards


def _tensor_file(shard: dict, read, dtype: torch.dtype):
    """The bytes of a safetensors file, one tensor cast at a time; the library's save_file wants all of them
    cast first.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, p in shard.items():
        start, end = end, end + p.numel() * dtype.itemsize
        header[name] = {"dtype": FLOATS[dtype], "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    yield len(text).to_bytes(8, "little") + text
    for name in shard:
        for piece in read(name):
            yield piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy()


def _json_file(content: dict) -> list[bytes]:
    return [(json.dumps(content, indent=2) + "\n").encode()]


def copy_tokenizer(src: str | Path, dst: str | Path) -> None:
    """Copies what a model folder holds beside config and weights: tokenizer.json, tokenizer_config.json,
    generation_config.json, chat_template.*.
    """
    src, dst = Path(src), Path(dst)
    for pattern in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.*"):
        for file in src.glob(pattern):
            if not (dst / file.name).exists() or not file.samefile(dst / file.name):
                shutil.copyfile(file, dst / file.name)


def hash_model(folder: str | Path) -> str:
    """sha256 over the weight files' bytes, one behind the other: what `cat *.safetensors | sha256sum` prints.

    Past 1 GiB it is "sampled-" and the sha256 over each file's size, its header and 64 blocks of 1 MiB spread
    evenly: that tells models and training steps apart in a second, but says nothing of a bit that fell over
    between two blocks.
    """
    files, digest = weight_files(folder), hashlib.sha256()
    sampled = sum(file.stat().st_size for file in files) > HASH_WHOLE
    for file in files:
        (_hash_sample if sampled else _hash_whole)(file, digest)
    return ("sampled-" if sampled else "") + digest.hexdigest()


def _hash_whole(file: Path, digest) -> None:
    with open(file, "rb") as f:
        while block := f.read(HASH_BLOCK):
            digest.update(block)


def _hash_sample(file: Path, digest) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with open(file, "rb") as f:
        header = f.read(8)
        digest.update(header + f.read(min(int.from_bytes(header, "little"), size)))
        for i in range(HASH_BLOCKS):
            f.seek(
                i * max(size - HASH_BLOCK, 0) // (HASH_BLOCKS - 1)
            )  # the first block begins the file, the last ends it
            digest.update(f.read(HASH_BLOCK))
