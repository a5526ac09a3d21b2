"""The run's report: one self-contained HTML file that needs no script and no network, for the screen and for
paper.

The curves' coordinates are per cent of the plot, so that one drawing fits a phone and a desktop at the same
text size. The page's frame and styles are in report_template.html.
"""

import math
import re
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from common.files import replacing
from report.metrics_log import figure, number, present_metrics, set_title
from tasks import text

MAX_POINTS, MAX_EXAMPLES, MAX_CHARACTERS = 500, 40, 4000
VISIBLE_SPACE = str.maketrans({" ": "\u2423", "\n": "\u21b5\n", "\t": "\u21e5"})


def write_report(
    path, *, run: dict, steps: list, evals: list, before: dict, after: dict, examples: list, task=text
) -> None:
    """Writes report.html.

    run: {label: value} for the list of facts; its "name", or else the folder's, is the title. steps, evals:
    what `read_metrics` returns. before, after: {set: {metric: value, "per_label": {class: scores}}}.
    examples: {"set", "prompt", "gold", "before", "after"}, of which any may be absent; `task` (a module of
    tasks/) says how they are shown.
    """
    path, sets = Path(path), dict.fromkeys([*before, *after])
    cards = "".join(card(s, before.get(s, {}), after.get(s, {})) for s in sets)
    tables = "".join(class_table(s, before.get(s, {}), after.get(s, {})) for s in sets)
    page = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")).substitute(
        title=_text(run.get("name", path.resolve().parent.name)),
        facts="".join(
            f"<div><dt>{_text(k)}</dt><dd>{_value(v)}</dd></div>\n" for k, v in run.items() if k != "name"
        ),
        cards=_section("Before and after", cards),
        curves=_section("Curves", curves(steps, evals)),
        classes=_section("By class", tables and f'<div class="pair">{tables}</div>'),
        examples=_section("Examples", example_list(examples, task)),
    )
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


# ---- figures


def card(name: str, before: dict, after: dict) -> str:
    """One validation set: each figure after training, and before it."""
    rows = []
    for metric in present_metrics(before, after):
        was, now = number(before.get(metric.key)), number(after.get(metric.key))
        worse = None not in (was, now) and (now > was if metric.lower_is_better else now < was)
        rows.append(
            f"<div><dt>{metric.label}</dt><dd>"
            f"<strong>{_text(figure(metric, after.get(metric.key)))}</strong> "
            f'<span class="soft">before {_text(figure(metric, before.get(metric.key)))}</span>'
            f"{' <em>worse</em>' if worse else ''}</dd></div>\n"
        )
    return (
        f'<article class="card"><h3>{_text(set_title(name, before | after))}</h3>'
        f"<dl>\n{''.join(rows)}</dl></article>\n"
        if rows
        else ""
    )


def class_table(name: str, before: dict, after: dict) -> str:
    """Precision, recall and F1 of each entity class before and after training, the commonest class first."""
    old, new = before.get("per_label") or {}, after.get("per_label") or {}
    support = {k: number((new.get(k) or old.get(k)).get("support")) for k in {**old, **new}}
    rows = []
    for label in sorted(support, key=lambda k: (-(support[k] or 0), k)):
        cells = [f"{support[label] or 0:,.0f}"]
        for key in ("precision", "recall", "f1"):
            was, now = _percent(old.get(label, {}).get(key)), _percent(new.get(label, {}).get(key))
            cells.append(f'<span class="soft">{was} \u2192</span> {now}')
        rows.append(
            f'<tr><th scope="row">{_text(label)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>\n'
        )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Class", "Support", "Precision", "Recall", "F1"))
    caption = f"{_text(name)}: per cent, before \u2192 after"
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
    table = f"<table><caption>{caption}</caption>\n{body}</table>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{table}</div>\n'
        if rows
        else ""
    )


# ---- curves


