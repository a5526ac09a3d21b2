"""Writes folders that transformers or PEFT can load: the weights, the tokenizer and a model card."""

import json
import math
from pathlib import Path

import torch
from torch import nn

from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import need_space
from lora.peft_io import save_adapter
from model.tokenizer import Tokenizer
from model.weights import copy_tokenizer, save_tensors

LOADERS = {
    "peft": "from peft import AutoPeftModelForCausalLM as AutoModel",
    "transformers": "from transformers import AutoModelForCausalLM as AutoModel",
}
CARD = """\
# {title}

A {kind}, from the base `{base}`, written by Loupe. The licence of the base model \
holds for what is made from it.

```python
{loader}
from transformers import AutoTokenizer

model = AutoModel.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```
"""


def export_peft(source: Source, folder: Path, title: str) -> str:
    """Writes the adapter in PEFT's format, the tokenizer and README.md to `folder`; returns a summary.

    Raises ValueError if the source has no adapter, as after training all weights.
    """
    if source.adapter is None:
        raise ValueError(
            f"{source.name} has no adapter to export (a full run trains every weight); give --adapter, or "
            "--to safetensors for the model"
        )
    merged = MergedCheckpoint(source.folder, source.adapter)
    need_space(folder, 4 * sum(t.numel() for t in merged.tensors.values()))
    for path, layer in merged.layers.items():  # these have shapes and no values yet
        for key, _ in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(merged.tensors[f"{path}.{key}"]))
    config = merged.adapter | {"revision": None if source.revision == "main" else source.revision}
    save_adapter(merged.checkpoint.model, folder, base_model_name=source.name, config=config)
    copy_tokenizer(source.folder, folder)
    sizes = f"r = {config['r']}, lora_alpha = {config['lora_alpha']:g}"
    kind = f"{'DoRA' if config.get('use_dora') else 'LoRA'} adapter ({sizes})"
    write_model_card(source, folder, title, kind, "peft")
    return f"{kind} of {source.name}, for PEFT"


def export_safetensors(source: Source, folder: Path, title: str) -> str:
    """Writes a folder for transformers: the model, with its adapter merged in. Returns a summary.

    The weights are float32, because rounding to bfloat16 would lose small changes by the adapter. They are in
    shards of up to 5 GB, and one tensor is in memory at a time.
    """
    tokenizer, merged = Tokenizer(source.folder), MergedCheckpoint(source.folder, source.adapter)
    need_space(folder, 4 * merged.parameters)
    norms, change = merged.norms() if source.adapter else {}, "nothing to merge"
    if norms:
        largest = max(norms, key=lambda path: norms[path])
        change = f"merged {len(norms)} layers, which changed by {math.hypot(*norms.values()):.4g} (Frobenius "
        change += f"norm), most {largest} by {norms[largest]:.4g}"
    save_tensors(merged.config, merged.pieces, folder, torch.float32)
    copy_tokenizer(source.folder, folder)
    write_generation_config(folder, tokenizer)
    kind = "model, its adapter merged in" if norms else "model"
    write_model_card(source, folder, title, kind, "transformers")
    return f"{merged.parameters / 1e6:.2f} M parameters in float32, {change}"


def write_generation_config(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes generation_config.json with the stop tokens for transformers, unless `folder` has this file."""
    path = folder / "generation_config.json"
    if not path.exists():
        stops = sorted(tokenizer.stop_ids)
        settings = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_model_card(source: Source, folder: Path, title: str, kind: str, library: str) -> None:
    """Writes README.md: how to load the model, its base, its hashes and, after a run, the run's scores."""
    base = source.origin["base"]  # After a full run, source.name is the run's own model.
    front = [f"base_model: {base}"] if "/" in base else []
    front += [f"library_name: {library}", "pipeline_tag: text-generation"]
    if "gemma" in base.lower() or base == "tiny":
        front.append(f"license: {'apache-2.0' if base == 'tiny' else 'gemma'}")
    card = CARD.format(title=title, kind=kind, base=base, loader=LOADERS[library])
    lines = ["---", *front, "---", "", card]
    if "measures" in source.origin:
        lines += ["Measured on held-out rows:", "", "```", source.origin["measures"], "```", ""]
    shown = {key: text for key, text in source.origin.items() if key not in ("measures", "config")}
    lines += [f"- {key}: `{text}`" for key, text in shown.items()]
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
