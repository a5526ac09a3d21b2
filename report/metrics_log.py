"""metrics.jsonl, with one JSON object a line, and the same figures as text for the terminal."""

import json
import math
from pathlib import Path
from typing import Any

from common.errors import listed
from common.files import replacing
from tasks.choose import ALL_METRICS
from tasks.measures import Metric

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends one JSON object a line to a file.

    Each line is flushed, so a killed run can leave only its last line incomplete.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int, evaluated: int) -> None:
        """Drops later steps, evaluations after step `evaluated`, and an incomplete last line."""
        kept = [
            line + "\n"
            for line, record in _records(self.path)
            if record["step"] <= (evaluated if "eval" in record else step)
        ]
        self._file.close()
        with replacing(self.path) as part:
            part.write_text("".join(kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Returns the steps and the evaluations of metrics.jsonl, with "nan" and "inf" as floats.

    Raises ValueError that lists every bad line.
    """
    records = [record for _, record in _records(path)]
    return [r for r in records if "eval" not in r], [r for r in records if "eval" in r]


def number(value: object) -> float | None:
    """Returns the value as a finite float; None if it is absent, NaN, infinite or no number."""
    try:
        known = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return known if math.isfinite(known) else None


def figure(metric: Metric, value: object) -> str:
    """Returns a value as text: a fraction in per cent, others with four digits, an absent one as "-"."""
    known = number(value)
    if known is None:
        return "-" if value is None else str(value)
    return f"{100 * known:.1f}%" if metric.percent else f"{known:#.4g}"


def present_metrics(*evaluations: dict) -> list[Metric]:
    """Returns the metrics that at least one of the evaluations holds, in the order of the tasks."""
    return [m for m in ALL_METRICS if any(figures.get(m.key) is not None for figures in evaluations)]


def set_title(name: str, measured: dict) -> str:
    """Returns the name of a validation set with the number of rows that were measured."""
    return f"{name}, {measured['rows']:,} rows" if "rows" in measured else name


def before_after_table(before: dict, after: dict) -> str:
    """Returns {set: {metric: value}} before and after training as an aligned table."""
    shown = present_metrics(*before.values(), *after.values())
    lines = [f"{'':20}{'before':>10}{'after':>10}"]
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, {}), after.get(name, {})
        lines.append(set_title(name, was | now))
        for m in shown:
            lines.append(f"  {m.label:18}{figure(m, was.get(m.key)):>10}{figure(m, now.get(m.key)):>10}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Returns the text with control characters spelled out, because a terminal would execute them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _records(path: str | Path) -> list[tuple[str, dict]]:
    """Returns (line, object) of each line that ends with a newline."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    found, problems = [], []
    for at, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, object_hook=_restored)
            record["step"] + 0
            found.append((line, record))
        except (ValueError, TypeError, KeyError):
            problems.append(f'{path}:{at}: not a JSON object with a number "step": {line[:80]!r}')
    if problems:
        remedy = "Remove these lines, or start the run in a new folder."
        raise ValueError(listed("bad lines in the log:", problems, remedy))
    return found


def plain(value: Any) -> Any:
    """Returns a value that JSON has: 0-d tensors as numbers, non-finite floats as "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(fields: dict) -> dict:
    """Returns the fields of an object with the floats that `plain` wrote as text."""
    return {key: NON_FINITE.get(v, v) if isinstance(v, str) else v for key, v in fields.items()}
