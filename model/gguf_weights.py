"""Loads a Gemma 3 from a GGUF file: its config from the gemma3.* keys, its tensors by Hugging Face names.

Gemma's norms multiply by 1 + weight, and llama.cpp's by the weight alone, so a GGUF file holds 1 + weight.
Source: llama.cpp, src/models/gemma3.cpp and conversion/gemma.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ggml.blocks import SLICE, dequantize
from ggml.container import GGUFFile, TensorInfo
from model.config import CHECKS, FULL, SLIDING, Gemma3Config, parse_config
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_names import LAYER_NAMES, OTHER_NAMES, gguf_name

ARCHITECTURE = "gemma3"
# {field of the config: its key, without "gemma3."}. Every file has the first six.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL_KEYS = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rope_linear_factor": "rope.scaling.factor",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
IDS = {"bos_token_id": ("bos", 2), "eos_token_id": ("eos", 1), "pad_token_id": ("padding", 0)}
USUAL_PATTERN = 6  # every sixth layer is global unless the file says otherwise
USUAL_BASE = 1e4  # llama.cpp's default of both bases of the rotary embeddings
LAYERS_27B = 62  # a model of so many layers scales its scores by hidden / heads and not by head_dim


def read_gguf_config(file: GGUFFile, *others: GGUFFile) -> Gemma3Config:
    """Returns the architecture as llama.cpp reads it, with its defaults for keys that are not there.

    `others` are the later parts of a split file, which have tensors and no keys of the model.

    Raises ValueError for a file of another kind, and with every key that is missing or wrong.
    """
    refuse_other_kinds(file)
    known = {key.removeprefix("gemma3."): value for key, value in file.metadata.items()}
    if problems := _wrong_keys(known):
        raise ValueError(f"{file.path}: {'; '.join(problems)}; download it again, or convert it again")
    raw: dict[str, Any] = {f: known[key] for f, key in (KEYS | OPTIONAL_KEYS).items() if key in known}
    layers, hidden, heads = (raw[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    raw["vocab_size"] = len(known["tokenizer.ggml.tokens"])
    raw.setdefault("num_key_value_heads", heads)
    raw.setdefault("head_dim", hidden // heads)
    raw["query_pre_attn_scalar"] = hidden / heads if layers == LAYERS_27B else raw["head_dim"]
    window = known.get(WINDOW)
    raw["sliding_window"] = window or 1
    raw["layer_types"] = [SLIDING if window and s else FULL for s in _sliding_layers(known, layers)]
    raw["rope_parameters"] = {
        FULL: {"rope_theta": raw.pop("rope_theta", USUAL_BASE)},
        SLIDING: {"rope_theta": raw.pop("rope_local_base_freq", USUAL_BASE)},
    }
    if (factor := raw.pop("rope_linear_factor", 1.0)) != 1.0:
        raw["rope_parameters"][FULL] |= {"rope_type": "linear", "factor": factor}
    raw["tie_word_embeddings"] = all("output.weight" not in part.tensors for part in (file, *others))
    raw |= {
        field: known.get(f"tokenizer.ggml.{name}_token_id", usual) for field, (name, usual) in IDS.items()
    }
    return parse_config(raw, str(file.path))


def _wrong_keys(known: dict[str, Any]) -> list[str]:
    """Returns an error message for each key that is missing or has an impossible value."""
    found = [f"has no gemma3.{key}" for key in KEYS.values() if key not in known]
    for field, key in (KEYS | OPTIONAL_KEYS).items():
        fits, wanted = CHECKS[field]
        if key in known and not fits(known[key]):
            found.append(f"gemma3.{key} is {known[key]!r}; it must be {wanted}")
    if not isinstance(known.get("tokenizer.ggml.tokens"), list):
        found.append("has no tokenizer.ggml.tokens")
    fits, wanted = CHECKS["sliding_window"]
    if (window := known.get(WINDOW)) and not fits(window):
        found.append(f"gemma3.{WINDOW} is {window!r}; it must be 0 or {wanted}")
    layers, pattern = known.get(KEYS["num_hidden_layers"]), known.get(PATTERN, USUAL_PATTERN)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            found.append(f"gemma3.{PATTERN} has {len(pattern):,} entries, and the model {layers!r} layers")
    elif not isinstance(pattern, int) or pattern < 0:
        found.append(
            f"gemma3.{PATTERN} is {pattern!r}; it must be a whole number, or an entry for each layer"
        )
    scaling = known.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        found.append(f"gemma3.rope.scaling.type is {scaling!r}; Gemma 3 has 'linear' or none")
    return found


def refuse_other_kinds(file: GGUFFile) -> None:
    """Raises ValueError unless the file holds a Gemma 3 text model, or the first part of one."""
    get = file.metadata.get
    kind, architecture = get("general.type", "model"), get("general.architecture")
    if kind == "adapter":
        raise ValueError(
            f"{file.path}: is an adapter; name its base model, and give PEFT's folder to --adapter"
        )
    if architecture == "clip" or kind == "mmproj":
        remedy = "name the file of the language model beside it"
        raise ValueError(f"{file.path}: is a projector of images (mmproj) and no language model; {remedy}")
    if architecture != ARCHITECTURE:
        known = f"Loupe knows Gemma 3 only ({ARCHITECTURE!r})"
        raise ValueError(f"{file.path}: general.architecture is {architecture!r}; {known}")


def _sliding_layers(known: dict[str, Any], layers: int) -> list[bool]:
    """Returns for each layer whether it is local."""
    pattern = known.get(PATTERN, USUAL_PATTERN)
    if isinstance(pattern, list):
        return pattern
    return [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]


class GGUFTensors:
    """The tensors of a GGUF file, or of all parts of one, by our names."""

    def __init__(self, files: list[Path], config: Gemma3Config):
        """Opens the files; raises ValueError for a damaged one."""
        self.opened = [GGUFFile(file) for file in files]
        for file in self.opened:
            file.metadata.clear()  # The vocabulary takes 40 MB and is not needed here.
        self.found = {name: file for file in self.opened for name in file.tensors}
        layers, names = range(config.num_hidden_layers), list(OTHER_NAMES)
        names += [f"model.layers.{i}.{part}" for i in layers for part in LAYER_NAMES]
        ours = {gguf_name(f"{name}.weight"): f"{name}.weight" for name in names}
        self.names = {ours.get(name, name): name for name in self.found}

    def info(self, name: str) -> TensorInfo:
        """Returns shape and type of a tensor."""
        stored = self.names[name]
        return self.found[stored].tensors[stored]

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Returns rows start to stop as they are stored: (rows, bytes of a row) uint8."""
        stored = self.names[name]
        return torch.from_numpy(self.found[stored].read(stored, start, stop))

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Returns rows start to stop of a tensor in float32; a vector is one row."""
        rows = dequantize(self.blocks(name, start, stop), self.info(name).type)
        return rows - 1.0 if name.endswith("norm.weight") else rows

    def read(self, name: str) -> torch.Tensor:
        """Returns a whole tensor in float32."""
        return self.read_rows(name).view(self.info(name).shape)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Reads a tensor into `tensor`, which has its shape, some rows at a time."""
        rows = tensor.view(-1, tensor.shape[-1])
        height = max(1, SLICE // rows.shape[1])
        for start in range(0, len(rows), height):
            rows[start : start + height].copy_(self.read_rows(name, start, start + height))


def read_rows(file: GGUFFile, name: str, start: int, stop: int) -> torch.Tensor:
    """Returns rows start to stop - 1 of a tensor, by Hugging Face's name, in float32; a vector is one row."""
    tensor = file.tensors[gguf_name(name)]
    rows = dequantize(torch.from_numpy(file.read(tensor.name, start, stop)), tensor.type)
    return rows - 1.0 if name.endswith("norm.weight") else rows


def read_tensor(file: GGUFFile, name: str) -> torch.Tensor:
    """Returns a whole tensor, by Hugging Face name, in float32."""
    shape = file.tensors[gguf_name(name)].shape
    return read_rows(file, name, 0, shape[0] if len(shape) > 1 else 1).view(shape)


def model_of(config: Gemma3Config, read: Callable[[str], torch.Tensor]) -> Gemma3ForCausalLM:
    """Returns a frozen model of this architecture, with read(name) as the value of each parameter."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(read(name), requires_grad=False))
    return model
