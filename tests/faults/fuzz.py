"""Feeds damaged files to the readers. Each must give a result, or one ValueError that names the file.

python -m tests.faults.fuzz --count 10000 [--only rows csv ...] [--first 0]

An input is a valid file that was changed at random: in its bytes, in its text, or in the values that it
holds. Its number and its format fix it: `--only csv --first 17 --count 1` makes input 17 again. Each format
has a process of its own, which may take LIMIT_BYTES more than it has, and LIMIT_SECONDS for one input. The
exit code is 1 if a reader raised anything else, died, hung, or gave an endless message.
"""

import argparse
import gzip
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from data.render import render
from data.rows import read_prompts, read_samples
from generation.load import QUANTIZE
from ggml.container import GGUFFile, TensorInfo, header
from lora.inject import adapters, unwrap
from lora.peft_io import load_adapter
from model.chat_template import save_tokenizer
from model.gguf_folder import gguf_folder
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model
from tests.folders import CHAT, ROOT, logits, make_adapter
from tests.makers import rows, tiny_config, tiny_model, write_jsonl, write_model
from tests.model.gguf_files import make_gguf
from training.config import Config, load_config

LIMIT_BYTES, LIMIT_SECONDS, MOST_LINES = 2**30, 60, 100
NUMBERS = [0, 1, 2, 3, 2**7, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        [],
        {},
        [[]],
        [None],
        {"": None},
        "x",
        "\0",
        "\ud800",
        "\x1b[2J",
        "e\u0301\u202e",
    ),
    *(*NUMBERS, -1, -(2**63), 10**400, 0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"), "1", "NaN"),
    *(
        "a" * 100_000,
        "../x",
        "/dev/zero",
        "(a+)+$",
        "[",
        "é" * 300,
        [1] * 3,
        ["a", "a"],
        {"a": {"b": [1]}},
        "~",
    ),
]
TOKENS = '"" null true NaN -Infinity 1e999 -0 0x10 1_0 {} [] [{}] "\\ud800" "\\u0000" 2026-11-28'.split()
TOKENS += ["'''", '"""', *map(str, NUMBERS)]
TOKENS += [
    "1" * 5000,
    "0x" + "f" * 5000,
    "-1",
    "1e-400",
    "[" * 9,
    "[" * 100_000,
    '{"a":' * 20_000,
]
MARKS = list('",;:{}[]=#\\\t\r\n\0\x1b\x7f\ufeff\u2028\u0085\u202e\ud83d😀') + [
    "\r\n",
    "\n\n",
    '""',
    "<bos>",
    "\\u",
]

Read = Callable[[Path, random.Random], object]


