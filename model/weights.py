"""Reads and writes the safetensors files of a model folder, one tensor at a time.

All tensor names and shapes are checked before any tensor is read. A folder holds model.safetensors, or shards
and model.safetensors.index.json: {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard}}. A
safetensors file has three parts: the header's length in bytes (8 bytes, little endian); the header, which is
JSON of {tensor name: {"dtype", "shape", "data_offsets"}}; and the bytes of the tensors.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import listed
from common.files import write_together
from ggml.blocks import SLICE, type_named
from ggml.quantize import quantize, tensor_type
from model.config import Gemma3Config, read_config
from model.foreign import foreign_tensors
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_names import gguf_name
from model.gguf_weights import GGUFTensors
from model.nf4 import BLOCK, quantize_nf4
from model.quantized import QuantizedWeight, set_quantized

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
# The prefix of the text model: in the multimodal wrapper (new and old), and on its own.
TEXT_MODEL = re.compile(r"^(model\.language_model|language_model\.model|model)\.")
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64  # The alignment of a tensor in memory, in bytes: one cache line.
SHARD_BYTES = 5 * 10**9  # The default size of a shard is transformers'.
# Model folders above this many bytes are hashed by samples: HASH_BLOCKS blocks of HASH_BLOCK bytes per file.
HASH_WHOLE, HASH_BLOCK, HASH_BLOCKS = 2**30, 2**20, 64
GGUF_HEAD = 2**24  # Bytes at the start of a GGUF file that hold its header: Gemma's vocabulary takes 7 MB.


class _Stored(NamedTuple):
    """Where a tensor is stored, and how."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # its first byte in the file