class Frame(NamedTuple):
    """The part of the plane that a plot shows: steps from left to right, values from bottom to top."""

    left: float
    right: float
    bottom: float
    top: float
    log: bool = False

    def x(self, step: float) -> float:
        return 100 * (step - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        scale = math.log if self.log else float
        return 100 * (scale(self.top) - scale(value)) / (scale(self.top) - scale(self.bottom))


class Line(NamedTuple):
    """A curve: its CSS class, its name in the legend ("" for none), and [(step, value, or None if not
    finite)].
    """

    kind: str
    name: str
    points: list

    def finite(self) -> list:
        return [(step, value) for step, value in self.points if value is not None]


def curves(steps: list[dict], evals: list[dict]) -> str:
    """Loss with its smoothed line and the evaluations; learning rate; gradient norm."""
    loss, rate, norm = (
        [(r["step"], number(r[k])) for r in steps if r.get(k) is not None]
        for k in ("loss", "learning_rate", "grad_norm")
    )
    lines = [Line("raw", "each step", loss), Line("smooth", "smoothed", smooth(loss))]
    lines += [
        Line(f"eval{n % 3}", name, points) for n, (name, points) in enumerate(eval_losses(evals).items())
    ]
    small = chart("Learning rate", "per step", [Line("smooth", "", rate)])
    small += chart(
        "Gradient norm", "before clipping", [Line("raw", "", norm), Line("smooth", "", smooth(norm))]
    )
    return chart("Loss", "nats per token", lines, may_log=True) + (
        small and f'<div class="pair">{small}</div>\n'
    )


def eval_losses(evals: list[dict]) -> dict[str, list[tuple]]:
    """{set: [(step, loss or None)]}, where an evaluation holds one set's figures or {set: figures}."""
    losses = {}
    for record in evals:
        held = record["eval"]
        for name, figures in ({"validation": held} if "loss" in held else held).items():
            if isinstance(figures, dict):
                losses.setdefault(name, []).append((record["step"], number(figures.get("loss"))))
    return losses


def chart(title: str, unit: str, lines: list[Line], may_log: bool = False) -> str:
    """A figure of the lines, those of evaluations with dots; "" where there is no finite value."""
    points = [p for line in lines for p in line.finite()]
    if not points:
        return ""
    frame, rows = frame_of(points, may_log)
    shapes = "".join(
        f'<polyline class="{line.kind}" points="{polyline(line.finite(), frame)}"/>' for line in lines
    )
    dots = "".join(
        dot(line, *p, frame) for line in lines if line.kind.startswith("eval") for p in thin(line.finite())
    )
    legend = "".join(f'<li><i class="{line.kind}"></i>{_text(line.name)}</li>' for line in lines if line.name)
    ends = next(line.finite() for line in lines if line.finite())
    told = ", ".join(f"{value:.4g} at step {step:,}" for step, value in (ends[0], ends[-1]))
    return (
        f"<figure><figcaption><b>{title}</b> <span>{unit}{', log scale' if frame.log else ''}</span>"
        f'{legend and f"<ul>{legend}</ul>"}</figcaption>\n<div class="plot">'
        f'<svg role="img" aria-label="{title}: {told}">'
        f"{axes(frame, rows)}"
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        f"{shapes}</svg>{dots}</svg></div>\n"
        f"{not_drawn(lines[0], frame)}</figure>\n"
    )


def frame_of(points: list[tuple], may_log: bool) -> tuple[Frame, list[float]]:
    """The frame of the points and the values of its grid lines; logarithmic if allowed and they span a factor
    of 30.
    """
    steps, values = [s for s, _ in points], sorted(v for _, v in points)
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high, usual = values[0], values[-1], values[int(0.98 * (len(values) - 1))]
    if may_log and 0 < 30 * low < high:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        rows = [v for k in decades for v in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if low <= v <= high]
        return Frame(left, right, low, high, log=True), rows
    if 0 < 4 * usual < high:
        high = 1.5 * usual  # a lone spike may leave the frame, or it would flatten the curve
    if low == high or 0 < low < high / 2:
        low, high = min(low, 0), max(high, 0) or 1
    rows = ticks(low, high)
    return Frame(left, right, rows[0], rows[-1]), rows


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten, the first at or below `low`, the last at or above
    `high`.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [n * apart for n in range(math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9) + 1)]


def axes(frame: Frame, rows: list[float]) -> str:
    """Grid lines with their values, and steps below."""
    across = "".join(
        f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        f'<text class="row" x="0" dx="-8" y="{y}" dy=".32em">{label}</text>'
        for v in rows
        for y, label in [(f"{frame.y(v):.2f}%", re.sub(r"e([-+])0*", r"e\1", f"{v:g}"))]
    )
    steps = [s for s in ticks(frame.left, frame.right, 5) if frame.left <= s <= frame.right and s == int(s)]
    below = "".join(
        f'<text class="step" x="{frame.x(s):.2f}%" y="100%" dy="1.7em">{s:,.0f}</text>' for s in steps
    )
    return f'<g class="axes">{across}{below}<text class="row" x="100%" y="100%" dy="3.1em">step</text></g>'


def polyline(points: list[tuple], frame: Frame) -> str:
    """SVG points in per cent of the plot; a single point is doubled, since its round line ends then show as a
    dot.
    """
    points = thin(points)
    return " ".join(
        f"{frame.x(s):.2f},{frame.y(v):.2f}" for s, v in (points * 2 if len(points) == 1 else points)
    )


def dot(line: Line, step: int, value: float, frame: Frame) -> str:
    """A dot of an evaluation, whose value shows when one points at it; at the edge where it lies above the
    frame.
    """
    told = f"<title>{_text(line.name)}, step {step:,}: {value:.4g}</title>"
    x, y = frame.x(step), max(0, frame.y(value))
    return f'<circle class="{line.kind}" cx="{x:.2f}%" cy="{y:.2f}%" r="4">{told}</circle>'


