"""Folders for transformers, PEFT and the hub: an adapter, or one model with the adapter merged in, each with
its tokenizer and a model card.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Source:
    """What is exported: a base (its name, revision and folder), its adapter if there is one, and what is
    known of their origin, {key: text}.
    """

    name: str
    revision: str
    folder: Path
    adapter: Path | None
    origin: dict[str, str] = field(default_factory=dict)


def write_peft(source: Source, folder: Path, title: str) -> str:
    """adapter_model.safetensors, adapter_config.json, tokenizer and README.md into an empty folder; returns
    what was written, in words.
    """
    from torch import nn

    from exporting.merged import MergedCheckpoint
    from exporting.target import need_space
    from lora.peft_io import save_adapter
    from model.weights import copy_tokenizer

    if source.adapter is None:
        raise ValueError(
            f"{source.name} has no adapter to export (a full run trains every weight); give --adapter, or "
            f"--to safetensors for the model"
        )
    merged = MergedCheckpoint(
        source.folder, source.adapter
    )  # the adapter fits; its layers have shapes and no numbers yet
    need_space(folder, 4 * sum(t.numel() for t in merged.tensors.values()) + 2**24)
    for path, layer in merged.layers.items():
        for key, _ in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(merged.tensors[f"{path}.{key}"]))
    config, revision = merged.adapter, None if source.revision == "main" else source.revision
    save_adapter(
        merged.checkpoint.model, folder, base_model_name=source.name, config=config | {"revision": revision}
    )
    copy_tokenizer(source.folder, folder)
    sizes = f"r = {config['r']}, lora_alpha = {config['lora_alpha']:g}"
    kind = f"{'DoRA' if config.get('use_dora') else 'LoRA'} adapter ({sizes})"
    (folder / "README.md").write_text(model_card(source, title, kind, "peft"), encoding="utf-8")
    return f"{kind} of {source.name}, for PEFT"


def write_safetensors(source: Source, folder: Path, title: str) -> str:
    """config.json, float32 weights in shards of 5 GB, generation settings, tokenizer and README.md; returns
    what was written, in words.

    Float32 because a delta below half a bfloat16 step would vanish in the merge; a tensor is in memory at a
    time.
    """
    import torch

    from exporting.merged import MergedCheckpoint
    from exporting.target import need_space
    from model.tokenizer import Tokenizer
    from model.weights import copy_tokenizer, save_tensors

    tokenizer, merged = Tokenizer(source.folder), MergedCheckpoint(source.folder, source.adapter)
    need_space(folder, 4 * sum(math.prod(shape) for shape in merged.shapes.values()) + 2**24)
    norms, words = merged.norms() if source.adapter else {}, "nothing to merge"
    if norms:
        largest = max(norms, key=norms.get)
        change = f"{math.hypot(*norms.values()):.4g} (Frobenius norm), most {largest} by {norms[largest]:.4g}"
        words = f"merged {len(norms)} layers, which changed by {change}"
    save_tensors(merged.config, merged.pieces, folder, torch.float32)
    copy_tokenizer(source.folder, folder)
    write_generation_config(folder, tokenizer)
    (folder / "README.md").write_text(
        model_card(source, title, "model, its adapter merged in" if norms else "model", "transformers"),
        encoding="utf-8",
    )
    parameters = sum(math.prod(shape) for shape in merged.shapes.values())
    return f"{parameters / 1e6:.2f} M parameters in float32, {words}"


def write_generation_config(folder: Path, tokenizer) -> None:
    """generation_config.json, where the base has none: without it others do not stop at the end of the
    model's turn.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        settings = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": sorted(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad_id,
        }
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


LOADERS = {
    "peft": "from peft import AutoPeftModelForCausalLM as AutoModel",
    "transformers": "from transformers import AutoModelForCausalLM as AutoModel",
}


def model_card(source: Source, title: str, kind: str, library: str) -> str:
    """README.md: what it is, how it is loaded, where it comes from and, after a run, what it measured."""
    base = source.origin["base"]  # after a full run not source.name, which is the run's own model
    front = [
        "---",
        *([f"base_model: {base}"] if "/" in base else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
    ]
    front += (
        ["license: gemma"] if "gemma" in base.lower() else ["license: apache-2.0"] if base == "tiny" else []
    )  # the embedded model's is Loupe's own
    lines = [
        *front,
        "---",
        "",
        f"# {title}",
        "",
        f"A {kind}, from the base `{base}`, written by Loupe. The licence of the base model holds for what "
        f"is made from it.",
        "",
        "```python",
        LOADERS[library],
        "from transformers import AutoTokenizer",
        "",
        f'model = AutoModel.from_pretrained("{title}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        "```",
        "",
    ]
    measures = source.origin.get("measures")
    if measures:
        lines += ["Measured on held-out rows:", "", "```", measures, "```", ""]
    rest = {key: text for key, text in source.origin.items() if key not in ("measures", "config")}
    return "\n".join(lines + [f"- {key}: `{text}`" for key, text in rest.items()] + [""] * bool(rest))
