"""The file that answers are written to, row by row, in the order of the prompts, so that what was cut off can
go on.

A line is {"prompt", "response", "stop_reason", "made_by"}. `made_by` is a short hash of the model and its
settings: with it, and with the prompts, a file says itself whether it belongs to a run. Answers that come
before an earlier row's go to FILE.waiting as "row number, tab, line"; the run that goes on finds them there,
and one that leaves no answer waiting removes that file in the end.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from common.files import lock


class AnswerFile:
    """The answers to `prompts`, of which `missing` are the numbers that are still to be found; `with
    AnswerFile(...) as file: file.add(...)`.
    """

    def __init__(self, path, prompts, made_by):
        """Find what is answered already; nothing is changed before `with`, which raises ValueError where the
        file cannot be written.

        Args:
            path: a file that is not there yet, or one of an earlier run.
            prompts: list of the texts that are answered, one a line.
            made_by: text that is the same for the same model and settings.

        Raises:
            ValueError: the file, or the one of waiting answers, holds something else.
        """
        self.prompts, self.made_by = prompts, made_by
        self.output, self.beside = _Lines(path), _Lines(f"{path}.waiting")
        self._check(self.output, enumerate(self.output.begun()))
        self._check(self.beside, map(_numbered, self.beside.begun()))
        self.done = len(self.output.lines) - 1
        self.waiting = dict(map(_numbered, self.beside.lines[:-1]))
        self.missing = [number for number in range(self.done, len(prompts)) if number not in self.waiting]

    def __enter__(self):
        self.output.open()
        if self.missing:
            self.beside.open()
        self._write()  # what an earlier run was stopped just before it wrote
        return self

    def __exit__(self, *_):
        if not any(number >= self.done for number in self.waiting):
            self.beside.path.unlink(missing_ok=True)
        self.beside.close()
        self.output.close()

    def add(self, number, response, stop_reason):
        """Take the answer to prompts[number]; it is written as soon as all before it are."""
        rest = {"response": response, "stop_reason": stop_reason, "made_by": self.made_by}
        self.waiting[number] = self._opening(number)[:-1] + b", " + _encode(rest)[1:]
        if number > self.done:
            self.beside.add(b"%d\t%b" % (number, self.waiting[number]))
        self._write()

    def _write(self):
        while self.done in self.waiting:
            self.output.add(
                self.waiting[self.done]
            )  # and stays among the waiting: whoever interrupts here loses nothing
            self.done += 1

    def _opening(self, number):
        return _encode({"prompt": self.prompts[number]})

    def _check(self, file, numbered):
        """Raise for (row number, line) of a file's lines, or the beginning of one, that are no answers of
        this run.
        """
        remedy = (
            f"name another --output, or remove {self.output.path}"
            + f" and {self.beside.path}" * self.beside.path.exists()
        )
        for place, (number, line) in enumerate(numbered, 1):
            where = f"--output: line {place} of {file.path}"
            if not 0 <= number < len(self.prompts):
                raise ValueError(f"{where} answers none of the input's {len(self.prompts)} rows; {remedy}")
            opening = self._opening(number)[:-1]
            if line[: len(opening)] != opening[: len(line)]:
                raise ValueError(f"{where} does not answer row {number + 1} of the input; {remedy}")
            if place < len(file.lines) and not line.endswith(b', "made_by": ' + _encode(self.made_by) + b"}"):
                what = "another model, adapter or --dtype, or with other settings (--max-new-tokens, --temperature, --top-k, --top-p, --seed)"
                raise ValueError(f"{where} was made by {what}; take the same, or {remedy}")


class _Lines:
    """A file that grows by whole lines; behind the last newline is half of one, where an earlier run was
    stopped while it wrote, and that is written anew.
    """

    def __init__(self, path):
        self.path, self.file = Path(path), None
        with self._told("read"):
            self.lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]

    def open(self):
        with self._told("written"):
            self.file = open(self.path, "ab")
            if not lock(self.file):
                raise ValueError(
                    f"--output: another process is writing {self.path}; wait for it, or name another file"
                )
            self.file.truncate(sum(map(len, self.lines[:-1])) + len(self.lines) - 1)

    def begun(self):
        """The lines, with the half if there is one."""
        return self.lines if self.lines[-1] else self.lines[:-1]

    def add(self, line):
        self.file.write(line + b"\n")
        self.file.flush()

    def close(self):
        if self.file:
            self.file.close()

    @contextmanager
    def _told(self, done):
        try:
            yield
        except OSError as error:
            raise ValueError(f"--output: {self.path} cannot be {done}: {error.strerror}") from None


def _numbered(line):
    """(row number, answer) of a waiting line; -1 where it begins with no number."""
    number, _, answer = line.partition(b"\t")
    return int(number) if number.isdigit() else -1, answer


def _encode(value):
    return json.dumps(value, ensure_ascii=False).encode()
