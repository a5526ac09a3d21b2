"""Compares finished runs: what differs in them, their measures, and the rows on which they disagree.

A run is a folder that train.py wrote. Its measures are computed again from the rows of answers.jsonl, over
the rows that all runs have: rows of a validation set with the same prompt and gold response.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import listed
from common.files import read_json
from common.progress import printable
from report.bootstrap import LEVEL, Rows, paired
from report.metrics_log import figure, number, present_metrics, read_metrics
from tasks import classification, text
from tasks.choose import TASKS, name_of
from tasks.measures import Metric

# Keys that differ between any two runs and say nothing about them.
IGNORED = {"run.name", "run.dir"}
TEXTS = ("set", "prompt", "gold", "after")  # of a row of answers.jsonl
NO_CLAIM, BETTER, WORSE = "no clear difference", "better", "worse"


@dataclass(frozen=True)
class FinishedRun:
    """A run's label, and what the files of its folder hold."""

    label: str
    path: Path
    config: dict[str, Any]  # {section.key: value}
    manifest: dict
    answers: list[dict]  # the rows of answers.jsonl
    steps: list[dict]
    evals: list[dict]

    def measured(self, name: str) -> dict:
        """Returns the measures of a validation set after training, which are over all of its rows."""
        return self.manifest.get("after", {}).get(name, {})


@dataclass(frozen=True)
class ComparedSet:
    """A validation set: R runs over the rows that all of them have."""

    name: str
    task: ModuleType
    rows: list[Rows]  # R x shared rows (prompt, gold, response)
    totals: list[int]  # the number of rows of each run, shared or not
    measures: list[dict]  # R x {measure: value}
    intervals: list[dict[str, list[float]]]  # R x {measure: [low, high]} of the difference to the first run

    def shown(self) -> list[Metric]:
        return present_metrics(*self.measures)

    def verdict(self, run: int, metric: Metric) -> str:
        """Returns whether the run is better or worse than the first: if the interval leaves out zero."""
        low, high = self.intervals[run].get(metric.key, (0, 0))
        if low <= 0 <= high:
            return NO_CLAIM
        return BETTER if (high < 0) == metric.lower_is_better else WORSE

    def disagreements(self) -> list[int]:
        """Returns the rows to which the runs respond differently, those that one of them gets right first."""
        found = []
        for at, same in enumerate(zip(*self.rows, strict=True)):
            if len(said := {text.strip() for _, _, text in same}) > 1:
                gold = same[0][1].strip()
                found.append((gold not in said, at))
        return [at for _, at in sorted(found)]


@dataclass(frozen=True)
class Comparison:
    runs: list[FinishedRun]
    differences: dict[str, list[str]]  # {config key or fact: its value in each run}
    sets: list[ComparedSet]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Reads two or more finished runs and compares each with the first.

    Raises ValueError if there are fewer than two, if one is no finished run, or if they share no row.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ValueError("--compare needs two or more different folders of runs, for example runs/a runs/b")
    problems, runs = [], []
    for path, label in zip(paths, labels(paths), strict=True):
        try:
            runs.append(read_run(path, label))
        except ValueError as e:
            problems.append(str(e))
    if problems:
        raise ValueError(listed("these runs cannot be compared:", problems))
    return Comparison(runs, differences(runs), compare_sets(runs))


def labels(paths: Sequence[Path]) -> list[str]:
    """Returns a short name for each folder: its last part, or the whole path if two have the same name."""
    names = [path.resolve().name for path in paths]
    return [n if names.count(n) == 1 else str(p) for n, p in zip(names, paths, strict=True)]


def read_run(path: Path, label: str) -> FinishedRun:
    """Returns the run in a folder; raises ValueError with the remedy if it is none or not finished."""
    config = path / "config.toml"
    again = f"python train.py --config {config} --resume"
    if not config.is_file():
        raise ValueError(f"{path}: no run is here (no config.toml); name a folder that train.py wrote")
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path}: the run is not finished; continue with: {again}")
    if not (path / "answers.jsonl").is_file():
        raise ValueError(
            f"{path}: an older release wrote this run without answers.jsonl; to generate it: {again}"
        )
    try:
        sections = tomllib.loads(config.read_text(encoding="utf-8"))
        values = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.items()}
        answers = _read_answers(path / "answers.jsonl")
        steps, evals = read_metrics(path / "metrics.jsonl")
        manifest = _read_manifest(path / "manifest.json")
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{path}: damaged ({e}); write its files again with: {again}") from None
    return FinishedRun(label, path, values, manifest, answers, steps, evals)


