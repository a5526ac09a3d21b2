"""Reads a Gemma 3 config.json: of a text-only or multimodal model, written by transformers 4 or 5."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import read_json
from model.foreign import foreign_config

SLIDING, FULL = "sliding_attention", "full_attention"
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")
# A damaged file must not make us build a model of billions of layers; Gemma 3 27B has 62.
LARGEST, MOST_LAYERS, MOST_PARAMETERS = 2**24, 1000, 10**13
TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass
class Gemma3Config:
    """The architecture of a Gemma 3 text model.

    Fields and defaults are those of Hugging Face's Gemma3TextConfig, because published config.json files omit
    some. Only rope_linear_factor is our name: the factor of linear RoPE scaling on global layers.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int = 262_208
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    layer_types: list[str] = field(default_factory=list)
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0
    rope_linear_factor: float = 1.0
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int = 2
    eos_token_id: int | list[int] = 1
    pad_token_id: int = 0

    @property
    def attention_scale(self) -> float:
        """Returns query_pre_attn_scalar ** -0.5, by which the attention scores q k^T are multiplied."""
        return self.query_pre_attn_scalar**-0.5

    def to_json(self) -> dict:
        """Returns a config.json's content (model_type gemma3_text) for transformers' Gemma3TextConfig."""
        out = asdict(self)
        full = {"rope_type": "default", "rope_theta": out.pop("rope_theta")}
        factor = out.pop("rope_linear_factor")
        if factor != 1.0:
            full |= {"rope_type": "linear", "factor": factor}
        local = {"rope_type": "default", "rope_theta": out.pop("rope_local_base_freq")}
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **out,
            "rope_parameters": {FULL: full, SLIDING: local},
        }


def read_config(folder: str | Path) -> Gemma3Config:
    """Reads config.json, or only text_config if multimodal; raises ValueError that lists all wrong keys."""
    path = Path(folder) / "config.json"
    raw = read_json(path, "a model folder holds config.json, tokenizer.json and *.safetensors")
    kind = raw.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(
            f"{path}: model_type is {kind!r}; Loupe knows Gemma 3 only ('gemma3' or 'gemma3_text')"
        )
    if found := foreign_config(raw):
        raise ValueError(f"{path}: {found}")
    if kind == "gemma3_text":
        return parse_config(raw, str(path))
    text = raw.get("text_config") or {}
    if not isinstance(text, dict):
        raise ValueError(
            f"{path}: text_config is {text!r}; it must be an object of the text model's keys; "
            "download the model again"
        )
    # The multimodal wrapper may keep the token ids at its top level.
    ids = {key: raw[key] for key in TOKEN_IDS if raw.get(key) is not None}
    return parse_config(ids | text, str(path))


def parse_config(raw: dict, where: str = "config.json") -> Gemma3Config:
    """Returns the config in `raw`, a parsed config.json; raises ValueError that lists all wrong values."""
    # {field: (its place in config.json, value)}
    found = {k: (k, raw[k]) for k in Gemma3Config.__dataclass_fields__ if raw.get(k) is not None}
    problems = [f"{k} is missing" for k in REQUIRED if k not in found]
    found |= _read_rope(raw, problems)
    if "layer_types" not in found:
        found |= _read_pattern(raw, problems)
    good: dict[str, Any] = {}
    for key, (place, value) in found.items():
        fits, wanted = CHECKS.get(key, (None, ""))
        if fits and not fits(value):
            problems.append(f"{place} is {value!r}; it must be {wanted}")
        else:
            good[key] = float(value) if key.startswith("rope_") else value
    problems += _impossible(good, raw)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return Gemma3Config(**good)


def _is_size(value: Any, limit: int = LARGEST) -> bool:
    return _is_id(value) and 1 <= value <= limit


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_id_or_ids(value: object) -> bool:
    return _is_id(value) or (isinstance(value, list) and len(value) > 0 and all(map(_is_id, value)))


FLAGS = ("attention_bias", "tie_word_embeddings")
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings sliding_window"
).split()
POSITIVE = (
    "rms_norm_eps query_pre_attn_scalar rope_theta rope_local_base_freq rope_linear_factor "
    "final_logit_softcapping attn_logit_softcapping"
).split()
# {field: (whether a value is possible, what it must be)}
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(SIZES, (_is_size, f"a whole number from 1 to {LARGEST:,}")),
    "num_hidden_layers": (
        lambda value: _is_size(value, MOST_LAYERS),
        f"a whole number from 1 to {MOST_LAYERS:,}",
    ),
    **dict.fromkeys(POSITIVE, (_is_positive, "a number above 0")),
    **dict.fromkeys(FLAGS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_is_id, "a token id, a whole number of 0 or more")),
    "eos_token_id": (_is_id_or_ids, "a token id or a list of them"),
}


