"""Says what a checkpoint is that Loupe cannot load, by its config.json and its tensor names, and a remedy."""

import re
from collections.abc import Iterable

CLASSIFIER = (
    "a classifier, whose head gives scores for labels and no text; take the base that it was made from and "
    "train it on rows whose response is the label"
)
UNMERGED = (
    "a model whose adapter is not merged; call merge_and_unload() in PEFT before save_pretrained(), or take "
    "the base and the adapter's own folder (--adapter)"
)
QUANTIZED = (
    "a {kind} checkpoint, whose values are rounded already; take the model that it was made from. To save "
    'memory, model.quantize = "nf4" (or --quantize nf4) quantizes that one when it is loaded'
)
# {part of a tensor's name: what a checkpoint with it is}
TENSORS = {
    r"\.(absmax|quant_map|quant_state\..*|SCB)$": QUANTIZED.format(kind="bitsandbytes"),
    r"\.(qweight|qzeros|g_idx|scales|biases|weight_packed|weight_scale\w*)$": QUANTIZED.format(
        kind="quantized"
    ),
    r"\.(lora_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.": UNMERGED,
    r"^(score|classifier|qa_outputs)\.": CLASSIFIER,
}


def foreign_config(raw: dict) -> str:
    """Returns what kind of checkpoint a config.json names that Loupe cannot load, with a remedy, or ""."""
    # transformers writes "quantization_config", mlx-lm "quantization".
    settings = raw.get("quantization_config") or raw.get("quantization")
    if settings:
        known = settings if isinstance(settings, dict) else {}
        method = known.get("quant_method") or ("MLX" if "group_size" in known else "quantized")
        four, eight = known.get("load_in_4bit"), known.get("load_in_8bit")
        bits = known.get("bits") or (4 if four else 8 if eight else None)
        return QUANTIZED.format(kind=f"{method} {bits}-bit" if bits else method)
    names = raw.get("architectures")
    heads = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    if isinstance(names, list) and any(str(name).endswith(heads) for name in names):
        return f"{names[0]}: {CLASSIFIER}"
    return ""


def foreign_tensors(names: Iterable[str]) -> str:
    """Returns what kind of checkpoint has tensors of these names, with a remedy, or ""."""
    names = list(names)
    found = ((name, kind) for part, kind in TENSORS.items() for name in names if re.search(part, name))
    return next((f"{name}: {kind}" for name, kind in found), "")