def thin(points: list[tuple], most: int = MAX_POINTS) -> list[tuple]:
    """At most `most` points: the mean of each run of neighbours, at the step in its middle."""
    size = math.ceil(len(points) / most) or 1
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[len(run) // 2][0], sum(value for _, value in run) / len(run)) for run in runs]


def smooth(points: list[tuple], beta: float | None = None) -> list[tuple]:
    """The bias-corrected moving average of the finite values, m_t = beta m_(t-1) + (1 - beta) v_t over 1 -
    beta^t.
    """
    finite, mean, out = [(s, v) for s, v in points if v is not None], 0.0, []
    beta = 1 - 1 / max(8, len(finite) / 60) if beta is None else beta
    for t, (step, value) in enumerate(finite, start=1):
        mean = beta * mean + (1 - beta) * value
        out.append((step, mean / (1 - beta**t)))
    return out


def not_drawn(line: Line, frame: Frame) -> str:
    """The steps that the drawing leaves out: not finite, or above the frame."""
    lost, above = [s for s, v in line.points if v is None], sum(v > frame.top for _, v in line.finite())
    notes = [f"{len(lost)} without a finite value (the first is step {lost[0]:,})"] if lost else []
    notes += [f"{above} above the frame"] if above else []
    return f'<p class="soft">Steps not drawn: {"; ".join(notes)}.</p>' if notes else ""


# ---- examples


def example_list(examples: list[dict], task) -> str:
    """The legend and the first examples."""
    shown = "".join(example(n, item, task) for n, item in enumerate(examples[:MAX_EXAMPLES], start=1))
    legend = "".join(f"<li>{_mark(*entry)}</li>" for entry in task.LEGEND.items())
    rest = len(examples) - MAX_EXAMPLES
    more = f'<p class="soft">{rest:,} more are not shown.</p>\n' if rest > 0 else ""
    return shown and f'<ul class="legend" aria-label="Legend">{legend}</ul>\n{shown}{more}'


def example(n: int, item: dict, task) -> str:
    """One sample: the prompt, the responses before and after with their differences from the gold, and the
    gold.
    """
    prompt, gold = item.get("prompt") or "", item.get("gold") or ""
    answers = {k: task.pieces(item[k], gold, prompt) for k in ("before", "after") if item.get(k) is not None}
    source = [("", task.shown_prompt(prompt))] if prompt else None
    parts = {"source": source, **answers, "gold": [("", gold)] if gold else None}
    body = "".join(
        f'<div class="{k}"><h4>{task.TITLES.get(k, k.title())}</h4><p dir="auto">{_marked(found)}</p></div>\n'
        for k, found in parts.items()
        if found is not None
    )
    told = f'<span class="soft">{verdict(item.get("after"), gold, answers, task.LEGEND)}</span>'
    head = f"<h3>{n}. {_text(item.get('set', ''))} {told}</h3>"
    return f'<article class="example">{head}<div class="cells">\n{body}</div></article>\n'


def verdict(after: str | None, gold: str, answers: dict, legend: dict[str, str]) -> str:
    """The differences of the response after training in words, for those who do not see the colours."""
    kinds = [kind for kind, _ in answers.get("after", [])]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in legend if kind in kinds and kind != "ok")
    return "after: as expected" if gold and after == gold else told and f"after: {told}"


# ---- text


def _marked(parts: list[tuple[str, str]]) -> str:
    """Pieces as HTML, cut at a length that no page needs more of."""
    text = "".join(piece for _, piece in parts)
    if len(text) > 2 * MAX_CHARACTERS:
        return f"{_text(text[:MAX_CHARACTERS])} \u2026 ({len(text) - MAX_CHARACTERS:,} more characters)"
    return "".join(_mark(*part) for part in parts) or '<span class="soft">(empty)</span>'


def _mark(kind: str, text: str) -> str:
    """A piece as HTML; a difference in white space alone is made visible."""
    tag = {"": "", "missing": "del"}.get(kind, "mark")
    shown = _text(text.translate(VISIBLE_SPACE) if kind and text.isspace() else text)
    return f'<{tag} class="{kind}">{shown}</{tag}>' if tag else shown


def _section(title: str, body: str) -> str:
    return body and f"<section><h2>{title}</h2>\n{body}</section>\n"


def _text(value) -> str:
    """Escaped, and without the control characters that HTML forbids."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", str(value)))


def _percent(value) -> str:
    return "-" if number(value) is None else f"{100 * number(value):.1f}"


def _value(value) -> str:
    """A fact: whole numbers with thousands separators, others to four digits."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)
