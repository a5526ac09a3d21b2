"""A model or adapter for other programs: python export.py --run DIR | --model M [--adapter DIR] --to
gguf|gguf-lora|ollama|oci|hub|peft|... --out PATH
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from common.errors import FAILED, run

QUANTS = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0", "q4_k_m", "q4_k", "q4_0"]
EXAMPLE = (
    ("user", "Wie heißt die Hauptstadt von Österreich? Answer in one sentence, s'il vous plaît."),
    (
        "assistant",
        "La capital de Austria es Viena; in inglese <Vienna>, 1 900 000 people (2021) and 23 districts.",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """source -> model and adapter -> file or folder -> checked -> its name.

    Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped.
    """
    args = parse_arguments(argv)
    return run(lambda: export(args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write what was trained as other programs read it."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a folder that train.py wrote")
    source.add_argument(
        "--model",
        metavar="M",
        help="tiny (the embedded one), a folder, or a hub id such as google/gemma-3-270m-it",
    )
    parser.add_argument(
        "--revision", metavar="R", help="with --model: branch, tag or commit on the hub (default main)"
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="with --model: a LoRA or DoRA adapter, a run's adapter/ folder or PEFT's",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=list(WRITERS),
        help="gguf: one file for llama.cpp, adapter merged; gguf-lora: the adapter alone for --lora; "
        "ollama: a GGUF and its Modelfile; oci: an artifact for Docker Model Runner; peft: the adapter; "
        "safetensors: the merged model for transformers; hub: that folder, uploaded",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="the file or folder to write; oci also: registry/name:tag; hub: user/name",
    )
    parser.add_argument(
        "--quant",
        type=str.lower,
        choices=QUANTS,
        metavar="TYPE",
        help=f"type of the weights in a GGUF, one of {', '.join(QUANTS)} (default q8_0)",
    )
    parser.add_argument(
        "--verify",
        choices=["loupe", "llama.cpp"],
        help="llama.cpp: after our own comparison, ask a GGUF in llama.cpp too (needs xllamacpp)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare a GGUF with the model; the file says so"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export that is there")
    args = parser.parse_args(argv)
    for flag, value in (("--adapter", args.adapter), ("--revision", args.revision)):
        if args.run is not None and value is not None:
            parser.error(f"{flag} goes with --model; a --run has its own")
    if args.verify and args.no_verify:
        parser.error("--verify and --no-verify exclude each other")
    for flag, value in (("--quant", args.quant), ("--no-verify", args.no_verify), ("--verify", args.verify)):
        if args.to not in ("gguf", "ollama", "oci") and value:
            parser.error(f"{flag} goes with --to gguf, ollama and oci")
    return args


def export(args: argparse.Namespace) -> int:
    from common.progress import say
    from exporting.llama_cpp import require
    from exporting.target import new_path, refuse_existing, scratch
    from exporting.verify import NotTheSame

    away = args.to == "hub" or (args.to == "oci" and names_a_registry(args.out))
    if args.verify == "llama.cpp":
        require()
    out = Path(args.out) if away else Path(args.out).resolve()
    if not away:
        refuse_existing(out, args.force, folder=not args.to.startswith("gguf"))
    source, cfg = (
        of_run(Path(args.run))
        if args.run is not None
        else (of_model(args.model, args.adapter, args.revision or "main"), None)
    )
    if out in (source.folder.resolve(), source.adapter and source.adapter.resolve()):
        raise ValueError(f"{out} is what is exported; give another --out")
    try:
        with scratch() if away else new_path(out) as part:
            words = WRITERS[args.to](args, source, cfg, part, out)
    except NotTheSame as e:
        print(
            f"error: {out} was not written, because it would not say what the model says: {e}",
            file=sys.stderr,
        )
        return FAILED
    say(f"{args.out if away else out}: {words}")
    return 0


def names_a_registry(out: str) -> bool:
    """Whether --out is registry/name[:tag] or name:tag and not a folder: docker's rule, a first part with a
    dot or a colon in it is a host.
    """
    host, _, rest = out.partition("/")
    is_host = host == "localhost" or ((":" in host or "." in host) and host.strip("."))
    is_path = out.startswith(("/", "./", "../")) or Path(out).exists()
    return not is_path and bool((rest and is_host) or ":" in out.rpartition("/")[2])


def of_model(name: str, adapter: str | None, revision: str = "main"):
    """The Source of a model and an adapter."""
    from common.files import sha256
    from exporting.hf_folder import Source
    from model.hub import resolve
    from model.weights import hash_model
    from training.run_folder import VERSION

    folder = resolve(name, revision).absolute()  # "." has no name
    origin = {"version": VERSION, "base": public_name(name), "base_sha256": hash_model(folder)}
    if adapter is not None and (Path(adapter) / "adapter_model.safetensors").is_file():
        origin["adapter_sha256"] = sha256(Path(adapter) / "adapter_model.safetensors")
    # PEFT looks the name up, from wherever it runs: "tiny" would be a model on the hub to it
    return Source(
        str(folder) if name == "tiny" or is_folder(name) else name,
        revision,
        folder,
        None if adapter is None else Path(adapter),
        origin,
    )


def public_name(model: str) -> str:
    """ "tiny", a hub id, or of a folder the last part: nobody's home folder is published."""
    return Path(os.path.expanduser(model)).absolute().name if is_folder(model) else model


