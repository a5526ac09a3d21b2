"""The output file of generate.py --input, which a later run can continue.

Each line is {"prompt", "response", "stop_reason", "made_by"}; the lines have the order of the prompts.
`made_by` is a short hash of the model and its settings: a file is continued only with the same prompts and
the same hash. A completion that finishes before those of earlier prompts is stored in FILE.waiting, as row
number, tab and line. FILE.waiting is removed at the end if no completion waits. After sync(), a power failure
takes no answer either.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from common.errors import DiskError
from common.files import lock, sync


class AnswerFile:
    """The answers to a list of prompts, on disk: `with AnswerFile(...) as file: file.add(...)`.

    `missing` lists the row numbers of the prompts without an answer. The constructor changes no file.

    Args:
        path: a new file, or one of an earlier run.
        prompts: the text of each row.
        made_by: a text that depends on the model and its settings only.

    Raises:
        ValueError: a file is of another run or cannot be read. `with` raises it if one cannot be written.
    """

    def __init__(self, path: str | Path, prompts: Sequence[str], made_by: str):
        self.prompts, self.made_by = prompts, made_by
        self.output, self.waiting = _LineFile(path), _LineFile(f"{path}.waiting")
        self._check(self.output, enumerate(self.output.lines_and_rest()))
        self._check(self.waiting, map(_parse_waiting, self.waiting.lines_and_rest()))
        self.written = len(self.output.lines)
        self.lines = dict(map(_parse_waiting, self.waiting.lines))  # row number -> line
        self.missing = [row for row in range(self.written, len(prompts)) if row not in self.lines]

    def __enter__(self) -> "AnswerFile":
        self.output.open()
        if self.missing:
            self.waiting.open()
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.sync()
            if not any(row >= self.written for row in self.lines):
                self.waiting.path.unlink(missing_ok=True)
        finally:
            self.waiting.close()
            self.output.close()

    def sync(self) -> None:
        """Waits until all answers that were added are on the disk; raises DiskError if it refuses them."""
        with self._counting_safe():
            self.waiting.sync()
            self.output.sync()

    def add(self, row: int, response: str, stop_reason: str) -> None:
        """Stores the answer to prompts[row]; the output gets it as soon as all earlier rows are answered."""
        rest = {"response": response, "stop_reason": stop_reason, "made_by": self.made_by}
        self.lines[row] = self._line_start(row) + b", " + _encode(rest)[1:]
        with self._counting_safe():
            if row > self.written:
                self.waiting.append(b"%d\t%b" % (row, self.lines[row]))
            self._write()

    @contextmanager
    def _counting_safe(self) -> Iterator[None]:
        """Raises DiskError, with the number of answers that are written, if the disk refuses in the block."""
        try:
            yield
        except OSError as e:
            folder = self.output.path.absolute().parent
            raise DiskError(
                f"{self.output.path} cannot be written ({e.strerror}); the {self.written} answers in it are "
                f"kept. Make room in {folder}"
            ) from e

    def _write(self) -> None:
        while self.written in self.lines:
            # The line stays in self.lines, so an interrupt at this point loses no answer.
            self.output.append(self.lines[self.written])
            self.written += 1

    def _line_start(self, row: int) -> bytes:
        return _encode({"prompt": self.prompts[row]})[:-1]

    def _check(self, file: "_LineFile", numbered: Iterable[tuple[int, bytes]]) -> None:
        """Raises ValueError if a (row number, line) of the file is not this run's answer to that prompt."""
        remedy = f"name another --output, or remove {self.output.path}"
        if self.waiting.path.exists():
            remedy += f" and {self.waiting.path}"
        for number, (row, line) in enumerate(numbered, 1):
            where = f"--output: line {number} of {file.path}"
            if not 0 <= row < len(self.prompts):
                raise ValueError(f"{where} answers none of the input's {len(self.prompts)} rows; {remedy}")
            start = self._line_start(row)
            if line[: len(start)] != start[: len(line)]:
                raise ValueError(f"{where} does not answer row {row + 1} of the input; {remedy}")
            is_whole = number <= len(file.lines)
            if is_whole and not line.endswith(b', "made_by": ' + _encode(self.made_by) + b"}"):
                raise ValueError(
                    f"{where} was made by another model, adapter or --dtype, or with other settings "
                    "(--max-new-tokens, --temperature, --top-k, --top-p, --seed); "
                    f"take the same, or {remedy}"
                )


class _LineFile:
    """A file that grows by whole lines. open() removes an incomplete last line of an interrupted run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file: IO | None = None
        with self._naming_path("read"):
            content = self.path.read_bytes() if self.path.exists() else b""
        *self.lines, self.rest = content.split(b"\n")

    def open(self) -> None:
        with self._naming_path("written"):
            self.file = file = open(self.path, "ab")
            if not lock(file):
                raise ValueError(
                    f"--output: another process is writing {self.path}; wait for it, or name another file"
                )
            file.truncate(sum(len(line) + 1 for line in self.lines))

    def lines_and_rest(self) -> list[bytes]:
        return [*self.lines, self.rest] if self.rest else self.lines

    def append(self, line: bytes) -> None:
        assert self.file, "open() comes first"
        self.file.write(line + b"\n")
        self.file.flush()

    def sync(self) -> None:
        if self.file:
            sync(self.file)

    def close(self) -> None:
        if self.file:
            with suppress(OSError):  # it tries again to write what did not fit, which was reported
                self.file.close()

    @contextmanager
    def _naming_path(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"--output: {self.path} cannot be {done}: {error.strerror}") from None


def _parse_waiting(line: bytes) -> tuple[int, bytes]:
    """Splits a line of FILE.waiting into (row number, or -1 if it has none; line for the output)."""
    row, _, answer = line.partition(b"\t")
    return int(row) if row.isdigit() else -1, answer


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