def _read_answers(file: Path) -> list[dict]:
    """Returns the rows of answers.jsonl; raises ValueError that names the first bad line."""
    rows = []
    lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold U+2028
    for at, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in TEXTS):
            raise ValueError(f"{file}:{at}: not a JSON object with the texts {', '.join(TEXTS)}")
        rows.append(row)
    return rows


def _read_manifest(file: Path) -> dict:
    """Returns the manifest; raises ValueError if its tasks or its measures are not of validation sets."""
    manifest = read_json(file, "it is written at the end of a run")
    for key, kind in (("tasks", str), ("after", dict)):
        part = manifest.get(key, {})
        if not isinstance(part, dict) or not all(isinstance(value, kind) for value in part.values()):
            what = "names" if kind is str else "objects"
            raise ValueError(f"{file}: {key!r} is not an object with {what} as its values")
    return manifest


def differences(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Returns the config keys and the facts of the manifests that are not equal in all runs."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        found[key] = [_shown(run.config[key]) if key in run.config else "-" for run in runs]
    for name in ("base_sha256", "data_sha256", "tasks", "environment"):
        facts = [_named(name, run.manifest.get(name)) for run in runs]
        for key in dict.fromkeys(key for fact in facts for key in fact):
            found[key] = [fact.get(key, "-") for fact in facts]
    return {key: v for key, v in found.items() if key not in IGNORED and len(set(v)) > 1}


def _named(name: str, facts: object) -> dict[str, str]:
    """Returns {name: value} of a part of a manifest; hashes are cut to 12 digits."""
    cut = 12 if name.endswith("_sha256") else None
    if not isinstance(facts, dict):
        return {name: str(facts)[:cut]}
    return {f"{name.removesuffix('_sha256')} {key}": str(value)[:cut] for key, value in facts.items()}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def compare_sets(runs: Sequence[FinishedRun]) -> list[ComparedSet]:
    """Returns the validation sets of which all runs have rows; raises ValueError if there are none."""
    indexes = [_indexed(run.answers) for run in runs]
    shared = [key for key in indexes[0] if all(key in index for index in indexes[1:])]
    if not shared:
        counts = ", ".join(f"{run.path} has {len(run.answers)} rows" for run in runs)
        raise ValueError(
            f"the runs share no validation row ({counts}): a row is the same if its set, prompt and gold "
            "response are; train both with the same data.validation and train.eval_samples"
        )
    sets = []
    for name in dict.fromkeys(key[0] for key in shared):
        keys = [key for key in shared if key[0] == name]
        rows: list[Rows] = [[(key[1], key[2], index[key]) for key in keys] for index in indexes]
        totals = [sum(row["set"] == name for row in run.answers) for run in runs]
        task = TASKS.get(runs[0].manifest.get("tasks", {}).get(name, ""), text)
        sets.append(ComparedSet(name, task, rows, totals, *paired(rows, task, labels=_labels(runs, name))))
    return sets


def _labels(runs: Sequence[FinishedRun], name: str) -> list[str]:
    """Returns the labels that the runs knew in a validation set, those of their training rows included."""
    found = {row["gold"] for run in runs for row in run.answers if row["set"] == name}
    for run in runs:
        found.update(run.config.get("data.labels", []))
        # A response that was no label is not in the columns of the run's confusion matrix.
        confusion = run.measured(name).get("confusion") or {}
        found.update(text for row in confusion.values() for text in row if text != classification.NO_LABEL)
    return sorted(found)


def _indexed(answers: Sequence[dict]) -> dict[tuple[str, str, str, int], str]:
    """Returns {(set, prompt, gold, n): response}; n counts rows that are otherwise equal."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = {}
    for row in answers:
        key = (row["set"], row["prompt"], row["gold"])
        found[*key, seen[key]] = row["after"]
        seen[key] += 1
    return found


def of_all_rows(comparison: Comparison, s: ComparedSet) -> dict[Metric, list[float | None]]:
    """Returns the measures that responses alone do not give, such as the loss, over all rows of each run."""
    afters = [run.measured(s.name) for run in comparison.runs]
    shown = [metric for metric in present_metrics(*afters) if metric.key not in s.measures[0]]
    return {metric: [number(after.get(metric.key)) for after in afters] for metric in shown}


def gap(metric: Metric, value: float) -> str:
    """Returns a difference as text with its sign: points of a per cent, or four digits."""
    return f"{100 * value:+.1f}" if metric.percent else f"{value:+.3g}"


def as_json(comparison: Comparison) -> dict:
    """Returns the comparison as an object for --json."""
    sets = {}
    for s in comparison.sets:
        measures = {}
        for metric in s.shown():
            measures[metric.key] = [
                {
                    "value": own[metric.key],
                    "difference": own[metric.key] - s.measures[0][metric.key],
                    "interval": s.intervals[at][metric.key],
                    "verdict": s.verdict(at, metric) if at else None,
                }
                for at, own in enumerate(s.measures)
            ]
        sets[s.name] = {"rows": len(s.rows[0]), "rows_of_runs": s.totals, "task": name_of(s.task)}
        sets[s.name] |= {metric.key: values for metric, values in of_all_rows(comparison, s).items()}
        sets[s.name] |= {"measures": measures, "disagreements": len(s.disagreements())}
    runs = [str(run.path) for run in comparison.runs]
    return {"runs": runs, "differences": comparison.differences, "sets": sets}


def as_text(comparison: Comparison) -> str:
    """Returns the comparison as tables for a terminal."""
    runs = comparison.runs
    lines = [f"{tag(at):4}{run.path}" for at, run in enumerate(runs)]
    if comparison.differences:
        lines += ["", "what differs"]
        wide = max(map(len, comparison.differences))
        for key, values in comparison.differences.items():
            lines.append(
                f"  {key:{wide}}  " + "  ".join(f"{tag(n)} {_short(v)}" for n, v in enumerate(values))
            )
    for s in comparison.sets:
        head = f"difference to {tag(0)}, {LEVEL:.0%} interval"
        lines += ["", rows_text(s), f"  {'':18}{'':4}{'value':>9}  {head}"]
        for metric in s.shown():
            for at, own in enumerate(s.measures):
                lines.append(_line(s, metric, at, own))
        rest = of_all_rows(comparison, s)
        lines += ["  over all rows of each run:"] if rest else []
        for metric, found in rest.items():
            for at, value in enumerate(found):
                lines.append(f"  {'' if at else metric.label:18}{tag(at):4}{figure(metric, value):>9}")
        lines.append(f"  the runs respond differently to {len(s.disagreements()):,} rows")
    return "\n".join(lines)


def _line(s: ComparedSet, metric: Metric, at: int, own: dict) -> str:
    """Returns the line of one measure of one run."""
    line = f"  {'' if at else metric.label:18}{tag(at):4}{figure(metric, own[metric.key]):>9}"
    if not at:
        return line
    apart = gap(metric, own[metric.key] - s.measures[0][metric.key])
    low, high = (gap(metric, edge) for edge in s.intervals[at][metric.key])
    return f"{line}  {apart:>6}  [{low}, {high}]  {s.verdict(at, metric)}"


def rows_text(s: ComparedSet) -> str:
    """Returns the set's name, its task, and the numbers of rows that are shared and, if more, of each run."""
    count = len(s.rows[0])
    text = f"{s.name} ({name_of(s.task)}), {count:,} rows that all runs have"
    if set(s.totals) == {count}:
        return text
    return f"{text} (of {', '.join(f'{total:,}' for total in s.totals)} rows)"


def _short(text: str, most: int = 40) -> str:
    return printable(text if len(text) <= most else f"{text[: most - 3]}...").replace("\n", " ")


def tag(at: int) -> str:
    """Returns "A" for the first run, "B" for the second; "27" for the 27th."""
    return chr(ord("A") + at) if at < 26 else str(at + 1)
