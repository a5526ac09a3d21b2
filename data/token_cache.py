"""Documents on disk, so that many rows are tokenised once and not by each run.

A file of numpy's (.npz) under the sha256 of all that its documents follow from: the samples, the tokenizer,
how they were cut, and the code that did it.

    tokens      (T,) int32   of all documents, one behind the other
    supervised  (T,) bool    whether position i must predict token i + 1
    lengths     (D,) int64   of each document
    ids         uint8        the documents' names in UTF-8, with a zero byte between two
    counts      int64        data.render.Counts, its numbers in order
"""

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np

from common.files import replacing
from data.render import IGNORE_INDEX, Counts, Document

WORTH = 2000  # samples: fewer are tokenised in the time that it takes to notice
ROOM = 2**30  # bytes of all files; those that were not asked for the longest make room


def stored(folder, samples, others, render):
    """What render() gives, (documents, Counts): from `folder` where it was put there before.

    Args:
        folder: where the files are; made where it is missing, for this user's eyes only. One that cannot be
        written stores nothing.
        samples: list of Sample.
        others: called for the bytes of what else the documents follow from.
        render: called where the documents are not found.
    """
    if len(samples) < WORTH:
        return render()
    digest = hashlib.sha256(others())
    for sample in samples:
        digest.update(repr(sample).encode("utf-8", "surrogatepass"))
    file = Path(folder) / f"{digest.hexdigest()}.npz"
    if (found := _load(file)) is None:
        found = render()
        with suppress(OSError):  # a full disk, say: the run goes on without
            _save(file, *found)
    return found


def _load(file):
    """The documents and counts, or None where the file is missing or broken."""
    with suppress(OSError):
        os.utime(file)  # it was asked for
    try:
        with np.load(file) as arrays:
            return _decode(*(arrays[name] for name in ("tokens", "supervised", "lengths", "ids", "counts")))
    except Exception:  # numpy and zipfile raise a dozen kinds over a damaged file, which is made anew
        return None


def _decode(tokens, supervised, lengths, ids, counts):
    # one int object for each id, as data.render has it: a list of them costs 8 bytes a token, and 36 without
    words = np.append(np.arange(tokens.max() + 1), IGNORE_INDEX).astype(object)
    labels = words[np.where(supervised, np.append(tokens[1:], 0), -1)].tolist()
    tokens, ends = words[tokens].tolist(), lengths.cumsum().tolist()
    names = ids.tobytes().decode("utf-8", "surrogatepass").split("\0")
    documents = [
        Document(tokens[end - n : end], labels[end - n : end], name)
        for end, n, name in zip(ends, lengths.tolist(), names, strict=True)
    ]
    return documents, Counts(*counts.tolist())


def _save(file, documents, counts):
    """Writes the file whole or not at all, unless it is large beside ROOM or the disk."""
    arrays = {
        "tokens": np.concatenate([np.array(d.input_ids, np.int32) for d in documents]),
        "supervised": np.concatenate([np.array(d.labels) != IGNORE_INDEX for d in documents]),
        "lengths": np.array([len(d.input_ids) for d in documents]),
        "ids": np.frombuffer("\0".join(d.id for d in documents).encode("utf-8", "surrogatepass"), np.uint8),
        "counts": np.array(astuple(counts)),
    }
    folder, size = file.parent, sum(a.nbytes for a in arrays.values())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if size > ROOM or 10 * size > shutil.disk_usage(folder).free:
        return
    # Another run may write the same file now, so each has a temporary file of its own.
    with replacing(file, folder / f".{os.getpid()}.part") as part, open(part, "wb") as f:
        np.savez(f, **arrays)
    total = 0
    for old in sorted(
        folder.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True
    ):  # what a kill left half written grows old too
        total += old.stat().st_size
        if total > ROOM:
            old.unlink()
