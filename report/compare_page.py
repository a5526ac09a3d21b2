"""Writes the comparison of runs as one HTML file, in the form of the report (report/html.py)."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from report.bootstrap import DRAWS, LEVEL
from report.charts import (
    REWARDS,
    Line,
    chart,
    escaped,
    eval_series,
    has_rewards,
    loss_unit,
    series,
    smooth,
)
from report.compare import (
    BETTER,
    NO_CLAIM,
    ComparedSet,
    Comparison,
    gap,
    of_all_rows,
    rows_text,
    tag,
)
from report.html import MAX_EXAMPLES, marked, section, verdict, with_legend, write_page
from report.metrics_log import figure
from tasks.measures import Metric

CURVES = "thin: training, smoothed; dashed: validation"
COLOURS = 6  # the classes run0 to run5 of report_template.html
MOST_COLUMNS = 3  # With more runs than this, a table has a line for each run, not a column.
HOW = (
    f"Under each value: the difference to run A and its {LEVEL:.0%} interval, from {DRAWS:,} bootstrap draws "
    "of the rows that all runs have. A verdict means that the interval leaves out zero. Of measures of runs "
    f"that are in truth equal, about {1 - LEVEL:.0%} are expected to get a verdict by chance. "
    "Measures over all rows of each run have no interval: the runs keep no such figures of single rows."
)


def write_comparison(path: str | Path, comparison: Comparison) -> None:
    """Writes the page: what differs, the measures with intervals, the curves, and rows of disagreement."""
    runs = comparison.runs
    facts = {f"Run {tag(at)}": str(run.path) for at, run in enumerate(runs)}
    measures = "".join(measures_table(comparison, s) for s in comparison.sets)
    body = section("What differs", differences_table(comparison))
    body += section("Measures", measures and f'{measures}<p class="soft">{HOW}</p>')
    body += section("Curves", charts(comparison))
    body += "".join(
        section(f"Different responses: {escaped(s.name)}", disagreements(comparison, s))
        for s in comparison.sets
    )
    title = " and ".join(run.label for run in runs) if len(runs) == 2 else f"{len(runs)} runs"
    write_page(Path(path), "Comparison of runs", title, facts, body)


def differences_table(comparison: Comparison) -> str:
    """Returns an HTML table of the config keys and facts that differ between the runs."""
    if not comparison.differences:
        return "<p>The configs, the data and the base are the same.</p>"
    heads = [escaped(key) for key in comparison.differences]
    cells = [[escaped(value) for value in values] for values in comparison.differences.values()]
    return _table("differs", "Config keys and facts that are not the same", heads, cells, comparison)


def measures_table(comparison: Comparison, s: ComparedSet) -> str:
    """Returns an HTML table of a validation set's measures, with differences, intervals and verdicts."""
    shown = s.shown()
    heads = [f"{escaped(metric.label)}{_direction(metric)}" for metric in shown]
    cells = [[_cell(s, metric, at) for at in range(len(comparison.runs))] for metric in shown]
    for metric, values in of_all_rows(comparison, s).items():
        heads.append(f"{escaped(metric.label)}, all rows{_direction(metric)}")
        cells.append([escaped(figure(metric, value)) for value in values])
    return _table("compare", escaped(rows_text(s)), heads, cells, comparison)


def _direction(metric: Metric) -> str:
    return ' <span class="soft">lower is better</span>' if metric.lower_is_better else ""


def _cell(s: ComparedSet, metric: Metric, at: int) -> str:
    """Returns HTML with a run's value, its difference to the first run with the interval, and the verdict."""
    value = s.measures[at][metric.key]
    shown = f"<strong>{escaped(figure(metric, value))}</strong>"
    if not at:
        return shown
    apart = gap(metric, value - s.measures[0][metric.key])
    low, high = (gap(metric, edge) for edge in s.intervals[at][metric.key])
    found = s.verdict(at, metric)
    kind = "soft" if found == NO_CLAIM else "better" if found == BETTER else "worse"
    return f'{shown} <span class="soft">{apart} [{low}, {high}]</span> <span class="{kind}">{found}</span>'