def bytes_damaged(raw: bytes, rng: random.Random, end: int = 2**16) -> bytes:
    """Returns a copy with one to four faults within its first `end` bytes."""
    new = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        end = min(end, len(new))
        if not end:
            break
        at, size, fault = rng.randrange(end), rng.choice((1, 1, 2, 4, 8, 64)), rng.randrange(8)
        if fault == 0:
            new[at] ^= 1 << rng.randrange(8)
        elif fault == 1:
            new[at : at + size] = rng.randbytes(size)
        elif fault == 2:
            new[at:at] = rng.randbytes(size)
        elif fault == 3:
            del new[at : at + size]
        elif fault == 4:
            new[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif fault == 5:
            new[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif fault == 6:
            new[at:at] = new[at : at + rng.choice((1, 8, 64, 4096))]
        elif rng.random() < 0.3:
            del new[rng.randrange(len(new)) :]
    return bytes(new)


def text_damaged(text: str, rng: random.Random) -> str:
    """Returns a text with one to three words, lines or characters that are others, doubled or missing."""
    for _ in range(rng.randint(1, 3)):
        fault, at = rng.randrange(5), rng.randrange(len(text) + 1)
        words = list(re.finditer(r'"[^"\n]*"|[\w.+-]+', text[at : at + 2000]))
        lines = text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        if fault < 2 and words:
            start, stop = rng.choice(words).span()
            text = text[: at + start] + rng.choice(TOKENS) + text[at + stop :]
        elif fault == 2:
            text = text[:at] + rng.choice(MARKS) * rng.choice((1, 1, 2)) + text[at:]
        elif fault == 3:
            lines[i : i + 1] = rng.choice(([], [lines[i]] * 2, [lines[j]], [lines[j] + lines[i]]))
            text = "\n".join(lines)
        else:
            text = text[:at] + text[at + rng.choice((1, 1, 10, 10**6)) :]
    return text


def value_damaged(value: Any, rng: random.Random) -> Any:
    """Returns a JSON value in which, after a walk down at random, a part is another, renamed or missing."""
    path: list[tuple[Any, Any]] = []  # (container, key), from the outermost one
    inner = value
    while isinstance(inner, (dict, list)) and inner and (not path or rng.random() < 0.7):
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        path.append((inner, key))
        inner = inner[key]
    if not path or rng.random() < 0.02:
        return rng.choice(VALUES)
    at, key = path[-1]
    fault = rng.randrange(6)
    if fault == 0:
        del at[key]
    elif fault == 1 and isinstance(at, dict):
        at[rng.choice((*at, key.upper(), key[:-1], f" {key}", *map(str, VALUES[:14])))] = at.pop(key)
    elif fault == 2:
        at[key] = rng.choice(
            ([inner], {"a": inner}, str(inner), [inner, inner], deepcopy(rng.choice(path)[0]))
        )
    else:
        at[key] = rng.choice(VALUES)
    return value


def json_damaged(raw: bytes, rng: random.Random) -> bytes:
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = value_damaged(deepcopy(value), rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8, indent=rng.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def safetensors_damaged(raw: bytes, rng: random.Random) -> bytes:
    size = 8 + int.from_bytes(raw[:8], "little")
    if rng.random() < 0.4:
        return bytes_damaged(raw, rng, rng.choice((16, size, size, len(raw))))
    head = rng.choice((json_damaged, text_bytes_damaged))(raw[8:size], rng)
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + raw[size:]


def gguf_damaged(path: Path, raw: bytes, rng: random.Random) -> bytes:
    file = GGUFFile(path)
    if rng.random() < 0.5:
        return bytes_damaged(raw, rng, file.data_start)
    metadata: dict = {k: (file.kinds[k], v) for k, v in file.metadata.items()}
    tensors = list(file.tensors.values())
    for _ in range(rng.choice((1, 1, 2))):
        key, i = rng.choice(list(metadata)), rng.randrange(len(tensors))
        kind, value = metadata.get(key, ("u32", 0))
        tensor, fault = tensors[i], rng.randrange(6)
        if fault == 0:
            metadata.pop(key, None)
        elif fault == 1:
            number = rng.choice(NUMBERS)
            kinds = [("u64", number), ("str", str(number)), ("i64", -number // 2), ("[u64]", [number] * 3)]
            metadata[key] = rng.choice(
                [*kinds, ("f64", float(number)), ("f32", float("nan")), ("bool", True)]
            )
        elif fault == 2 and isinstance(value, list):
            metadata[key] = (
                kind,
                rng.choice((value[:-1], value * 2, value[::-1], [], value[:1] * len(value))),
            )
        elif fault == 3:
            metadata[rng.choice((key.upper(), key + "x", rng.choice(list(metadata))))] = (kind, value)
        elif fault == 4:
            shape = rng.choice((tensor.shape[::-1], (*tensor.shape, 1), (1, *tensor.shape), tensor.shape[:1]))
            tensors[i] = TensorInfo(tensor.name, shape, tensor.type)
        else:
            tensors[i] = TensorInfo(
                rng.choice((tensors[0].name, "x", tensor.name + "x")), tensor.shape, tensor.type
            )
    try:
        return header(metadata, tensors) + raw[file.data_start :]
    except (struct.error, ValueError, ZeroDivisionError):  # no header can say that
        return bytes_damaged(raw, rng, file.data_start)


def text_bytes_damaged(raw: bytes, rng: random.Random) -> bytes:
    return text_damaged(raw.decode("utf-8"), rng).encode("utf-8", "surrogatepass")


def damaged(path: Path, raw: bytes, rng: random.Random) -> bytes:
    """Returns the bytes of a valid file with some faults, of a kind that fits its suffix."""
    if path.suffix == ".gz":
        packed = gzip.compress(damaged(path.with_suffix(""), gzip.decompress(raw), rng), mtime=0)
        return bytes_damaged(packed, rng) if rng.random() < 0.3 else packed
    if path.suffix == ".gguf":
        return gguf_damaged(path, raw, rng)
    if path.suffix == ".safetensors":
        return safetensors_damaged(raw, rng)
    kind = rng.random()
    if kind < 0.15:
        return bytes_damaged(raw, rng)
    if kind < 0.5 or path.suffix not in (".json", ".jsonl"):
        return text_bytes_damaged(raw, rng)
    if path.suffix == ".json" and path.stem != "pretty":
        return json_damaged(raw, rng)
    if path.stem == "pretty":  # several values
        return b"\n".join((raw, json_damaged(json.dumps(ROWS[0]).encode(), rng)))
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_damaged(lines[at], rng)
    return b"\n".join(lines)


ROWS: list[dict] = [
    *rows(2),
    {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["a", "b"]],
    },
    CHAT,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 0}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "model", "content": "b"},
        ]
    },
    {"text": "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"},
    {"prompt": "a b", "chosen": "c", "rejected": "d", "id": 1},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]


