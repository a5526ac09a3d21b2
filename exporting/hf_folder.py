"""Writes folders that transformers or PEFT can load: the weights, the tokenizer and a model card."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import need_space
from lora.peft_io import save_adapter
from model.chat_template import save_tokenizer
from model.tokenizer import Tokenizer
from model.weights import save_tensors

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}  # by --quant
# PEFT leaves a model the base's stop tokens, and a pre-trained base does not stop at <end_of_turn>.
LOADERS = {
    "peft": """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained("{title}")
model.generation_config = GenerationConfig.from_pretrained("{title}")""",
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")""",
}
CARD = """\
# {title}

A {kind}, from the base `{base}`, written by Loupe. The licence of the base model \
holds for what is made from it.

```python
{loader}
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
    save_tokenizer(Tokenizer(source.folder), folder)
    sizes = f"r = {config['r']}, lora_alpha = {config['lora_alpha']:g}"
    kind = f"{'DoRA' if config.get('use_dora') else 'LoRA'} adapter ({sizes})"
    write_model_card(source, folder, title, kind, "peft")
    return f"{kind} of {source.name}, for PEFT"


def export_safetensors(source: Source, folder: Path, title: str, quant: str = "f32") -> str:
    """Writes a folder for transformers: the model, with its adapter merged in. Returns a summary.

    The weights are in shards of up to 5 GB, and one tensor is in memory at a time.

    Args:
        quant: a key of DTYPES. "bf16" and "f16" round away small changes by the adapter.

    Raises ValueError if a weight is too large for the dtype, or not finite.
    """
    dtype = DTYPES[quant]
    tokenizer, merged = Tokenizer(source.folder), MergedCheckpoint(source.folder, source.adapter)
    need_space(folder, dtype.itemsize * merged.parameters)
    norms, change = merged.norms() if source.adapter else {}, "nothing to merge"
    if norms:
        largest = max(norms, key=lambda path: norms[path])
        change = f"merged {len(norms)} layers, which changed by {math.hypot(*norms.values()):.4g} (Frobenius "
        change += f"norm), most {largest} by {norms[largest]:.4g}"

    def read(name: str) -> Iterator[torch.Tensor]:
        for piece in merged.pieces(name):
            if not piece.to(dtype).isfinite().all():
                raise ValueError(
                    f"{source.folder}: {name} has a value that {quant} cannot hold; use --quant f32"
                )
            yield piece

    save_tensors(merged.config, read, folder, dtype)
    save_tokenizer(tokenizer, folder)
    kind = "model, its adapter merged in" if norms else "model"
    write_model_card(source, folder, title, kind, "transformers")
    return f"{merged.parameters / 1e6:.2f} M parameters in {str(dtype).removeprefix('torch.')}, {change}"


def write_model_card(source: Source, folder: Path, title: str, kind: str, library: str) -> None:
    """Writes README.md: how to load the model, its base, its hashes and, after a run, the run's scores."""
    base = source.origin["base"]  # After a full run, source.name is the run's own model.
    front = [f"base_model: {base}"] if "/" in base else []
    front += [f"library_name: {library}", "pipeline_tag: text-generation"]
    if "gemma" in base.lower() or base == "tiny":
        front.append(f"license: {'apache-2.0' if base == 'tiny' else 'gemma'}")
    card = CARD.format(title=title, kind=kind, base=base, loader=LOADERS[library].format(title=title))
    lines = ["---", *front, "---", "", card]
    if "measures" in source.origin:
        lines += ["Measured on held-out rows:", "", "```", source.origin["measures"], "```", ""]
    shown = {key: text for key, text in source.origin.items() if key not in ("measures", "config")}
    lines += [f"- {key}: `{text}`" for key, text in shown.items()]
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
