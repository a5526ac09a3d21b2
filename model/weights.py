"""Reads and writes the safetensors files of a model folder, one tensor at a time.

All tensor names and shapes are checked before any tensor is read. A folder holds model.safetensors, or shards
and model.safetensors.index.json: {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard}}. A
safetensors file has three parts: the header's length in bytes (8 bytes, little endian); the header, which is
JSON of {tensor name: {"dtype", "shape", "data_offsets"}}; and the bytes of the tensors.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import listed
from common.files import write_together
from model.config import Gemma3Config, read_config
from model.gemma3 import Gemma3ForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
# The prefix of the text model: in the multimodal wrapper (new and old), and on its own.
TEXT_MODEL = re.compile(r"^(model\.language_model|language_model\.model|model)\.")
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64  # The alignment of a tensor in memory, in bytes: one cache line.
SHARD_BYTES = 5 * 10**9  # The default size of a shard is transformers'.
# Model folders above this many bytes are hashed by samples: HASH_BLOCKS blocks of HASH_BLOCK bytes per file.
HASH_WHOLE, HASH_BLOCK, HASH_BLOCKS = 2**30, 2**20, 64


class _Stored(NamedTuple):
    """Where a tensor is stored, and how."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # its first byte in the file


def load_model(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Gemma3ForCausalLM:
    """Loads the model in a folder, cast to `dtype`; the weights are in memory only once.

    Raises ValueError that lists all missing, unexpected and misshapen tensors, or names the damaged file.
    """
    return Checkpoint(folder).load(dtype, torch.device(device))


def _empty_tensors(
    shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, uninitialized tensor) for each name in `shapes`.

    On a CPU they share one NumPy array, for which NumPy asks Linux for huge pages: that halves the loading
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
    """Reads the tensors of a model folder one at a time.

    `config` is the parsed config.json. `model` has parameters without values until `load` is called. `names`
    lists the tensors of the text model.
    """

    def __init__(self, folder: str | Path):
        """Reads config.json and the file headers; raises ValueError if a tensor does not fit config.json."""
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
        """Loads all weights, cast to `dtype`, into `model` and returns it."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, tensor in _empty_tensors(shapes, dtype, device):
            module, _, leaf = name.rpartition(".")
            self.read_into(name, tensor)
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(tensor))
        return self.model

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in its stored dtype, as a view of the memory-mapped file."""
        stored = self._found[name]
        # While a mapping is open, the pages that were read count as this process's memory.
        with _open(stored.file) as f:
            return f.get_tensor(stored.name)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Copies the stored tensor `name` into `tensor`, which has the same shape.

        On a CPU, if the dtypes are equal too, it reads the file without memory mapping, whose page faults
        would double the time.
        """
        stored = self._found[name]
        if tensor.device.type != "cpu" or FLOATS.get(tensor.dtype) != stored.dtype:
            # A copy, since reading the mapping crashes with SIGBUS if somebody truncates the file later.
            tensor.copy_(self.read(name))
            return
        left = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(stored.file, "rb", buffering=0) as f:
            f.seek(stored.start)
            while left:
                count = f.readinto(left)
                if not count:
                    raise ValueError(f"{stored.file}: ends in the middle of {stored.name}; download it again")
                left = left[count:]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows start to stop - 1 of a matrix in its stored dtype; reads only these rows."""
        stored = self._found[name]
        with _open(stored.file) as f:
            return f.get_slice(stored.name)[start:stop]


def weight_files(folder: str | Path) -> list[Path]:
    """Returns a model folder's safetensors files; raises ValueError if there is none or one is missing."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():  # goes before the index, as in transformers
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix))
    if pickles:
        raise ValueError(
            f"{folder}: has {pickles[0]} and no {SINGLE}. A pickle can run any code when it is opened, so it "
            "is not opened. If you trust it, convert it to safetensors: "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ValueError(
        f"{folder}: has neither {SINGLE} nor {INDEX}; a model folder holds config.json, tokenizer.json and "
        "*.safetensors"
    )


def _shards(folder: Path) -> list[Path]:
    path, remedy = folder / INDEX, "download the model again"
    try:
        names = list(dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not an index of shards ({type(e).__name__}: {e}); {remedy}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name!r} is not the name of a safetensors file in this folder; {remedy}"
            )
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        head = f"{folder}: {len(missing)} of {len(names)} shards are missing:"
        raise ValueError(listed(head, missing, remedy))
    return [folder / n for n in names]


def _find_tensors(folder: Path, cfg: Gemma3Config) -> tuple[dict[str, _Stored], list[str]]:
    """Returns the text model's stored tensors by name, and an error message for each one stored twice."""
    found: dict[str, _Stored] = {}
    problems = []
    for file in weight_files(folder):
        with _open(file) as f:
            first_bytes = _first_bytes(file)
            for stored in f.offset_keys():
                name = _text_name(stored)
                # The vision part, or a second copy of the embedding.
                if name is None or (name == "lm_head.weight" and cfg.tie_word_embeddings):
                    continue
                if other := found.get(name):
                    where = f"as {other.name} in {other.file.name} and as {stored} in {file.name}"
                    problems.append(f"twice: {name}, {where}")
                part = f.get_slice(stored)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found[name] = _Stored(file, stored, shape, dtype, first_bytes[stored])
    return found, problems


def _text_name(stored: str) -> str | None:
    """Returns Gemma3ForCausalLM's name for a stored tensor, or None for a tensor of the vision part."""
    if VISION.match(stored):
        return None
    if stored == "language_model.lm_head.weight":
        return "lm_head.weight"
    return TEXT_MODEL.sub("model.", stored)


def _compare(model: nn.Module, found: dict[str, _Stored], cfg: Gemma3Config) -> list[str]:
    """Returns an error message for each tensor that is missing, unexpected, misshapen or quantized."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected: {s.name} {s.shape}" for name, s in found.items() if name not in wanted]
    for name, s in ((n, found[n]) for n in wanted if n in found):
        if name == "model.embed_tokens.weight" and s.shape[0] != cfg.vocab_size:
            what = f"has {s.shape[0]} rows, but config.json's vocab_size is {cfg.vocab_size}"
            problems.append(f"misshapen: {s.name} {what}")
        elif s.shape != wanted[name]:
            problems.append(f"misshapen: {s.name} is {s.shape}, but config.json makes it {wanted[name]}")
        elif s.dtype not in FLOATS.values():
            remedy = f"Loupe reads {', '.join(FLOATS.values())}: take the unquantized model"
            problems.append(f"quantized: {s.name} is stored as {s.dtype}; {remedy}")
    return problems


def _open(file: Path) -> safe_open:
    """Returns safe_open(file); its errors name the file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{file}: not a whole safetensors file ({e}); download it again") from None


def _first_bytes(file: Path) -> dict[str, int]:
    """Returns {tensor name: position of the tensor's first byte in the safetensors file}."""
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def save_model(
    model: Gemma3ForCausalLM,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and the weights, cast to `dtype`, to a folder, and replaces the model that is there.

    Each shard has at most `shard_bytes` bytes, or a single larger tensor. No file is replaced before all new
    files are on the disk, so if writing fails, the old model remains. A head tied to the embedding is not
    saved.
    """
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        names = dict(Gemma3ForCausalLM(model.config).named_parameters()).keys()
    assert parameters.keys() == names, "merge the adapters first"
    save_tensors(model.config, lambda name: [parameters[name].detach()], folder, dtype, shard_bytes)


def save_tensors(
    config: Gemma3Config,
    read: Callable[[str], Iterable[torch.Tensor]],
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as save_model does; read(name) yields the rows of a tensor in one or more pieces."""
    with torch.device("meta"):
        parameters = dict(Gemma3ForCausalLM(config).named_parameters())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shard(parameters, dtype, shard_bytes)
    n = len(shards)
    names = [SINGLE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    # The generators cast nothing before write_together asks for the bytes.
    files: dict[str, Iterable[bytes]] = {
        name: _safetensors(shard, read, dtype) for name, shard in zip(names, shards, strict=True)
    }
    if n > 1:
        size = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        files[INDEX] = _json({"metadata": {"total_size": size}, "weight_map": weight_map})
    files["config.json"] = _json(config.to_json() | {"dtype": str(dtype).removeprefix("torch.")})
    write_together(folder, files)
    # A reader would mix the shards with those of an older save.
    for old in folder.glob("model*.safetensors*"):
        if old.name not in files:
            old.unlink()


def _shard(parameters: dict, dtype: torch.dtype, limit: int) -> list[dict]:
    """Splits {name: parameter} into dicts of at most `limit` bytes; a larger parameter has its own dict."""
    shards: list[dict] = [{}]
    size = 0
    for name, p in parameters.items():
        nbytes = p.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = p
        size += nbytes
    return shards


def _safetensors(shard: dict, read: Callable, dtype: torch.dtype) -> Iterator[bytes]:
    """Yields the bytes of a safetensors file; casts one piece at a time to save memory, unlike save_file."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, p in shard.items():
        start, end = end, end + p.numel() * dtype.itemsize
        header[name] = {"dtype": FLOATS[dtype], "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the first tensor
    yield len(text).to_bytes(8, "little") + text
    for name in shard:
        for piece in read(name):
            yield piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy()


def _json(content: dict) -> list[bytes]:
    return [(json.dumps(content, indent=2) + "\n").encode()]


def copy_tokenizer(src: str | Path, dst: str | Path) -> None:
    """Copies tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.* to `dst`."""
    src, dst = Path(src), Path(dst)
    for pattern in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.*"):
        for file in src.glob(pattern):
            if not (dst / file.name).exists() or not file.samefile(dst / file.name):
                shutil.copyfile(file, dst / file.name)


def hash_model(folder: str | Path) -> str:
    """Returns the SHA-256 of a folder's weight files, as `cat *.safetensors | sha256sum` prints it.

    If the files have more than 1 GiB together, it returns "sampled-" and the SHA-256 of a sample: each file's
    size, header and 64 evenly spread blocks of 1 MiB. This takes under a second and tells models and training
    steps apart, but misses damage between the blocks.
    """
    files, digest = weight_files(folder), hashlib.sha256()
    sampled = sum(file.stat().st_size for file in files) > HASH_WHOLE
    for file in files:
        (_hash_sample if sampled else _hash_whole)(file, digest)
    return ("sampled-" if sampled else "") + digest.hexdigest()


def _hash_whole(file: Path, digest: "hashlib._Hash") -> None:
    with open(file, "rb") as f:
        while block := f.read(HASH_BLOCK):
            digest.update(block)


def _hash_sample(file: Path, digest: "hashlib._Hash") -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with open(file, "rb") as f:
        header = f.read(8)
        digest.update(header + f.read(min(int.from_bytes(header, "little"), size)))
        for i in range(HASH_BLOCKS):  # the first block starts at byte 0, the last ends at the file's end
            f.seek(i * max(size - HASH_BLOCK, 0) // (HASH_BLOCKS - 1))
            digest.update(f.read(HASH_BLOCK))
