"""A cache of tokenized documents on disk, so that several runs tokenize a large training set once.

Each file is an .npz. Its name is the SHA-256 of everything that determines the documents: the samples, the
tokenizer, the settings and the code. T is the number of tokens of all documents, D that of documents.

    tokens      (T,) int32   token ids of all documents
    supervised  (T,) bool    whether position i has a label, which is then token i + 1
    lengths     (D,) int64   number of tokens of each document
    ids         uint8        names of the documents in UTF-8, with a zero byte between two
    counts      int64        the values of data.render.Counts, in the order of its fields
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np

from common.files import replacing
from data.render import IGNORE_INDEX, Counts, Document
from data.rows import Sample

MIN_SAMPLES = 2000  # Tokenizing fewer samples takes no time that anybody notices.
MAX_BYTES = 2**30  # of all files in the folder; the least recently used files are removed

Rendered = tuple[list[Document], Counts]


def load_or_render(
    folder: Path, samples: Sequence[Sample], depends_on: Callable[[], bytes], render: Callable[[], Rendered]
) -> Rendered:
    """Returns render(). If an earlier call stored the same result in `folder`, it is read from there.

    A result is stored from MIN_SAMPLES samples on, if the folder can be written; a new folder is readable by
    this user only. depends_on() returns bytes that identify all inputs of render() other than `samples`.
    """
    if len(samples) < MIN_SAMPLES:
        return render()
    digest = hashlib.sha256(depends_on())
    for sample in samples:
        digest.update(repr(sample).encode("utf-8", "surrogatepass"))
    file = folder / f"{digest.hexdigest()}.npz"
    if (found := _load(file)) is None:
        found = render()
        with suppress(OSError):  # A full disk, for example, does not stop the run.
            _save(file, *found)
    return found


def _load(file: Path) -> Rendered | None:
    """Returns the documents and their Counts from a file, or None if it is missing or damaged."""
    with suppress(OSError):
        os.utime(file)  # the time of the last use
    try:
        with np.load(file) as arrays:
            return _decode(*(arrays[name] for name in ("tokens", "supervised", "lengths", "ids", "counts")))
    except Exception:  # numpy and zipfile raise a dozen types of error for a damaged file.
        return None


def _decode(tokens, supervised, lengths, ids, counts):
    # One int object for each token id, as in data/render.py.
    objects = np.append(np.arange(tokens.max() + 1), IGNORE_INDEX).astype(object)
    labels = objects[np.where(supervised, np.append(tokens[1:], 0), -1)].tolist()
    tokens, ends = objects[tokens].tolist(), lengths.cumsum().tolist()
    names = ids.tobytes().decode("utf-8", "surrogatepass").split("\0")
    documents = [
        Document(tokens[end - n : end], labels[end - n : end], name)
        for end, n, name in zip(ends, lengths.tolist(), names, strict=True)
    ]
    return documents, Counts(*counts.tolist())


def _save(file, documents, counts):
    """Writes the file if it is not too large; then removes the least recently used files over MAX_BYTES."""
    arrays = {
        "tokens": np.concatenate([np.array(d.input_ids, np.int32) for d in documents]),
        "supervised": np.concatenate([np.array(d.labels) != IGNORE_INDEX for d in documents]),
        "lengths": np.array([len(d.input_ids) for d in documents]),
        "ids": np.frombuffer("\0".join(d.id for d in documents).encode("utf-8", "surrogatepass"), np.uint8),
        "counts": np.array(astuple(counts)),
    }
    folder, size = file.parent, sum(a.nbytes for a in arrays.values())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if size > MAX_BYTES or 10 * size > shutil.disk_usage(folder).free:
        return
    # Another run may write the same file now, so each has a temporary file of its own.
    with replacing(file, folder / f".{os.getpid()}.part") as part, open(part, "wb") as f:
        np.savez(f, **arrays)
    total = 0
    # Temporary files of a killed process are among these files.
    for old in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True):
        total += old.stat().st_size
        if total > MAX_BYTES:
            old.unlink()