def load_model(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu", quantize: str = "none"
) -> Gemma3ForCausalLM:
    """Loads the model in a folder, cast to `dtype`; the weights are in memory only once.

    Raises ValueError that lists all missing, unexpected and misshapen tensors, or names the damaged file.
    """
    return Checkpoint(folder).load(dtype, torch.device(device), quantize)


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
        self.folder = folder = Path(folder)
        self.config = read_config(folder)
        with torch.device("meta"):
            self.model = Gemma3ForCausalLM(self.config)
        self.gguf = gguf_tensors(folder, self.config)
        if self.gguf:
            infos = {name: self.gguf.info(name) for name in self.gguf.names}
            self._found = {n: _Stored(folder, i.name, i.shape, "F32", 0) for n, i in infos.items()}
            problems: list[str] = []
        else:
            self._found, problems = _find_tensors(folder, self.config)
        problems += _compare(self.model, self._found, self.config)
        if found := problems and foreign_tensors(self._found):
            raise ValueError(f"{folder}: {found}")
        if problems and self.gguf:
            first, more = problems[0].replace("config.json", "the header"), len(problems) - 1
            rest = f", and {more:,} more" if more else ""
            where = self.gguf.opened[0].path.resolve()
            raise ValueError(f"{where}: the tensors do not fit the header: {first}{rest}; download it again")
        if problems:
            head = f"{folder}: the weights do not fit config.json:"
            raise ValueError(listed(head, problems, _remedy(problems)))
        self.names = list(self._found)

    def load(self, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Gemma3ForCausalLM:
        """Loads all weights into `model` and returns it.

        Args:
            dtype: of the weights that are not quantized, and of the products with those that are.
            quantize: "none"; "keep", which leaves the blocks of a GGUF file as they are; a type of
                export.py --quant, into whose blocks the matrices are quantized one by one; or "nf4".

        Raises ValueError that names a matrix with an infinity or NaN, which cannot be quantized.
        """
        for name, type in quantized_types(self.config, self.gguf, quantize).items():
            keep = quantize == "keep"
            set_quantized(self.model, name, self._quantized(name, type, dtype, device, keep))
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, tensor in _empty_tensors(shapes, dtype, device):
            module, _, leaf = name.rpartition(".")
            self.read_into(name, tensor)
            if not is_finite(tensor):
                raise ValueError(
                    f"{self.folder}: {name} has an infinity or NaN; take another copy or step of the model"
                )
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(tensor))
        return self.model

    def _quantized(
        self, name: str, type: str, dtype: torch.dtype, device: torch.device, keep: bool
    ) -> QuantizedWeight:
        """Returns a matrix in blocks of `type`: those of the GGUF file, or newly quantized."""
        if self.gguf and keep:
            return QuantizedWeight(self.gguf.blocks(name).to(device), type, dtype)
        rows, columns = self.model.get_parameter(name).shape
        height = max(1, SLICE // columns)
        pieces = (self.read_rows(name, i, i + height).float() for i in range(0, rows, height))
        try:
            if type == "nf4":
                blocks, scales = quantize_nf4(piece.to(device) for piece in pieces)
                return QuantizedWeight(blocks, type, dtype, scales)
            blocks = torch.from_numpy(np.concatenate([quantize(piece.numpy(), type) for piece in pieces]))
        except ValueError as e:
            raise ValueError(f"{self.folder}: {name}: {e}") from None
        return QuantizedWeight(blocks.to(device), type, dtype)

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in its stored dtype, as a view of the memory-mapped file."""
        if self.gguf:
            return self.gguf.read(name)
        stored = self._found[name]
        # While a mapping is open, the pages that were read count as this process's memory.
        with _open(stored.file) as f:
            return f.get_tensor(stored.name)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Copies the stored tensor `name` into `tensor`, which has the same shape.

        On a CPU, if the dtypes are equal too, it reads the file without memory mapping, whose page faults
        would double the time.
        """
        if self.gguf:
            return self.gguf.read_into(name, tensor)
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
        if self.gguf:
            return self.gguf.read_rows(name, start, stop)
        stored = self._found[name]
        with _open(stored.file) as f:
            return f.get_slice(stored.name)[start:stop]


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has no infinity and no NaN."""
    # A sum needs no memory. It is not finite either where the values are, but too large for it.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def gguf_files(folder: Path) -> list[Path]:
    """Returns the GGUF files of a folder of model/gguf_folder.py; none for a folder with safetensors."""
    # A GGUF file beside safetensors may be an export of them.
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return []
    return sorted([*folder.glob("model.gguf"), *folder.glob("model-?????-of-?????.gguf")])


def gguf_tensors(folder: Path, config: Gemma3Config) -> GGUFTensors | None:
    """Returns the tensors of the GGUF file for which a folder stands, or None for another folder."""
    files = gguf_files(folder)
    return GGUFTensors(files, config) if files else None


def quantized_types(config: Gemma3Config, gguf: GGUFTensors | None, quantize: str) -> dict[str, str]:
    """Returns {name: block type} of the matrices that stay in blocks, or are quantized into blocks.

    `quantize` is "none", "keep" for the blocks of `gguf`, a type of export.py --quant, which gives each
    matrix the type that it has in such a file, or "nf4", which as in QLoRA quantizes the layers' matrices
    only. A matrix whose rows do not fill whole blocks is not quantized, or has larger blocks.
    """
    if quantize == "none" or (quantize == "keep" and not gguf):
        return {}
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Gemma3ForCausalLM(config).named_parameters() if p.ndim == 2}
    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    if quantize == "nf4":
        layers_only = {n: s for n, s in shapes.items() if n.startswith("model.layers.") and len(s) == 2}
        return {name: "nf4" for name, shape in layers_only.items() if shape[1] % BLOCK == 0}
    if gguf and quantize == "keep":
        types = {name: gguf.info(name).type for name in shapes}
    else:
        types = {n: tensor_type(quantize, gguf_name(n), layers, s[-1], tied) for n, s in shapes.items()}
    return {name: type for name, type in types.items() if type_named(type).block_size > 1}


def weight_files(folder: str | Path) -> list[Path]:
    """Returns the weight files of a folder, safetensors in the index's order.

    Raises ValueError if one is missing.
    """
    folder = Path(folder)
    if files := gguf_files(folder):
        return files
    if (folder / SINGLE).is_file():  # goes before the index, as in transformers
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if gguf := sorted(folder.glob("*.gguf")):
        raise ValueError(
            f"{folder}: has neither {SINGLE} nor {INDEX}; to take {gguf[0].name}, name the file: {gguf[0]}"
        )
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: not an index of shards ({type(e).__name__}: {e}); {remedy}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name!r} is not the name of a safetensors file in this folder; {remedy}"
            )
    missing = [n for n in names if not os.path.isfile(folder / n)]  # Path.is_file raises for a long name
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
                if name is None:
                    continue
                if other := found.get(name):
                    where = f"as {other.name} in {other.file.name} and as {stored} in {file.name}"
                    problems.append(f"twice: {name}, {where}")
                part = f.get_slice(stored)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found[name] = _Stored(file, stored, shape, dtype, first_bytes[stored])
    if cfg.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        if EMBEDDING in found and not _same_values(head, found[EMBEDDING]):
            problems.append(
                f"tied: {head.name} differs from {found[EMBEDDING].name}, but config.json has "
                "tie_word_embeddings true: set it to false to use both"
            )
    return found, problems


def _same_values(a: _Stored, b: _Stored) -> bool:
    """Returns whether two stored matrices are equal; reads some rows at a time."""
    if a.shape != b.shape:
        return False
    height = max(1, SLICE // a.shape[-1])
    with _open(a.file) as one, _open(b.file) as two:
        left, right = one.get_slice(a.name), two.get_slice(b.name)
        starts = range(0, a.shape[0], height)
        return all(torch.equal(left[i : i + height].float(), right[i : i + height].float()) for i in starts)


def _text_name(stored: str) -> str | None:
    """Returns Gemma3ForCausalLM's name for a stored tensor, or None for a tensor of the vision part."""
    # torch.compile puts "_orig_mod." before the names in what it wraps, DistributedDataParallel "module.".
    name = stored.replace("_orig_mod.", "").removeprefix("module.")
    if VISION.match(name):
        return None
    if name == "language_model.lm_head.weight":
        return HEAD
    return TEXT_MODEL.sub("model.", name)


def _compare(model: nn.Module, found: dict[str, _Stored], cfg: Gemma3Config) -> list[str]:
    """Returns an error message for each tensor that is missing, unexpected, misshapen or quantized."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected: {s.name} {s.shape}" for name, s in found.items() if name not in wanted]
    for name, s in ((n, found[n]) for n in wanted if n in found):
        if name == EMBEDDING and s.shape[0] != cfg.vocab_size:
            what = (
                f"has {s.shape[0]} rows, but config.json's vocab_size is {cfg.vocab_size}: set it to the rows"
            )
            problems.append(f"misshapen: {s.name} {what}")
        elif s.shape != wanted[name]:
            problems.append(f"misshapen: {s.name} is {s.shape}, but config.json makes it {wanted[name]}")
        elif s.dtype not in FLOATS.values():
            remedy = f"Loupe reads {', '.join(FLOATS.values())}: take the unquantized model"
            problems.append(f"quantized: {s.name} is stored as {s.dtype}; {remedy}")
    return problems


def _remedy(problems: list[str]) -> str:
    """Returns what to do about the messages of _compare and _find_tensors."""
    kinds = {problem.partition(":")[0] for problem in problems}
    if kinds == {"missing"}:
        return "copy or download the model again: a part of it is not there"
    remedies = {
        "misshapen": "take config.json and the weights from one folder",
        "unexpected": "take a folder of Gemma 3's language model alone",
        "twice": "keep the one that is right",
    }
    return "; ".join(text for kind, text in remedies.items() if kind in kinds)


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
        length = GGUF_HEAD if header.startswith(b"GGUF") else int.from_bytes(header, "little")
        digest.update(header + f.read(min(length, size)))
        for i in range(HASH_BLOCKS):  # the first block starts at byte 0, the last ends at the file's end
            f.seek(i * max(size - HASH_BLOCK, 0) // (HASH_BLOCKS - 1))
            digest.update(f.read(HASH_BLOCK))