def is_folder(model: str) -> bool:
    return model != "tiny" and Path(os.path.expanduser(model)).is_dir()


def of_run(path: Path):
    """(Source, config) of a run: its adapter, or the model where it trained every weight; ValueError where
    there is neither, or the base has changed.
    """
    from report.metrics_log import before_after_table
    from training.config import load_config

    if not (path / "config.toml").is_file():
        raise ValueError(
            f"{path}: no run is here; give the folder that train.py wrote, which holds config.toml, such as "
            f"runs/small"
        )
    cfg = load_config(path / "config.toml")
    trained = path / ("model" if cfg.adapter.type == "full" else "adapter")
    if not trained.is_dir():
        raise ValueError(
            f"{path}: the run has no {trained.name}/ yet; let it train to its first evaluation or its end "
            f"(train.py --resume)"
        )
    manifest = read_manifest(path / "manifest.json")
    full = trained.name == "model"
    source = (
        of_model(str(trained), None) if full else of_model(cfg.model.name, str(trained), cfg.model.revision)
    )
    if full:
        source.origin |= {"weights_sha256": source.origin["base_sha256"], "base": public_name(cfg.model.name)}
        source.origin["base_sha256"] = manifest.get("base_sha256", "unknown")
    elif manifest and manifest["base_sha256"] != source.origin["base_sha256"]:
        raise ValueError(
            f"{path}: its adapter was trained on other weights than {source.folder} holds now; put those "
            f"back, or export all the same "
            f"with --model {cfg.model.name} --revision {cfg.model.revision} --adapter {trained}"
        )
    source.origin |= {"run": cfg.run.name, "config": (path / "config.toml").read_text(encoding="utf-8")}
    if manifest:
        hashes = " ".join(
            f"{Path(file).name}={digest}" for file, digest in manifest.get("data_sha256", {}).items()
        )
        source.origin |= {
            "data_sha256": hashes,
            "measures": before_after_table(manifest["before"], manifest["after"]),
        }
    return source, cfg


def read_manifest(file: Path) -> dict:
    """What train.py wrote at the run's end, {} where it has not ended yet."""
    if not file.is_file():
        return {}
    from common.files import read_json

    manifest = read_json(file, "put a copy back, or remove it to export without the run's measures")
    missing = [key for key in ("base_sha256", "before", "after") if key not in manifest]
    if missing:
        raise ValueError(
            f"{file}: has no {', '.join(missing)}, which train.py writes; put a copy back, or take it away "
            f"to export without the run's measures"
        )
    return manifest


def held_out_samples(cfg) -> list:
    """The run's validation samples; none where there is no run, or its files have gone since."""
    if cfg is None:
        return []
    from common.progress import warn
    from data.loader import split_validation
    from data.rows import read_samples

    try:
        if cfg.data.validation:
            return read_samples(cfg.data.validation, cfg.data.format, "skip")[0]
        return split_validation(
            read_samples(cfg.data.train, cfg.data.format, "skip")[0],
            cfg.data.validation_fraction,
            cfg.run.seed,
        )[1]
    except ValueError as e:
        warn(
            f"the run's validation data cannot be read, so the file is compared on a sentence of Loupe's own "
            f"({' '.join(str(e).split())})"
        )
        return []


def write_peft(args, source, cfg, part: Path, out: Path) -> str:
    from exporting import hf_folder

    part.mkdir()
    return hf_folder.write_peft(source, part, out.name)


def write_safetensors(args, source, cfg, part: Path, out: Path) -> str:
    from exporting import hf_folder

    part.mkdir()
    return hf_folder.write_safetensors(source, part, out.name)


