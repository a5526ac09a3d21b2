"""The file that answers are written to, row by row, in the order of the prompts, so that what was cut off can go on.

A line is {"prompt", "response", "stop_reason", "made_by"}.  `made_by` is a short hash of the model and its settings: with it, and with the
prompts, a file says itself whether it belongs to a run, and nothing beside it has to.
"""

import json
from pathlib import Path


class AnswerFile:
    """The answers to `prompts`, of which the first `done` are in the file already; `with AnswerFile(...) as file: file.add(...)`."""

    def __init__(self, path, prompts, made_by):
        """Find where to go on; nothing is changed before the first answer.

        Args:
            path: a file that is not there yet, or one of an earlier run.
            prompts: list of the texts that are answered, one a line.
            made_by: text that is the same for the same model and settings.

        Raises:
            ValueError: the file holds something else, or cannot be written.
        """
        self.path, self.prompts, self.made_by = Path(path), prompts, made_by
        self.waiting = {}  # answers that came before those of earlier prompts
        try:
            *lines, rest = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
            self._check(lines, rest)
            self.file = open(self.path, "ab")
        except OSError as error:
            raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None
        self.done = len(lines)
        self.file.truncate(sum(map(len, lines)) + len(lines))  # half a line: the run before was stopped while it wrote

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, number, response, stop_reason):
        """Take the answer to prompts[number]; it is written as soon as all before it are."""
        self.waiting[number] = {"response": response, "stop_reason": stop_reason, "made_by": self.made_by}
        while self.done in self.waiting:
            self.file.write(self._opening(self.done)[:-1] + b", " + _encode(self.waiting.pop(self.done))[1:] + b"\n")
            self.file.flush()
            self.done += 1

    def _opening(self, number):
        return _encode({"prompt": self.prompts[number]})

    def _check(self, lines, rest):
        """Raise for lines, or the beginning of one, that are no answers of this run."""
        remedy = "name another --output, or remove this one"
        for number, line in enumerate(lines + [rest] * bool(rest)):
            where = f"--output: line {number + 1} of {self.path}"
            if number >= len(self.prompts):
                raise ValueError(f"{where} is one more than the input has rows; {remedy}")
            opening = self._opening(number)[:-1]
            if line[: len(opening)] != opening[: len(line)]:
                raise ValueError(f"{where} does not answer that row of the input; {remedy}")
            if number < len(lines) and not line.endswith(b', "made_by": ' + _encode(self.made_by) + b"}"):
                what = "another model, adapter or --dtype, or with other settings (--max-new-tokens, --temperature, --top-k, --top-p, --seed)"
                raise ValueError(f"{where} was made by {what}; take the same, or {remedy}")


def _encode(value):
    return json.dumps(value, ensure_ascii=False).encode()
