"""Gemma3Config: the keys of a checkpoint's config.json, old style or new, text-only or inside the multimodal wrapper."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT_KEYS_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings")


@dataclass
class Gemma3Config:
    """A Gemma 3 text model's architecture, named as in Hugging Face's Gemma3TextConfig; defaults are that class's, since published files omit them."""

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
        """What the scores q.k are multiplied with: query_pre_attn_scalar ** -0.5."""
        return self.query_pre_attn_scalar**-0.5

    def to_json(self) -> dict:
        """A config.json of type gemma3_text that Hugging Face's Gemma3TextConfig reads back to the same architecture."""
        out = asdict(self)
        full = {"rope_type": "default", "rope_theta": out.pop("rope_theta")}
        factor = out.pop("rope_linear_factor")
        if factor != 1.0:
            full |= {"rope_type": "linear", "factor": factor}
        local = {"rope_type": "default", "rope_theta": out.pop("rope_local_base_freq")}
        return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **out, "rope_parameters": {FULL: full, SLIDING: local}}


def read_config(folder: str | Path) -> Gemma3Config:
    """Reads config.json in `folder` (a text model's, or the text_config of a multimodal one's); raises ValueError naming every bad key at once."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a model folder holds config.json, tokenizer.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download the model again") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(f"{path}: model_type is {kind!r}; Loupe knows Gemma 3 only ('gemma3' or 'gemma3_text')")
    return parse_config(_text_part(raw), str(path))


def _text_part(raw: dict) -> dict:
    """The text model's keys; ids that the multimodal wrapper keeps at its top level are brought along."""
    if raw["model_type"] == "gemma3_text":
        return raw
    text = dict(raw.get("text_config") or {})
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if raw.get(key) is not None:
            text.setdefault(key, raw[key])
    return text


def parse_config(raw: dict, where: str = "config.json") -> Gemma3Config:
    """Turns config.json's keys into a Gemma3Config; raises ValueError that lists every missing or impossible value."""
    known = {k: raw[k] for k in Gemma3Config.__dataclass_fields__ if raw.get(k) is not None}
    problems = [f"{k} is missing" for k in TEXT_KEYS_REQUIRED if k not in known]
    problems += [f"{k} is {known[k]!r}; it must be a whole number of 1 or more" for k in SIZES if k in known and not _is_size(known[k])]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    cfg = Gemma3Config(**known)
    _read_rope(raw, cfg, problems)
    if not cfg.layer_types:
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
        cfg.layer_types = [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(cfg.num_hidden_layers)]
    problems += _impossible(cfg, raw)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return cfg


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read_rope(raw: dict, cfg: Gemma3Config, problems: list[str]) -> None:
    """Both styles: flat rope_theta, rope_local_base_freq, rope_scaling; or rope_parameters by layer type (transformers 5)."""
    new = raw.get("rope_parameters") or {}
    full, local = new.get(FULL) or {}, new.get(SLIDING) or {}
    cfg.rope_theta = float(full.get("rope_theta", cfg.rope_theta))
    cfg.rope_local_base_freq = float(local.get("rope_theta", cfg.rope_local_base_freq))
    for key, scaling in (("rope_scaling", raw.get("rope_scaling") or {}), ("rope_parameters", full)):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "linear":
            cfg.rope_linear_factor = float(scaling["factor"])
        elif kind != "default":
            problems.append(f"{key} has the type {kind!r}; Gemma 3 uses 'linear' or none")


def _impossible(cfg: Gemma3Config, raw: dict) -> list[str]:
    found = []
    if len(cfg.layer_types) != cfg.num_hidden_layers or not set(cfg.layer_types) <= {SLIDING, FULL}:
        found.append(f"layer_types must list {cfg.num_hidden_layers} times '{SLIDING}' or '{FULL}'")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        found.append(f"num_attention_heads {cfg.num_attention_heads} is no multiple of num_key_value_heads {cfg.num_key_value_heads}")
    if cfg.head_dim % 2:
        found.append(f"head_dim {cfg.head_dim} is odd; rotary embeddings turn pairs")
    if cfg.hidden_activation != "gelu_pytorch_tanh":
        found.append(f"hidden_activation {cfg.hidden_activation!r} is not Gemma 3's 'gelu_pytorch_tanh'")
    if raw.get("use_bidirectional_attention"):
        found.append("use_bidirectional_attention is set; this is an embedding model (EmbeddingGemma), which does not generate")
    return found
