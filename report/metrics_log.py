"""Reads and writes metrics.jsonl, one JSON object a line, and formats measures as text for a terminal."""

import json
import math
from pathlib import Path
from typing import Any

from common.errors import listed
from common.files import replacing, sync
from common.progress import printable
from tasks.choose import ALL_METRICS
from tasks.classification import columns
from tasks.measures import Metric

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object a line.

    Each line is flushed, so a killed run can leave only its last line incomplete; `sync` is for power loss.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        sync(self._file)

    def truncate_after(self, step: int, evaluated: int) -> None:
        """Drops evaluations after step `evaluated`, other records after `step`, and a cut last line."""
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
    """Returns the training records and the evaluation records of metrics.jsonl.

    Raises ValueError that lists every bad line. The texts "nan", "inf" and "-inf" become floats.
    """
    records = [record for _, record in _records(path)]
    return [r for r in records if "eval" not in r], [r for r in records if "eval" in r]


def number(value: object) -> float | None:
    """Returns the value as a finite float, or None if it is missing, NaN, infinite or not a number."""
    try:
        known = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return known if math.isfinite(known) else None


def figure(metric: Metric, value: object) -> str:
    """Returns a measure as text: a fraction in per cent, others with four digits, a missing one as "-"."""
    known = number(value)
    if known is None:
        return "-" if value is None else str(value)
    return f"{100 * known:.1f}%" if metric.percent else f"{known:#.4g}"


def present_metrics(*evaluations: dict) -> list[Metric]:
    """Returns the metrics that at least one of the {metric: value} dicts contains, in a fixed order."""
    return [m for m in ALL_METRICS if any(figures.get(m.key) is not None for figures in evaluations)]


def set_title(name: str, measured: dict) -> str:
    """Returns a validation set's name with its number of evaluated rows, such as "val, 300 rows"."""
    return f"{name}, {measured['rows']:,} rows" if "rows" in measured else name


def before_after_table(before: dict, after: dict) -> str:
    """Returns a text table of measures; `before` and `after` training are {set: {metric: value}}."""
    shown = present_metrics(*before.values(), *after.values())
    lines = [f"{'':20}{'before':>10}{'after':>10}"]
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, {}), after.get(name, {})
        lines.append(set_title(name, was | now))
        for m in shown:
            lines.append(f"  {m.label:18}{figure(m, was.get(m.key)):>10}{figure(m, now.get(m.key)):>10}")
    return "\n".join(lines)


def confusion_lines(confusion: dict[str, dict[str, int]]) -> list[str]:
    """Returns a confusion matrix {gold: {predicted: rows}} as lines of text, a gold label a line."""
    across = columns(confusion)
    heads = [printable(label) for label in across]
    widths = [max(len(head), 6) + 2 for head in heads]
    lines = [f"{'expected':20}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    for gold, row in confusion.items():
        cells = (f"{row.get(label, 0):>{w},}" for label, w in zip(across, widths, strict=True))
        lines.append(f"{printable(gold):20}" + "".join(cells))
    return lines


def _records(path: str | Path) -> list[tuple[str, dict]]:
    """Returns [(line, parsed object)] of the file; a last line without a newline is left out."""
    # A byte that is no UTF-8 becomes \\x.., which is no JSON either, so the error below names its line.
    lines = Path(path).read_text(encoding="utf-8", errors="backslashreplace").split("\n")[:-1]
    found, problems = [], []
    for at, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, object_hook=_restored)
            record["step"] + 0
            record.get("eval", {}).items()
            found.append((line, record))
        except (ValueError, TypeError, KeyError, AttributeError):
            what = 'a number "step", and an object "eval" if it has one'
            problems.append(f"{path}:{at}: not a JSON object with {what}: {line[:80]!r}")
    if problems:
        remedy = "Remove these lines, or start the run in a new folder."
        raise ValueError(listed("bad lines in the log:", problems, remedy))
    return found


def plain(value: Any) -> Any:
    """Returns a value for JSON: 0-d tensors as numbers; NaN and infinities as "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(fields: dict) -> dict:
    """Returns a JSON object's fields with the texts "nan", "inf" and "-inf" turned into floats."""
    return {key: NON_FINITE.get(v, v) if isinstance(v, str) else v for key, v in fields.items()}
