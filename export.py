"""A model or adapter for other programs: python export.py --run DIR | --model M [--adapter DIR] --to peft|safetensors --out PATH [--force]"""

import argparse
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from training.cli import run


def main(argv: list[str] | None = None) -> int:
    """source -> model -> adapter -> folder.  Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    args = parse_arguments(argv)
    return run(lambda: export(args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description="Write what was trained as other programs read it.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a folder that train.py wrote")
    source.add_argument("--model", metavar="M", help="tiny (the embedded one), a folder, or a hub id such as google/gemma-3-270m-it")
    parser.add_argument("--revision", metavar="R", help="with --model: branch, tag or commit on the hub (default main)")
    parser.add_argument("--adapter", metavar="DIR", help="with --model: a LoRA or DoRA adapter, a run's adapter/ folder or PEFT's")
    parser.add_argument("--to", required=True, choices=["peft", "safetensors"],
                        help="peft: the adapter, for PEFT; safetensors: one model with the adapter merged in, for transformers and others")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier export that is there")
    args = parser.parse_args(argv)
    for flag, value in (("--adapter", args.adapter), ("--revision", args.revision)):
        if args.run and value:
            parser.error(f"{flag} goes with --model; a --run has its own")
    return args


def export(args: argparse.Namespace) -> int:
    out = Path(args.out).resolve()
    refuse_existing(out, args.force)
    source = of_run(Path(args.run)) if args.run else of_model(args.model, args.adapter, args.revision or "main")
    if out in (source.folder.resolve(), source.adapter and source.adapter.resolve()):
        raise ValueError(f"{out} is what is exported; give another --out")
    (write_peft if args.to == "peft" else write_safetensors)(source, out)
    return 0


@dataclass
class Source:
    """What is exported: a base (its name and folder), its adapter if there is one, and the run's manifest.json."""

    name: str
    revision: str
    folder: Path
    adapter: Path | None
    manifest: dict = field(default_factory=dict)


def of_model(name: str, adapter: str | None, revision: str = "main") -> Source:
    from model.hub import resolve

    folder = resolve(name, revision)
    # PEFT looks the name up: "tiny" would be a model on the hub to it
    return Source(str(folder) if name == "tiny" else name, revision, folder, Path(adapter) if adapter else None)


def of_run(path: Path) -> Source:
    """The base and adapter of a run, or the model of one that trained every weight; ValueError where there is neither, or the base has changed."""
    from model.weights import hash_model
    from training.config import load_config

    if not (path / "config.toml").is_file():
        raise ValueError(f"{path}: no run is here; give the folder that train.py wrote, which holds config.toml, such as runs/small")
    cfg = load_config(path / "config.toml")
    trained = path / ("model" if cfg.adapter.type == "full" else "adapter")
    if not trained.is_dir():
        raise ValueError(f"{path}: the run has no {trained.name}/ yet; let it train to its first evaluation or its end (train.py --resume)")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8")) if (path / "manifest.json").is_file() else {}
    if trained.name == "model":
        return Source(str(trained), "main", trained, None, manifest)
    source = of_model(cfg.model.name, str(trained), cfg.model.revision)
    source.manifest = manifest
    if manifest and manifest["base_sha256"] != hash_model(source.folder):
        raise ValueError(f"{path}: its adapter was trained on other weights than {source.folder} holds now; put those back, or export all the same "
                         f"with --model {cfg.model.name} --revision {cfg.model.revision} --adapter {trained}")
    return source


