"""The file that answers are written to, row by row, in the order of the prompts, so that what was cut off can go on.

A line is {"prompt", "response", "stop_reason", "made_by"}.  `made_by` is a short hash of the model and its settings: with it, and with the
prompts, a file says itself whether it belongs to a run.  Answers that come before an earlier row's wait in FILE.waiting as "row number, tab, line";
it is there for the run that goes on, and removed when no answer waits any more.
"""

import json
from pathlib import Path


class AnswerFile:
    """The answers to `prompts`, of which `missing` are the numbers that are still to be found; `with AnswerFile(...) as file: file.add(...)`."""

    def __init__(self, path, prompts, made_by):
        """Find what is answered already; nothing is changed before the first answer.

        Args:
            path: a file that is not there yet, or one of an earlier run.
            prompts: list of the texts that are answered, one a line.
            made_by: text that is the same for the same model and settings.

        Raises:
            ValueError: the file, or the one of waiting answers, holds something else or cannot be written.
        """
        self.prompts, self.made_by = prompts, made_by
        try:
            self.output, self.beside = _Lines(path), _Lines(f"{path}.waiting")
            self._check(self.output, lambda number, line: (number, line))
            self._check(self.beside, lambda _, line: _numbered(line))
            self.output.open()
            self.beside.open()
        except OSError as error:
            raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None
        self.done = len(self.output.whole)
        self.waiting = dict(map(_numbered, self.beside.whole))
        self.missing = [number for number in range(self.done, len(prompts)) if number not in self.waiting]

    def __enter__(self):
        self._write()  # what an earlier run was stopped just before it wrote
        return self

    def __exit__(self, *_):
        self.output.file.close()
        self.beside.file.close()
        if not any(number >= self.done for number in self.waiting):
            self.beside.path.unlink()

    def add(self, number, response, stop_reason):
        """Take the answer to prompts[number]; it is written as soon as all before it are."""
        rest = {"response": response, "stop_reason": stop_reason, "made_by": self.made_by}
        self.waiting[number] = self._opening(number)[:-1] + b", " + _encode(rest)[1:]
        if number > self.done:
            self.beside.add(b"%d\t%b" % (number, self.waiting[number]))
        self._write()

    def _write(self):
        while self.done in self.waiting:
            self.output.add(self.waiting.pop(self.done))
            self.done += 1

    def _opening(self, number):
        return _encode({"prompt": self.prompts[number]})

    def _check(self, lines, numbered):
        """Raise for lines, or the beginning of one, that are no answers of this run."""
        remedy = "name another --output, or remove this one"
        for place, line in enumerate(lines.whole + [lines.half] * bool(lines.half)):
            where = f"--output: line {place + 1} of {lines.path}"
            number, line = numbered(place, line)
            if not 0 <= number < len(self.prompts):
                raise ValueError(f"{where} answers none of the input's {len(self.prompts)} rows; {remedy}")
            opening = self._opening(number)[:-1]
            if line[: len(opening)] != opening[: len(line)]:
                raise ValueError(f"{where} does not answer row {number + 1} of the input; {remedy}")
            if place < len(lines.whole) and not line.endswith(b', "made_by": ' + _encode(self.made_by) + b"}"):
                what = "another model, adapter or --dtype, or with other settings (--max-new-tokens, --temperature, --top-k, --top-p, --seed)"
                raise ValueError(f"{where} was made by {what}; take the same, or {remedy}")


class _Lines:
    """A file that grows by whole lines; half of one is where an earlier run was stopped while it wrote, and is written anew."""

    def __init__(self, path):
        self.path = Path(path)
        *self.whole, self.half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]

    def open(self):
        self.file = open(self.path, "ab")
        self.file.truncate(sum(map(len, self.whole)) + len(self.whole))

    def add(self, line):
        self.file.write(line + b"\n")
        self.file.flush()


def _numbered(line):
    """(row number, answer) of a waiting line; -1 where it begins with no number."""
    number, _, answer = line.partition(b"\t")
    return int(number) if number.isdigit() else -1, answer


def _encode(value):
    return json.dumps(value, ensure_ascii=False).encode()