def _table(kind: str, caption: str, heads: list[str], cells: list[list[str]], comparison: Comparison) -> str:
    """Returns an HTML table: `cells` has a line for each of `heads`, and a column for each run.

    A comparison of many runs is turned round: a line for each run.
    """
    runs = [f"{_tag(at)} {escaped(run.label)}" for at, run in enumerate(comparison.runs)]
    corner = ""
    if len(runs) > MOST_COLUMNS:
        corner, heads, runs = "Run", runs, heads
        cells = [list(line) for line in zip(*cells, strict=True)]
    head = "".join(f'<th scope="col">{text}</th>' for text in (corner, *runs))
    lines = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in line)}</tr>\n'
        for name, line in zip(heads, cells, strict=True)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table class="{kind}"><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n"
    )


def _tag(at: int) -> str:
    return f'<b class="tag run{at % COLOURS}">{tag(at)}</b>'


def charts(comparison: Comparison) -> str:
    """Returns the charts of all runs: losses, one chart for each unit, and rewards if there are any."""
    drawn, units = "", [loss_unit(run.steps) for run in comparison.runs]
    for unit in dict.fromkeys(units):
        shown = [at for at, own in enumerate(units) if own == unit]
        drawn += chart("Loss", f"{unit}; {CURVES}", lines(comparison, "loss", shown), may_log=True)
    for key, title in REWARDS.items():
        drawn += chart(title, CURVES, lines(comparison, key, range(len(units))))
    return drawn


def lines(comparison: Comparison, key: str, shown: Sequence[int]) -> list[Line]:
    """Returns two curves a shown run: of training, smoothed, and of the first validation set."""
    found = []
    for at in shown:
        run = comparison.runs[at]
        colour, name = f"run{at % COLOURS}", f"{tag(at)} {run.label}"
        train = [] if key == "loss" and has_rewards(run.steps) else smooth(series(run.steps, key))
        validation = next(iter(eval_series(run.evals, key).values()), [])
        # The legend names a run once.
        found.append(Line(f"train {colour}", "" if validation else name if train else "", train))
        found.append(Line(f"eval {colour}", name if validation else "", validation))
    return found


def disagreements(comparison: Comparison, s: ComparedSet) -> str:
    """Returns HTML of the rows to which the runs respond differently, or a sentence if there are none."""
    rows = s.disagreements()
    if not rows:
        return f"<p>All runs respond the same to all {len(s.rows[0]):,} rows.</p>"
    shown = [_example(n, at, s, s.task) for n, at in enumerate(rows[:MAX_EXAMPLES], start=1)]
    count = f"<p>The runs respond differently to {len(rows):,} of {len(s.rows[0]):,} rows.</p>\n"
    return count + with_legend(shown, len(rows) - MAX_EXAMPLES, s.task)


def _example(n: int, at: int, s: ComparedSet, task: ModuleType) -> str:
    """Returns HTML of one row: prompt and gold, then each different response with the runs that gave it."""
    prompt, gold, _ = s.rows[0][at]
    said: dict[str, list[int]] = {}
    for run, rows in enumerate(s.rows):
        said.setdefault(rows[at][2].strip(), []).append(run)
    parts = [
        (task.TITLES.get("source", "Source"), "", [("", task.shown_prompt(prompt))]),
        (task.TITLES.get("gold", "Gold"), "", [("", gold)]),
    ]
    for text, runs in said.items():
        pieces = task.pieces(text, gold, prompt)
        found = "as expected" if text == gold.strip() else verdict([kind for kind, _ in pieces], task)
        parts.append((" ".join(map(_tag, runs)), found, pieces))
    body = "".join(
        f'<div><h4>{title} {escaped(found)}</h4><p dir="auto">{marked(pieces)}</p></div>\n'
        for title, found, pieces in parts
    )
    right = ", ".join(tag(run) for run in said.get(gold.strip(), []))
    remark = f'<span class="soft">{f"as expected: {right}" if right else ""}</span>'
    return (
        f'<article class="example"><h3>{n}. {escaped(s.name)} {remark}</h3>'
        f'<div class="cells runs">\n{body}</div></article>\n'
    )