def _read_rope(raw: dict, problems: list[str]) -> dict:
    """Returns {field of Gemma3Config: (place in config.json, value)} from nested RoPE settings.

    Transformers 4 wrote rope_scaling. Transformers 5 writes rope_parameters, with one entry per layer type.
    """
    new, found = raw.get("rope_parameters") or {}, {}
    if new and not (isinstance(new, dict) and new.keys() & {FULL, SLIDING}):
        keys = f"'{FULL}' and '{SLIDING}'"
        problems.append(f"rope_parameters is {new!r}; it must be an object with the keys {keys}")
        new = {}
    parts = [
        ("rope_scaling", raw.get("rope_scaling"), "rope_theta"),
        (f"{FULL} of rope_parameters", new.get(FULL), "rope_theta"),
        (f"{SLIDING} of rope_parameters", new.get(SLIDING), "rope_local_base_freq"),
    ]
    for place, part, theta in parts:
        if part is None:
            continue
        if not isinstance(part, dict):
            example = '{"rope_type": "linear", "factor": 8}'
            problems.append(f"{place} is {part!r}; it must be an object such as {example}")
            continue
        if "rope_theta" in part:
            found[theta] = (f"rope_theta of {place}", part["rope_theta"])
        kind = part.get("rope_type", part.get("type", "default"))
        # Gemma 3 scales the positions of global layers only: local ones never see past the window.
        if kind == "linear" and theta == "rope_theta":
            found["rope_linear_factor"] = (f"factor of {place}", part.get("factor"))
        elif kind != "default":
            problems.append(f"{place} has the type {kind!r}; Gemma 3 uses 'linear' on {FULL} or none")
    return found


def _read_pattern(raw: dict, problems: list[str]) -> dict:
    """Returns layer_types in which every n-th layer is global: n is sliding_window_pattern, by default 6."""
    keys = ("sliding_window_pattern", "_sliding_window_pattern")
    key = next((k for k in keys if raw.get(k) is not None), None)
    pattern, layers = raw[key] if key else 6, raw.get("num_hidden_layers")
    if not _is_size(pattern):
        problems.append(f"{key} is {pattern!r}; it must be a whole number of 1 or more")
        return {}
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        return {}
    kinds = [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
    return {"layer_types": ("layer_types", kinds)}


def _impossible(good: dict[str, Any], raw: dict) -> list[str]:
    """Returns an error message for each unsupported value, and for values that contradict each other."""
    cfg, found = Gemma3Config(**dict.fromkeys(REQUIRED, 1) | good), []
    layers, kinds = good.get("num_hidden_layers"), good.get("layer_types", [])
    known = isinstance(kinds, list) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not known or ("layer_types" in good and layers not in (None, len(kinds))):
        found.append(f"layer_types must list {layers or 'num_hidden_layers'} times '{SLIDING}' or '{FULL}'")
    heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
    if heads % kv_heads:
        found.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if cfg.head_dim % 2:
        found.append(f"head_dim {cfg.head_dim} is odd; rotary embeddings rotate pairs")
    if heads * cfg.head_dim > LARGEST:
        found.append(f"num_attention_heads {heads} times head_dim {cfg.head_dim} is above {LARGEST:,}")
    matrices = 2 * heads * cfg.head_dim + 3 * cfg.intermediate_size
    parameters = cfg.hidden_size * (cfg.vocab_size + cfg.num_hidden_layers * matrices)
    if parameters > MOST_PARAMETERS:
        found.append(
            f"these sizes make about {parameters:.0e} parameters; at most {MOST_PARAMETERS:.0e} can be right"
        )
    if cfg.hidden_activation != "gelu_pytorch_tanh":
        found.append(f"hidden_activation {cfg.hidden_activation!r} is not Gemma 3's 'gelu_pytorch_tanh'")
    if raw.get("use_bidirectional_attention"):
        found.append(
            "use_bidirectional_attention is set: this is an embedding model (EmbeddingGemma), which cannot "
            "generate"
        )
    return found
