"""The model, adapter, device and dtype that three of the entry scripts ask for."""

import argparse
from dataclasses import dataclass
from pathlib import Path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --adapter, --device, --dtype, as `load` reads them."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="tiny (the embedded one), a folder, or a hub id such as google/gemma-3-270m-it",
    )
    parser.add_argument(
        "--revision",
        default="main",
        metavar="R",
        help="branch, tag or commit on the hub (default %(default)s)",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a LoRA or DoRA adapter: a run's adapter/ folder, or PEFT's"
    )
    parser.add_argument(
        "--device", default="auto", help='"auto" (CUDA where there is one), "cpu", "cuda:1", ...'
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="type of the weights and sums (default: by device)",
    )


@dataclass
class Loaded:
    """A model with its adapter in it, on its device, its tokenizer, the folder of the base, and how numbers
    are kept.
    """

    model: object
    tokenizer: object
    folder: Path
    precision: object


def load(args: argparse.Namespace) -> Loaded:
    """The weights are loaded here, after the command line was found good."""
    from common.device import Precision, pick_device
    from lora.peft_io import load_adapter
    from model.hub import resolve
    from model.tokenizer import Tokenizer
    from model.weights import load_model

    device = pick_device(args.device)
    precision = Precision({"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, "auto"), device)
    folder = resolve(args.model, args.revision)
    tokenizer = Tokenizer(folder)
    model = load_model(folder, precision.dtype, device)
    if args.adapter:
        load_adapter(model, args.adapter)
    return Loaded(model, tokenizer, folder, precision)
