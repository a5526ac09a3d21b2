"""Writes a trained model or its adapter in the format of another program.

python export.py --run DIR | --model M [--adapter DIR] --to FORMAT --out PATH
"""

import argparse
import sys
from pathlib import Path

from common.errors import DONE, FAILED, run
from common.files import moved

FORMATS = {
    "gguf": "one file for llama.cpp, adapter merged",
    "gguf-lora": "the adapter alone for llama.cpp's --lora",
    "ollama": "a GGUF file and its Modelfile; a GGUF base stays as it is, LoRA beside it, without --quant",
    "oci": "an artifact for Docker Model Runner",
    "peft": "the adapter",
    "safetensors": "the merged model for transformers",
    "hub": "that folder, uploaded",
}
WITH_GGUF, AS_FOLDER = ("gguf", "ollama", "oci"), ("safetensors", "hub")
FLOATS = ["f32", "f16", "bf16"]
QUANTS = [*FLOATS, "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0", "q4_k_m", "q4_k", "q4_0"]


def main(argv: list[str] | None = None) -> int:
    """Runs the export and returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    args = parse_arguments(argv)
    return run(lambda: export(args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the parsed options; exits with code 2 if two options exclude each other."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write a trained model in the format of another program."
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a folder that train.py wrote")
    models = "tiny (embedded), a folder, a .gguf file, or a hub id such as google/gemma-3-270m-it"
    source.add_argument("--model", type=moved, metavar="M", help=models)
    add("--revision", metavar="R", help="with --model: branch, tag or commit on the hub (default main)")
    add("--adapter", metavar="DIR", help="with --model: a LoRA or DoRA adapter, a run's adapter/ or PEFT's")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    add("--to", required=True, choices=list(FORMATS), help=formats)
    paths = "the file or folder to write; oci also: registry/name:tag; hub: user/name"
    add("--out", required=True, metavar="PATH", help=paths)
    types = f"type of the weights: in a GGUF one of {', '.join(QUANTS)} (default q8_0); safetensors and hub: "
    types += f"{', '.join(FLOATS)} (default f32)"
    add("--quant", type=str.lower, choices=QUANTS, metavar="TYPE", help=types)
    verify = "llama.cpp: compare a GGUF in llama.cpp too, after our own comparison; gguf-lora beside a base "
    verify += "that is a GGUF file (needs xllamacpp)"
    add("--verify", choices=["loupe", "llama.cpp"], help=verify)
    tokens = "oci: the tokens for which Docker Model Runner reserves memory (default: all of the model's)"
    add("--context-size", type=int, metavar="N", help=tokens)
    add("--no-verify", action="store_true", help="do not compare a GGUF with the model; the file says so")
    add("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    for flag, value in (("--adapter", args.adapter), ("--revision", args.revision)):
        if args.run is not None and value is not None:
            parser.error(f"{flag} goes with --model; a --run has its own")
    if args.verify and args.no_verify:
        parser.error("--verify and --no-verify exclude each other")
    checked = (*WITH_GGUF, "gguf-lora")
    for flag, value, fits in (("--no-verify", args.no_verify, WITH_GGUF), ("--verify", args.verify, checked)):
        if value and args.to not in fits:
            parser.error(f"{flag} goes with --to {', '.join(fits)}")
    allowed = QUANTS if args.to in WITH_GGUF else FLOATS if args.to in AS_FOLDER else []
    if args.quant and args.quant not in allowed:
        remedy = f"choose {', '.join(allowed)}" if allowed else "leave it out"
        parser.error(f"--quant {args.quant} does not go with --to {args.to}; {remedy}")
    args.merge = args.quant is not None
    args.quant = args.quant or ("q8_0" if args.to in WITH_GGUF else "f32")
    if args.context_size is not None and (args.to != "oci" or args.context_size < 1):
        parser.error("--context-size goes with --to oci, and is a number of tokens, 1 or more")
    args.verify = None if args.no_verify else args.verify or "loupe"
    return args


def export(args: argparse.Namespace) -> int:
    """Writes the model, adapter or run in the format of --to; returns the exit code, 0 or 1."""
    from common.progress import say
    from exporting import gguf_model, hf_folder, hub, llama_cpp, lora_gguf, oci, ollama, registry, target
    from exporting.source import HeldOutRows, from_model, from_run, run_config
    from exporting.verify import NotTheSame
    from training.config import load_config
    from training.run_folder import VERSION

    if args.verify == "llama.cpp":
        llama_cpp.require()
    remote = args.to == "hub" or (args.to == "oci" and registry.is_reference(args.out))
    out = Path(args.out) if remote else Path(args.out).resolve()
    if not remote:
        target.refuse_existing(out, args.force, folder=not args.to.startswith("gguf"))
    if args.run is None:
        source = from_model(args.model, args.adapter, args.revision or "main")
    else:
        cfg = load_config(run_config(Path(args.run)))
        model, data, full = cfg.model, cfg.data, cfg.adapter.type == "full"
        split = (data.validation_fraction, cfg.run.seed)
        rows = HeldOutRows(data.validation, data.train, data.format, data.columns, *split)
        source = from_run(Path(args.run), cfg.run.name, model.name, model.revision, full, rows)
    source.origin = {"version": VERSION} | source.origin
    source.refuse_overwriting(out)
    how = (args.quant, args.verify)
    try:
        with target.scratch() if remote else target.new_path(out) as part:
            if args.to == "gguf":
                summary = gguf_model.export_gguf(source, part, out.stem, *how)
            elif args.to == "gguf-lora":
                summary = lora_gguf.export_lora(source, part, out.stem, args.verify)
            elif args.to == "ollama":
                summary = ollama.export_ollama(source, part, out, *how, args.merge)
            elif args.to == "oci" and remote:
                summary = oci.push_artifact(source, part, args.out, *how, args.context_size)
            elif args.to == "oci":
                summary = oci.export_layout(source, part, out.name.partition(":")[0], *how, args.context_size)
            elif args.to == "peft":
                summary = hf_folder.export_peft(source, part, out.name)
            elif args.to == "safetensors":
                summary = hf_folder.export_safetensors(source, part, out.name, args.quant)
            else:
                summary = hub.export_to_hub(source, part, args.out, args.quant)
    except NotTheSame as e:
        print(f"error: {out} was not written: it differs from the model: {e}", file=sys.stderr)
        return FAILED
    say(f"{args.out if remote else out}: {summary}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