def write_gguf(args, source, cfg, part: Path, out: Path) -> str:
    from common.progress import bar, say
    from exporting.gguf_model import plan, write_model
    from exporting.merged import MergedCheckpoint
    from exporting.target import need_space
    from exporting.verify import verify, verify_in_llama_cpp
    from model.tokenizer import Tokenizer

    quant, model, tokenizer = (
        args.quant or "q8_0",
        MergedCheckpoint(source.folder, source.adapter),
        Tokenizer(source.folder),
    )
    if model.adapter:
        model.norms()  # refuses an adapter that changes nothing, before the minutes of writing
    size = sum(tensor.nbytes for tensor in plan(model, quant))
    need_space(part, size + 2**24)
    progress = bar(size, f"writing {quant}", "B")
    origin = source.origin | {"verified": "no" if args.no_verify else "yes"}
    name = (
        out.stem if args.to == "gguf" else out.name.partition(":")[0]
    )  # a folder's dots, and a registry's port and tag, are no suffix
    digests = write_model(part, model, quant, name=name, origin=origin, progress=progress.update)
    progress.close()
    if not args.no_verify:
        sample = judged(held_out_samples(cfg), tokenizer, model.config)
        differences = verify(part, model, quant, sample, tokenizer.encode, digests)
        if args.verify == "llama.cpp":
            differences.append(verify_in_llama_cpp(part, model, quant, sample, tokenizer.encode("a")[0]))
        for d in differences:
            say(
                f"{d.name:25} max |delta log p| {d.max_delta:.2g} (bound {d.bound[0]:g}), mean KL "
                f"{d.mean_kl:.2g} (bound {d.bound[1]:g}), "
                f"same likeliest token {d.agreement:.1%}"
            )
    return f"{quant}, {part.stat().st_size / 2**20:,.1f} MiB{', not verified' if args.no_verify else ''}"


def write_gguf_lora(args, source, cfg, part: Path, out: Path) -> str:
    from exporting.lora_gguf import write_lora
    from exporting.merged import MergedCheckpoint
    from exporting.verify import compare_bytes

    digests = write_lora(
        part, MergedCheckpoint(source.folder, source.adapter), name=out.stem, origin=source.origin
    )
    layers = len(compare_bytes(part, digests).tensors) // 2
    size = f"{part.stat().st_size / 2**20:,.1f} MiB"
    return f"LoRA of {layers} layers in float32, {size}, for a GGUF of {source.name}"


def write_ollama(args, source, cfg, part: Path, out: Path) -> str:
    from exporting.ollama import write_modelfile

    part.mkdir()
    words = write_gguf(args, source, cfg, part / "model.gguf", out)
    write_modelfile(part, "model.gguf")
    return f"{words}; then: {shlex.join(['ollama', 'create', out.name, '-f', str(out / 'Modelfile')])}"


def write_oci(args, source, cfg, part: Path, out: Path) -> str:
    """An image layout under `out`, or pushed there where it names a registry, a repository and a tag."""
    import math

    from common.progress import bar
    from exporting.oci import write_layout
    from exporting.registry import parse_reference, push
    from ggml.container import GGUFFile

    away = part.exists()  # a scratch folder
    if away:
        parse_reference(args.out)
    part.mkdir(exist_ok=True)
    gguf, layout = part / "model.gguf", part / "layout" if away else part
    words = write_gguf(args, source, cfg, gguf, out)
    file = GGUFFile(gguf)
    parameters = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    digest = write_layout(
        gguf, layout, metadata=file.metadata, parameters=parameters, tensor_bytes=file.size - file.data_start
    )
    if away:
        progress = bar(
            sum(blob.stat().st_size for blob in (layout / "blobs" / "sha256").iterdir()), "pushing", "B"
        )
        push(layout, args.out, progress=lambda sent: progress.update(sent - progress.n))
        progress.close()
    gguf.unlink()  # the layout has it under its digest
    return f"{words}, digest {digest}"


def write_hub(args, source, cfg, part: Path, out: Path) -> str:
    from exporting import hf_folder, hub

    hub.check_repo(args.out)
    words = hf_folder.write_safetensors(source, part, args.out)
    return f"{words}; {hub.upload(part, args.out, 'Exported by Loupe')}"


WRITERS = {
    "gguf": write_gguf,
    "gguf-lora": write_gguf_lora,
    "ollama": write_ollama,
    "oci": write_oci,
    "peft": write_peft,
    "safetensors": write_safetensors,
    "hub": write_hub,
}


def judged(samples: list, tokenizer, config):
    """What the three models are asked: the first samples with something to judge, or a sentence of our own
    where the run has none.
    """
    from data.render import IGNORE_INDEX, render
    from data.rows import Sample
    from exporting.verify import held_out

    for some in (samples[:200], [Sample("example", EXAMPLE)]):
        documents = [(d.input_ids, d.labels) for d in (render(sample, tokenizer) for sample in some)]
        texts = [content for sample in some for _, content in sample.messages or [("text", sample.text)]]
        found = held_out(documents, IGNORE_INDEX, texts, config.max_position_embeddings)
        if found:
            return found
    raise ValueError(
        f"the model has {config.max_position_embeddings} positions, too few for a sentence to compare on; "
        f"--no-verify leaves it out"
    )


if __name__ == "__main__":
    sys.exit(main())
