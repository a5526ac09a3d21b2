"""Writes folders that transformers or PEFT can load: the weights, the tokenizer and a model card."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import SIGNATURE, need_space
from lora.peft_io import save_adapter
from model.chat_template import save_tokenizer
from model.config import FULL, Gemma3Config
from model.gguf_weights import USUAL_PATTERN
from model.hub import HUB_GGUF
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
    "gguf": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({where})
model = PeftModel.from_pretrained(base, "{title}")
model.generation_config = GenerationConfig.from_pretrained("{title}")""",
}
CARD = """\
# {title}

A {kind}, from the base `{base}`, {signature}. The licence of the base model \
holds for what is made from it.
{remark}
```python
{loader}
tokenizer = AutoTokenizer.from_pretrained("{title}")
```
"""
# What a PEFT adapter's card says of a base that is a GGUF file.
READ = "transformers dequantizes `{file}`, from {place}, to float32:"
NOT_READ = """\
transformers cannot read `{file}` as it is ({reason}). Loupe writes it as a folder for transformers: \
`python export.py --model {file} --to safetensors --out base`. Then:"""


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
    write_model_card(source, folder, title, kind, "peft", merged.config)
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
            if not piece.isfinite().all():
                raise ValueError(f"{source.folder}: {name} has an infinity or NaN; take another copy or step")
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


def load_gguf_base(source: Source, config: Gemma3Config) -> tuple[str, str]:
    """Returns a remark on a GGUF base, and the arguments with which transformers loads it.

    transformers (modeling_gguf_pytorch_utils.py) reads one file, and only some keys of it: everything else
    must have the default of its Gemma3TextConfig, or the model would compute something else.
    """
    file = source.gguf[0].name
    usual = [(i + 1) % USUAL_PATTERN == 0 for i in range(config.num_hidden_layers)]
    reasons = {
        "it is one part of several": len(source.gguf) > 1,
        "it ignores the scaling of RoPE": config.rope_linear_factor != 1.0,
        "it ignores the frequencies of RoPE": (config.rope_theta, config.rope_local_base_freq) != (1e6, 1e4),
        "it ignores the scale of the scores": config.query_pre_attn_scalar != 256,
        "it ignores the pattern of layers": [kind == FULL for kind in config.layer_types] != usual,
        "it ignores the cap on the logits": config.final_logit_softcapping is not None,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return "\n" + NOT_READ.format(file=file, reason=reason) + "\n", '"base"'
    hub = "/" in source.name
    place = f"the hub's `{source.name}`" if hub else "the current folder"
    where = f'"{source.name if hub else "."}", gguf_file="{file}"'
    return "\n" + READ.format(file=file, place=place) + "\n", where


def write_model_card(
    source: Source, folder: Path, title: str, kind: str, library: str, config: Gemma3Config | None = None
) -> None:
    """Writes README.md: how to load the model, its base, its hashes and, after a run, the run's scores.

    `config` is that of the base, which the card of an adapter needs.
    """
    base = source.origin["base"]  # After a full run, source.name is the run's own model.
    hub_file = HUB_GGUF.fullmatch(base)
    front = [f"base_model: {hub_file[1] if hub_file else base}"] if "/" in base else []
    front += [f"library_name: {library}", "pipeline_tag: text-generation"]
    if "gemma" in base.lower() or base == "tiny":
        front.append(f"license: {'apache-2.0' if base == 'tiny' else 'gemma'}")
    remark, loader = "", LOADERS[library]
    if config and source.gguf:
        remark, where = load_gguf_base(source, config)
        loader = LOADERS["gguf"].replace("{where}", where)
    loader = loader.replace("{title}", title)
    card = CARD.format(signature=SIGNATURE, title=title, kind=kind, base=base, remark=remark, loader=loader)
    lines = ["---", *front, "---", "", card]
    if "measures" in source.origin:
        lines += ["Measured on held-out rows:", "", "```", source.origin["measures"], "```", ""]
    shown = {key: text for key, text in source.origin.items() if key not in ("measures", "config")}
    lines += [f"- {key}: `{text}`" for key, text in shown.items()]
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
