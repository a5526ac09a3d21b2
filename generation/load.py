"""Command-line options that name a model and an adapter, and a function that loads both."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import moved

if TYPE_CHECKING:  # --help must not wait for torch.
    from common.device import Precision
    from model.gemma3 import Gemma3ForCausalLM
    from model.tokenizer import Tokenizer


QUANTIZE = ["none", "keep", "q8_0", "q6_k", "q5_0", "q4_k", "nf4"]


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the options that load_for_inference reads; --model may be left out if it is not `required`."""
    add = parser.add_argument
    add(
        "--model",
        type=moved,
        required=required,
        metavar="M",
        help="tiny (embedded), a folder, a .gguf file, or a hub id: google/gemma-3-270m-it",
    )
    add("--revision", default="main", metavar="R", help="branch, tag or commit on the hub (%(default)s)")
    add("--adapter", metavar="DIR", help="a LoRA or DoRA adapter: a run's adapter/ folder, or PEFT's")
    add("--device", default="auto", help='"auto" (CUDA if there is one), "cpu", "cuda:1", ...')
    dtypes = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=dtypes, help="dtype of the weights (default: by device)")
    about = "block type of the base, as model.quantize in training (%(default)s: that of a GGUF file)"
    add("--quantize", default="keep", choices=QUANTIZE, help=about)


@dataclass
class LoadedModel:
    """A model on its device (with an adapter, if one was named), its tokenizer, folder and precision."""

    model: "Gemma3ForCausalLM"
    tokenizer: "Tokenizer"
    folder: Path  # of the base model
    precision: "Precision"


def load_for_inference(args: argparse.Namespace) -> LoadedModel:
    """Loads the model and the adapter that the parsed options of add_model_arguments name."""
    from common.device import Precision, pick_device
    from lora.peft_io import load_adapter
    from model.hub import resolve
    from model.tokenizer import Tokenizer
    from model.weights import load_model

    device = pick_device(args.device)
    precision = Precision({"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, "auto"), device)
    folder = resolve(args.model, args.revision)
    tokenizer = Tokenizer(folder)
    model = load_model(folder, precision.dtype, device, args.quantize)
    if args.adapter is not None:  # "" is an unset variable of a shell
        load_adapter(model, args.adapter)
    return LoadedModel(model, tokenizer, folder, precision)
