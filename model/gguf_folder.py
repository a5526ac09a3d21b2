"""The folder that stands for a GGUF file: what the other rooms read of a model, made once from its header.

    config.json, tokenizer.json, tokenizer_config.json, generation_config.json
    model.gguf                                  a link to the file
    model-00001-of-0000N.gguf, ...              links to its parts, where llama-gguf-split has divided it

The folders are in the user's cache, by the hash of the header and the path of the file. So whatever reads a
model folder reads a GGUF file too; model/weights.py follows the links.
"""

import hashlib
import json
import re
from pathlib import Path

from common.control_tokens import CONTROL_TOKENS, END_OF_TURN
from common.files import making
from ggml.container import GGUFFile
from model.gguf_tokenizer import tokenizer_json
from model.gguf_weights import read_gguf_config
from model.package import cache, writing_cache
from model.tokenizer import SETTINGS

LAYOUT = 2  # The version of what the folders hold; a new one makes new folders.
HEAD = 2**24  # The hash covers this many bytes from the start of the file, Gemma's vocabulary among them.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_folder(path: Path) -> Path:
    """Returns the folder that stands for a GGUF file, given its path or that of its first part.

    Raises ValueError for a damaged file, a missing part, and another model than a Gemma 3 text model.
    """
    files = parts(path.absolute())
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            digest.update(f"{LAYOUT} {file} {file.stat().st_size} ".encode() + f.read(HEAD))
    folder = cache() / "gguf" / digest.hexdigest()[:32]
    if not folder.is_dir():
        opened = [GGUFFile(file) for file in files]
        config, contents = read_gguf_config(*opened), _small_files(opened[0])
        _check_parts(opened)
        contents["config.json"] = config.to_json()
        with writing_cache(), making(folder) as part:
            for name, content in contents.items():
                (part / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            for i, file in enumerate(files):
                n = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
                (part / f"model{n}.gguf").symlink_to(file)
    return folder


def parts(path: Path) -> list[Path]:
    """Returns the file, or all parts of the split file of which it is one.

    Raises ValueError if a part is missing.
    """
    split = PART.fullmatch(path.name)
    if not split:
        return [path]
    stem, _, count = split.groups()
    files = [path.with_name(f"{stem}-{i + 1:05d}-of-{count}.gguf") for i in range(int(count))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        rest = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{path}: {missing[0]}{rest} is missing beside it; download all {int(count):,} parts"
        )
    return files


def _check_parts(opened: list[GGUFFile]) -> None:
    """Raises ValueError unless the files are all parts of one, in their order."""
    tensors = sum(len(file.tensors) for file in opened)
    for i, file in enumerate(opened):
        wanted = {"split.no": i, "split.count": len(opened), "split.tensors.count": tensors}
        for key, value in wanted.items():
            if (found := file.metadata.get(key, value)) != value:
                raise ValueError(
                    f"{file.path}: {key} is {found!r} and must be {value} for part {i + 1} of {len(opened)} "
                    f"with {tensors} tensors; download all parts again, under their own names"
                )


def _small_files(file: GGUFFile) -> dict[str, dict]:
    """Returns {name: content} of the folder's JSON files about text."""
    prefix = "tokenizer.ggml."
    known = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    try:
        tokenizer = tokenizer_json(known, CONTROL_TOKENS)
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}") from None
    tokens = known["tokens"]
    missing = [token for token in CONTROL_TOKENS if token not in tokens]
    if missing:
        raise ValueError(
            f"{file.path}: has no {', '.join(missing)}; Loupe needs the tokenizer of a Gemma 3 model"
        )
    ids = {name: tokens.index(name) for name in CONTROL_TOKENS}
    stops = {ids["<eos>"], ids[END_OF_TURN], known.get("eos_token_id"), known.get("eot_token_id")} - {None}
    settings: dict = dict(SETTINGS)
    if template := file.metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    generation = {"bos_token_id": ids["<bos>"], "eos_token_id": sorted(stops), "pad_token_id": ids["<pad>"]}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }
