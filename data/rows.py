"""Reads data files into Samples. Faulty rows of all files are collected into one error.

data/files.py says which files can be read, data/row_reader.py which rows. In a file of prompts (read_prompts)
the rows need no response, and a .txt file has one prompt a line.
"""

from collections.abc import Sequence
from pathlib import Path

from common.errors import listed
from common.progress import warn
from data.files import UnreadableFile, read_rows
from data.row_reader import RowReader, Sample, parse_columns
from data.turns import Messages

__all__ = ["Messages", "Sample", "read_prompts", "read_samples"]


def read_samples(
    paths: str | Path | Sequence[str | Path],
    format: str = "auto",
    on_bad: str = "error",
    needs_response: bool = True,
    columns: Sequence[str] = (),
) -> tuple[list[Sample], list[str]]:
    """Reads files; returns their samples in order, and an error message for each row that was skipped.

    Args:
        paths: one path or several.
        format: "json" (one array), "jsonl" (one row a line), "csv", "txt", or "auto" (data.files.read_rows).
        on_bad: "error" raises for a bad row, "skip" leaves it out.
        needs_response: if False, a row may lack its response, which is then "".
        columns: the rows' own names of keys, such as "prompt=question".

    Raises:
        ValueError: lists every problem of every file. Even with "skip" it is raised if a file as a whole
            cannot be read, or if there is no sample.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    reader = RowReader("required" if needs_response else "optional", parse_columns(columns))
    return _read_files([Path(p) for p in paths], format, on_bad, reader)


def read_prompts(path: str | Path) -> list[Sample]:
    """Returns the prompts of a file as Samples whose last message is the user's.

    The rows are those of training; a response at the end of a row is ignored and may be missing. In a .txt
    file each line is a user's message, and so is the text of a {"text"} row.

    Raises:
        ValueError: lists every problem of the file.
    """
    format = "lines" if Path(path).name.removesuffix(".gz").endswith(".txt") else "auto"
    return _read_files([Path(path)], format, "error", RowReader("ignored", {}))[0]


def _read_files(paths, format, on_bad, reader):
    names = [p.name for p in paths]
    samples, problems, unreadable = [], [], []
    for path, name in zip(paths, names, strict=True):
        # Ids stay unique when two folders hold a train.jsonl.
        label = name if names.count(name) == 1 else str(path)
        try:
            for row_id, place, row, error in read_rows(path, label, format, warn):
                sample, faults = (None, [error]) if error else reader.sample(row_id, row)
                if faults:
                    problems.append(f"{label}{place}: {'; '.join(faults)}")
                else:
                    samples.append(sample)
        except UnreadableFile as error:
            unreadable.append(f"{label}:{error}")
    reader.report()
    if unreadable or (problems and on_bad == "error"):
        remedy = not unreadable and reader.response != "ignored"
        raise ValueError(_summary(unreadable + problems, remedy))
    if not samples:
        nothing = f"no sample in {', '.join(names) or 'an empty list of files'}"
        raise ValueError(_summary([nothing, *problems], remedy=False))
    return samples, problems


def _summary(problems, remedy):
    head = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:"
    skip = 'Repair these rows, or let training leave them out with data.on_bad = "skip".'
    return listed(head, problems, skip if remedy else "")