def write_peft(source: Source, out: Path) -> None:
    """adapter_model.safetensors, adapter_config.json, tokenizer and README.md: what PEFT loads and a hub shows."""
    import torch

    from lora.peft_io import load_adapter, save_adapter
    from model.weights import copy_tokenizer, load_model
    from training.progress import say

    if source.adapter is None:
        raise ValueError(f"{source.name} has no adapter to export (a full run trains every weight); give --adapter, or --to safetensors for the model")
    model = load_model(source.folder, torch.bfloat16)  # only its layers' names and shapes are wanted, to see that the adapter fits
    config = load_adapter(model, source.adapter)
    revision = None if source.revision == "main" else source.revision
    with new_folder(out) as folder:
        save_adapter(model, folder, base_model_name=source.name, config=config | {"revision": revision})
        copy_tokenizer(source.folder, folder)
        (folder / "README.md").write_text(model_card(source, out.name, config), encoding="utf-8")
    say(f"{out}: {'DoRA' if config.get('use_dora') else 'LoRA'} adapter of {source.name}, r = {config['r']}, for PEFT")


def write_safetensors(source: Source, out: Path) -> None:
    """The model in float32 with its adapter merged in, config, generation settings and tokenizer: what transformers loads."""
    import torch

    from lora.merge import merge
    from lora.peft_io import load_adapter
    from model.tokenizer import Tokenizer
    from model.weights import copy_tokenizer, load_model, save_model
    from training.progress import say

    tokenizer = Tokenizer(source.folder)
    model = load_model(source.folder, torch.float32)  # a delta below half a bfloat16 step would vanish in the merge
    norms = {}
    if source.adapter:
        load_adapter(model, source.adapter)
        norms = merge(model)
    with new_folder(out) as folder:
        save_model(model, folder, torch.float32)
        copy_tokenizer(source.folder, folder)
        write_generation_config(folder, tokenizer)
    if norms:
        largest = max(norms, key=norms.get)
        say(f"merged {len(norms)} layers: they changed by {math.hypot(*norms.values()):.4g} (Frobenius norm), most {largest} by {norms[largest]:.4g}")
    say(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters in float32, {'merged' if norms else 'nothing to merge'}")


def write_generation_config(folder: Path, tokenizer) -> None:
    """generation_config.json, where the base has none: without it others do not stop at the end of the model's turn."""
    path = folder / "generation_config.json"
    if not path.exists():
        settings = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_card(source: Source, title: str, config: dict) -> str:
    """README.md of an adapter: what it is, how it is loaded and, after a run, what it measured."""
    from training.metrics import before_after_table

    on_hub = not Path(source.name).is_dir()
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    lines = ["---", *([f"base_model: {source.name}"] if on_hub else []), "library_name: peft", "pipeline_tag: text-generation", "---", "", f"# {title}", "",
             f"A {kind} adapter (r = {config['r']}, lora_alpha = {config['lora_alpha']:g}) for `{source.name if on_hub else source.folder.name}`, trained "
             "with Loupe. The licence of the base model holds for what is made from it.", "", "```python", "from peft import AutoPeftModelForCausalLM",
             "from transformers import AutoTokenizer", "", f'model = AutoPeftModelForCausalLM.from_pretrained("{title}")',
             f'tokenizer = AutoTokenizer.from_pretrained("{title}")', "```", ""]
    if source.manifest:
        lines += ["Measured on held-out rows:", "", "```", before_after_table(source.manifest["before"], source.manifest["after"]), "```", ""]
    return "\n".join(lines)


def refuse_existing(out: Path, force: bool) -> None:
    """ValueError for a path that is taken, and under --force too for anything that does not look like an export."""
    if not out.exists():
        return
    if not force:
        raise ValueError(f"{out} exists already; give another --out, or add --force to replace it")
    names = {p.name for p in out.iterdir()} if out.is_dir() else {"a file"}
    if names and (not names & {"config.json", "adapter_config.json"} or any(p.is_dir() for p in out.iterdir())):
        raise ValueError(f"{out} is no earlier export, so --force does not replace it; give another --out")


@contextmanager
def new_folder(out: Path):
    """A temporary folder beside `out` that takes its place when the block ends well; otherwise all is as it was."""
    made = [p for p in out.parents if not p.exists()]
    partial, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except BaseException as e:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(e, OSError):
            raise ValueError(f"{out} cannot be written ({e.strerror}); make room there, or give another --out") from e
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