def read_rows(path: Path, rng: random.Random) -> None:
    """Reads rows as training, generation and --check-data do, and tokenizes the samples."""
    if rng.random() < 0.3:
        samples = read_prompts(path)
    else:
        samples, _ = read_samples(
            path, on_bad=rng.choice(("error", "skip")), needs_response=rng.random() < 0.7
        )
    for sample in samples:
        render(sample, TOKENIZER, rng.choice(("response", "last", "all")))


def make_rows(folder: Path) -> tuple[list[Path], Read]:
    files = [
        write_jsonl(folder / "rows.jsonl", ROWS),
        *(folder / f"{n}.json" for n in ("list", "data", "pretty")),
    ]
    files.append(folder / "packed.jsonl.gz")
    files[1].write_text(json.dumps(ROWS))
    files[2].write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    files[3].write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    files[4].write_bytes(gzip.compress(files[0].read_bytes()))
    return files, read_rows


def make_csv(folder: Path) -> tuple[list[Path], Read]:
    texts = {
        "commas.csv": 'prompt,response,id\nHello,Hi,1\n"a ""b"", c","d\ne",2\nx,y,3\n',
        "semicolons.csv": '\ufeffinstruction;input;output;system\r\nAdd.;2 and 2;4;\r\n"a;b";;c;s\r\n',
        "tabs.tsv": "text\tsource\nOne text.\tweb\nAnother one.\tbook\n",
        "chosen.csv": "prompt,chosen,rejected,weight\na,b,c,1\nd,e,f,\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts], read_rows


def make_toml(folder: Path) -> tuple[list[Path], Read]:
    def read(path: Path, _: random.Random) -> None:
        cfg = load_config(path)
        path.write_text(cfg.to_toml(), encoding="utf-8")
        again = load_config(path)
        assert again == cfg, "another config after a round trip"

    files = [folder / "small.toml", folder / "all.toml"]
    shutil.copy(ROOT / "small.toml", files[0])
    files[1].write_text(Config().to_toml().replace("train = []", 'train = ["rows.jsonl"]'), encoding="utf-8")
    return files, read


def read_model(path: Path, rng: random.Random) -> None:
    """Loads the model in the file's folder, and computes logits."""
    model = load_model(path.parent, torch.float32, quantize=rng.choice(["none"] * 4 + QUANTIZE))
    logits(model, torch.arange(min(20, model.config.vocab_size)))


def make_safetensors(folder: Path) -> tuple[list[Path], Read]:
    one, parts = folder / "one", folder / "parts"
    save_model(tiny_model(adapted=False), one, torch.float32)
    save_model(tiny_model(adapted=False), parts, torch.bfloat16, shard_bytes=40_000)
    files = [one / "model.safetensors", *sorted(parts.glob("*.safetensors*"))]
    return [f for f in files for _ in range(1 + 3 * (f.suffix == ".json" or f.parent == one))], read_model


def make_config(folder: Path) -> tuple[list[Path], Read]:
    new = tiny_config().to_json()
    old = new | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    old = {key: value for key, value in old.items() if key not in ("rope_parameters", "layer_types")}
    files = []
    for name, config in {
        "new": new,
        "old": old,
        "vision": {"model_type": "gemma3", "text_config": old, "eos_token_id": [1, 5], "vision_config": {}},
    }.items():
        save_model(tiny_model(adapted=False), folder / name, torch.float32)
        files.append(folder / name / "config.json")
        files[-1].write_text(json.dumps(config))
    return files, read_model


def make_tokenizer(folder: Path) -> tuple[list[Path], Read]:
    def read(path: Path, rng: random.Random) -> None:
        tokenizer = Tokenizer(path.parent)
        _ = tokenizer.vocab_size, tokenizer.special_tokens
        ids = tokenizer.render_prompt(
            [("user", "Zürich 😀 <bos> \n\t 東京 x"), ("assistant", "y"), ("user", "z")]
        )
        tokenizer.decode(ids), [tokenizer.piece(i) for i in ids]
        save_tokenizer(tokenizer, folder / "saved")

    small = folder / "small"
    write_model(small)
    spm = folder / "spm"
    gguf_tokenizer = gguf_folder(make_gguf(folder / "small.gguf", "q8_0", str(small)))
    shutil.copytree(gguf_tokenizer, spm, ignore=lambda *_: ["model.gguf"])
    save_tokenizer(Tokenizer(small), small)
    names = ["tokenizer.json"] * 8 + ["generation_config.json", "tokenizer_config.json"]
    return [base / name for base in (small, spm) for name in names], read


def make_adapters(folder: Path) -> tuple[list[Path], Read]:
    base = str(write_model(folder / "base"))
    model = load_model(base, torch.float32)

    def read(path: Path, _: random.Random) -> None:
        try:
            load_adapter(model, path.parent)
            logits(model, torch.arange(20))
        except ValueError:
            assert not adapters(model), "a part of the adapter is left"
            raise
        finally:
            unwrap(model)

    make_adapter(folder / "lora", base, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 4.0})
    make_adapter(folder / "dora", base, type="dora", use_rslora=True, target_modules="all-linear")
    mlx = Path(make_adapter(folder / "mlx", base)) / "adapter_config.json"
    mlx.write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}))
    regex = Path(make_adapter(folder / "regex", base)) / "adapter_config.json"
    new = {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj", "layers_to_transform": list(range(6))}
    regex.write_text(json.dumps(json.loads(regex.read_text()) | new))
    write_mlx(mlx.parent)
    return sorted(folder.glob("*/adapter*.*")), read


def write_mlx(folder: Path) -> None:
    """Makes mlx-lm's file of tensors from PEFT's."""
    from safetensors.torch import load_file, save_file

    kinds = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, kind = re.fullmatch(r"base_model\.model\.(.*)\.(lora_[AB]\.weight)", name).groups()  # type: ignore
        tensors[f"{path}.{kinds[kind]}"] = tensor.T.contiguous()
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapters.safetensors")


def make_ggufs(folder: Path) -> tuple[list[Path], Read]:
    def read(path: Path, _: random.Random) -> None:
        base = gguf_folder(path)
        try:
            tokenizer = Tokenizer(base)
            logits(load_model(base, torch.float32, quantize="keep"), torch.arange(20))
            save_tokenizer(tokenizer, folder / "saved")
        finally:
            shutil.rmtree(base)

    base = str(write_model(folder / "base"))
    return [make_gguf(folder / f"{quant}.gguf", quant, base) for quant in ("q8_0", "f32")], read


FORMATS: dict[str, Callable[[Path], tuple[list[Path], Read]]] = {
    "rows": make_rows,
    "csv": make_csv,
    "toml": make_toml,
    "safetensors": make_safetensors,
    "gguf": make_ggufs,
    "tokenizer": make_tokenizer,
    "adapter": make_adapters,
    "config": make_config,
}
TOKENIZER = Tokenizer(TINY)


class Progress:
    """What a format's process tells the one that waits for it: five whole numbers in shared memory."""

    NAMES = ("at", "started", "results", "refused", "slowest")  # input, and times in ms

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, 8 * len(self.NAMES))).cast("q")

    def __getitem__(self, name: str) -> int:
        return self.memory[self.NAMES.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self.memory[self.NAMES.index(name)] = value


def now() -> int:
    return time.monotonic_ns() // 10**6


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    at = " ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in frames[-4:])
    return f"{type(error).__name__}: {str(error)[:200]!r} at {at}"


def fault_of(error: BaseException, path: Path) -> str:
    """Returns what is wrong with an error that a reader raised, or ""."""
    if not isinstance(error, ValueError):
        return _where(error)
    said = str(error)
    if said.count("\n") > MOST_LINES:
        return f"a message of {said.count(chr(10)):,} lines: {said[:200]!r}"
    return "" if path.name in said or str(path.parent) in said else f"the file is not named: {said[:300]!r}"


def read_all(name: str, numbers: range, progress: Progress, folder: Path, log: Path) -> None:
    """Reads the inputs with these numbers; writes a line to `log` for each one that went wrong."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    with open(folder / "said", "w") as said:  # warnings, and what libraries print
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # nothing here must outlast a power failure
    files, read = FORMATS[name](folder)
    contents = {path: path.read_bytes() for path in files}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        rng = random.Random(f"{name}:{number}")
        path = rng.choice(files)
        path.write_bytes(damaged(path, contents[path], rng))
        progress["started"], progress["at"] = now(), number
        try:
            read(path, rng)
            progress["results"] += 1
        except BaseException as error:
            progress["refused"] += isinstance(error, ValueError)
            if fault := fault_of(error, path):
                with open(log, "a", encoding="utf-8", errors="replace") as f:
                    f.write(f"{name} {number} ({path.relative_to(folder)}): {fault}\n")
        progress["slowest"] = max(progress["slowest"], now() - progress["started"])
        path.write_bytes(contents[path])
        os.truncate(folder / "said", 0)


def fuzz(name: str, numbers: range, folder: Path) -> tuple[list[str], str]:
    """Returns the faults of a format's inputs, and a row of the table."""
    progress, log, began, peak = Progress(), folder / "faults", time.monotonic(), 0
    log.touch()
    while numbers:
        progress["at"], progress["started"] = numbers.start, now() + 60_000  # the valid files are made first
        place = folder / f"{name}{numbers.start}"
        place.mkdir()
        if not (child := os.fork()):
            try:
                read_all(name, numbers, progress, place, log)
            except BaseException as error:  # of this file itself
                with open(log, "a") as f:
                    f.write(f"{name} after {progress['at']}: {_where(error)}\n")
                os._exit(1)
            os._exit(0)
        why = ""
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            time.sleep(0.05)
            if now() - progress["started"] > 1000 * LIMIT_SECONDS and not why:
                why = f"takes more than {LIMIT_SECONDS} s"
                os.kill(child, signal.SIGKILL)
        _, status, usage = ended
        peak = max(peak, usage.ru_maxrss)
        shutil.rmtree(place)
        if not status:
            break
        why = why or f"the process ended with {os.waitstatus_to_exitcode(status)}"
        with open(log, "a") as f:
            f.write(f"{name} {progress['at']}: {why}\n")
        numbers = range(progress["at"] + 1, numbers.stop)
    faults = log.read_text().splitlines()
    log.unlink()
    done = progress["results"] + progress["refused"]
    figures = (done, progress["results"], progress["refused"], len(faults), round(time.monotonic() - began))
    slowest, mebibytes = f"{progress['slowest'] / 1000:.1f}", f"{peak / 1024:.0f} MiB"
    return faults, " | ".join([f"{name:11}", *(f"{x:>7}" for x in figures), f"{slowest:>7}", mebibytes])


def main(argv: list[str] | None = None) -> int:
    """Prints a table with a row for each format, then all faults; returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each format (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args(argv)
    faults: list[str] = []
    print("format      |  inputs | results | refused | defects | seconds | slowest | peak memory")
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found, row = fuzz(name, range(args.first, args.first + args.count), Path(folder))
        faults += found
        print(row, flush=True)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
