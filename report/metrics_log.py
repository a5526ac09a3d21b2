"""metrics.jsonl, one JSON object a line, and the same figures as plain text for the terminal."""

import json
import math
from pathlib import Path

from common.errors import listed
from common.files import replacing
from tasks.choose import ALL_METRICS
from tasks.measures import Metric

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends one JSON object a line to `path`; each line is flushed, so a killed run tears the last line at
    most.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int, evaluated: int) -> None:
        """Drops the lines of later steps, evaluations after step `evaluated` and a torn last line: a resumed
        run repeats no step and no evaluation.
        """
        kept = [
            line
            for line, record in _records(self.path)
            if record["step"] <= (evaluated if "eval" in record else step)
        ]
        self._file.close()
        with replacing(self.path) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_metrics(path) -> tuple[list[dict], list[dict]]:
    """The lines of metrics.jsonl as (steps, evaluations), "nan" and "inf" as floats again; ValueError for bad
    lines.
    """
    records = [_restored(record) for _, record in _records(path)]
    return [r for r in records if "eval" not in r], [r for r in records if "eval" in r]


def number(value) -> float | None:
    """The finite float that `value` stands for; None for what cannot be drawn or compared: absent, NaN,
    infinite.
    """
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def figure(metric: Metric, value) -> str:
    """A figure as text: a fraction as per cent, a loss to four digits, an absent one as "-"."""
    known = number(value)
    if known is None:
        return "-" if value is None else str(value)
    return f"{100 * known:.1f}%" if metric.percent else f"{known:#.4g}"


def present_metrics(*evaluations: dict) -> list[Metric]:
    """The metrics that at least one of the evaluations holds, in the order of the tasks."""
    return [m for m in ALL_METRICS if any(figures.get(m.key) is not None for figures in evaluations)]


def set_title(name: str, measured: dict) -> str:
    """A validation set's name, and how many of its rows the figures rest on."""
    return f"{name}, {measured['rows']:,} rows" if "rows" in measured else name


def before_after_table(before: dict, after: dict) -> str:
    """An aligned table of {set: {metric: value}} before and after; metrics that no set holds have no row."""
    shown = present_metrics(*before.values(), *after.values())
    lines = [f"{'':20}{'before':>10}{'after':>10}"]
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, {}), after.get(name, {})
        rows = [(m.label, figure(m, was.get(m.key)), figure(m, now.get(m.key))) for m in shown]
        lines += [
            set_title(name, was | now),
            *(f"  {label:18}{old:>10}{new:>10}" for label, old, new in rows),
        ]
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with control characters spelled out: a model's answer may hold terminal commands."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _records(path) -> list[tuple[str, dict]]:
    """Returns (line, object) of each whole line; a torn last line, without its newline, is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    found, problems = [], []
    for at, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
            found.append((line, record))
        except (ValueError, TypeError, KeyError):
            problems.append(f'{path}:{at}: not a JSON object with a number "step": {line[:80]!r}')
    if problems:
        raise ValueError(
            listed("bad lines in the log:", problems, "Remove these lines, or start the run in a new folder.")
        )
    return found


def plain(value):
    """`value` with 0-d tensors as numbers and non-finite floats as "nan", "inf", "-inf", which JSON lacks."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value):
    """The inverse of `plain` for non-finite floats."""
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
