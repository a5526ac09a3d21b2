"""Draws the line charts of a training run as SVG, without scripts.

Coordinates are percentages of the plot: it fits every screen, and its text keeps one size. The CSS classes
are defined in report_template.html.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from report.metrics_log import number

# A curve of more points is thinned.
MAX_POINTS = 500
# Figures that only dpo and grpo log, with their titles.
REWARDS = {"reward": "Reward", "rewards/margins": "Reward margin", "rewards/accuracies": "Reward accuracy"}

Point = tuple[int, float]  # step, value
Points = Sequence[tuple[int, float | None]]  # None: not finite


class Frame(NamedTuple):
    """The ranges of a plot: steps from left to right, values from bottom to top, on a log scale if `log`."""

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
    """A curve: its CSS class `kind`, its name in the legend ("" for none), and its points.

    `kind` is "raw", "smooth", or "eval0" to "eval2". The points of an "eval" curve are also drawn as dots.
    """

    kind: str
    name: str
    points: Points

    def finite(self) -> list[Point]:
        return [(step, value) for step, value in self.points if value is not None]


class Mark(NamedTuple):
    """A vertical line at a step, with a word beside it."""

    step: int
    name: str


def curves(steps: list[dict], evals: list[dict], kept: int | None = None, turned: int | None = None) -> str:
    """Returns HTML charts of the losses, the rewards if there are any, the learning rate and gradient norm.

    The loss chart shades the gap between training and the first validation set. It marks the step whose
    weights were kept, and the step at which the validation loss turned.
    """
    lr, norm = series(steps, "learning_rate"), series(steps, "grad_norm")
    marks = [Mark(step, name) for step, name in ((turned, "turned"), (kept, "kept")) if step is not None]
    if kept is not None and kept == turned:
        marks = [Mark(kept, "turned, kept")]
    scored = has_rewards(steps)
    lines = both([] if scored else steps, evals, "loss")
    unit = f"{'gold responses, ' if scored else ''}{loss_unit(steps)}"
    charts = chart("Loss", unit, lines, may_log=True, marks=marks, gap=gap(lines))
    norms = [Line("raw", "", norm), Line("smooth", "", smooth(norm))]
    pair = "".join(chart(title, "", both(steps, evals, key)) for key, title in REWARDS.items())
    pair += chart("Learning rate", "per step", [Line("smooth", "", lr)])
    pair += chart("Gradient norm", "before clipping", norms)
    return charts + (pair and f'<div class="pair">{pair}</div>\n')


def has_rewards(steps: list[dict]) -> bool:
    """Returns whether a run is of GRPO: its training loss is near zero whatever the model learns."""
    return any("reward" in record for record in steps)


def loss_unit(steps: list[dict]) -> str:
    """Returns the unit of a run's validation loss, and of its training loss unless the run has rewards."""
    return "nats per pair" if any("rewards/margins" in record for record in steps) else "nats per token"


def both(steps: list[dict], evals: list[dict], key: str) -> list[Line]:
    """Returns the curves of a figure in training, raw and smoothed, and on each validation set."""
    points = series(steps, key)
    lines = [Line("raw", "training, each step", points), Line("smooth", "training, smoothed", smooth(points))]
    for n, (name, found) in enumerate(eval_series(evals, key).items()):
        lines.append(Line(f"eval{n % 3}", name, found))
    return lines


def gap(lines: list[Line]) -> tuple[list[Point], list[Point]]:
    """Returns the smoothed training curve and the first validation curve over the steps that both have."""
    train, validation = lines[1].finite(), lines[2].finite() if len(lines) > 2 else []
    if len(validation) < 2:
        return [], []
    first, last = validation[0][0], validation[-1][0]
    return [point for point in train if first <= point[0] <= last], validation


def series(records: list[dict], key: str) -> list[tuple[int, float | None]]:
    """Returns (step, value) of the records that have the key; the value is None if it is not finite."""
    return [(r["step"], number(r[key])) for r in records if r.get(key) is not None]


def eval_losses(evals: list[dict]) -> dict[str, list[tuple[int, float | None]]]:
    """Returns {set: [(step, loss)]}."""
    return eval_series(evals, "loss")


def eval_series(evals: list[dict], key: str) -> dict[str, list[tuple[int, float | None]]]:
    """Returns {set: [(step, value)]}. record["eval"] holds {set: measures}, or the measures of one set."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for record in evals:
        sets = record["eval"]
        if not any(isinstance(figures, dict) for figures in sets.values()):
            sets = {"validation": sets}
        for name, figures in sets.items():
            if isinstance(figures, dict) and key in figures:
                found.setdefault(name, []).append((record["step"], number(figures[key])))
    return found


def chart(
    title: str,
    unit: str,
    lines: list[Line],
    may_log: bool = False,
    marks: Sequence[Mark] = (),
    gap: tuple[Sequence[Point], Sequence[Point]] = ((), ()),
) -> str:
    """Returns an HTML figure of the lines, "" if no value is finite.

    `may_log` permits a log scale, `marks` are vertical lines, and the area between the two curves of `gap` is
    shaded.
    """
    lines = [line for line in lines if line.points]
    points = [point for line in lines for point in line.finite()]
    if not points:
        return ""
    frame, rows = frame_of(points, may_log)
    shapes = area(*gap, frame) + "".join(
        f'<polyline class="{line.kind}" points="{polyline(line.finite(), frame)}"/>' for line in lines
    )
    dots = "".join(
        dot(line, step, value, frame)
        for line in lines
        if line.kind.startswith("eval")
        for step, value in thin(line.finite())
    )
    dots += "".join(mark_at(mark, frame) for mark in marks if frame.left <= mark.step <= frame.right)
    names = [(line.kind, line.name) for line in lines if line.name]
    names += [("area", "gap")] if all(gap) else []
    legend = "".join(f'<li><i class="{kind}"></i>{escaped(name)}</li>' for kind, name in names)
    first = next(line.finite() for line in lines if line.finite())
    ends = ", ".join(f"{value:.4g} at step {step:,}" for step, value in (first[0], first[-1]))
    ends += "".join(f"; {escaped(mark.name)} at step {mark.step:,}" for mark in marks)
    return (
        f"<figure><figcaption><b>{title}</b> <span>{unit}{', log scale' if frame.log else ''}</span>"
        f"{legend and f'<ul>{legend}</ul>'}</figcaption>\n"
        f'<div class="plot"><svg role="img" aria-label="{title}: {ends}">{axes(frame, rows)}'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        f"{shapes}</svg>{dots}</svg></div>\n{not_drawn(lines[0], frame)}</figure>\n"
    )


def area(below: Sequence[Point], above: Sequence[Point], frame: Frame) -> str:
    """Returns SVG: the shaded area between two curves."""
    if not below or not above:
        return ""
    below, above = thin(below), thin(above)[::-1]
    return f'<polygon class="area" points="{polyline(below, frame)} {polyline(above, frame)}"/>'


def mark_at(mark: Mark, frame: Frame) -> str:
    """Returns SVG: a vertical line with its name at the top, on the side that has more room."""
    x = frame.x(mark.step)
    side = 'dx="-6" text-anchor="end"' if x > 50 else 'dx="6"'
    # "turned" and "kept" of two near steps must not overlap.
    dy = "1em" if mark.name == "kept" else "2.2em"
    return (
        f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'
        f'<text class="mark" x="{x:.2f}%" {side} y="0" dy="{dy}">{mark.name}, step {mark.step:,}</text>'
    )


def frame_of(points: list[Point], may_log: bool) -> tuple[Frame, list[float]]:
    """Returns the Frame for the points, which a lone spike may leave, and its horizontal grid lines' values.

    The scale is logarithmic if `may_log` is true and the values are positive and span a factor of over 30.
    """
    steps, values = [step for step, _ in points], sorted(value for _, value in points)
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high, usual = values[0], values[-1], values[int(0.98 * (len(values) - 1))]
    if may_log and 0 < 30 * low < high:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        rows = [v for k in decades for v in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if low <= v <= high]
        return Frame(left, right, low, high, log=True), rows
    if 0 < 4 * usual < high:
        high = 1.5 * usual  # A lone spike would flatten the curve, so it may leave the frame.
    if low == high or 0 < low < high / 2:
        low, high = min(low, 0), max(high, 0) or 1
    rows = ticks(low, high)
    return Frame(left, right, rows[0], rows[-1]), rows


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns multiples of 1, 2, 2.5 or 5 times a power of ten that enclose low and high, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [n * apart for n in range(math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9) + 1)]


def axes(frame: Frame, rows: list[float]) -> str:
    """Returns SVG: a horizontal line and its value for each of `rows`, and step numbers below the plot."""
    grid = ""
    for value in rows:
        y, label = f"{frame.y(value):.2f}%", re.sub(r"e([-+])0*", r"e\1", f"{value:g}")
        grid += f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        grid += f'<text class="row" x="0" dx="-8" y="{y}" dy=".32em">{label}</text>'
    for step in ticks(frame.left, frame.right, 5):
        if frame.left <= step <= frame.right and step == int(step):
            grid += f'<text class="step" x="{frame.x(step):.2f}%" y="100%" dy="1.7em">{step:,.0f}</text>'
    return f'<g class="axes">{grid}<text class="row" x="100%" y="100%" dy="3.1em">step</text></g>'


def polyline(points: Sequence[Point], frame: Frame) -> str:
    """Returns an SVG polyline's points; a single point is written twice, so that round ends show a dot."""
    points = thin(points) * (2 if len(points) == 1 else 1)
    return " ".join(f"{frame.x(step):.2f},{frame.y(value):.2f}" for step, value in points)


def dot(line: Line, step: int, value: float, frame: Frame) -> str:
    """Returns an SVG dot with its value as the tooltip; a value above the frame is drawn at its top edge."""
    tip = f"<title>{escaped(line.name)}, step {step:,}: {value:.4g}</title>"
    x, y = frame.x(step), max(0, frame.y(value))
    return f'<circle class="{line.kind}" cx="{x:.2f}%" cy="{y:.2f}%" r="4">{tip}</circle>'


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Returns at most `most` points, each the mean of a group of neighbours, at the group's middle step."""
    size = math.ceil(len(points) / most) or 1
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[len(run) // 2][0], sum(value for _, value in run) / len(run)) for run in runs]


def smooth(points: Points, beta: float | None = None) -> list[Point]:
    """Returns the exponential moving average of the finite values v_t, t = 1, 2, ..., with bias correction.

    m_t = beta m_(t-1) + (1 - beta) v_t, divided by 1 - beta^t. Default beta: 1 - 1 / max(8, count / 60).
    """
    finite, mean, averages = [(step, v) for step, v in points if v is not None], 0.0, []
    beta = 1 - 1 / max(8, len(finite) / 60) if beta is None else beta
    for t, (step, value) in enumerate(finite, start=1):
        mean = beta * mean + (1 - beta) * value
        averages.append((step, mean / (1 - beta**t)))
    return averages


def not_drawn(line: Line, frame: Frame) -> str:
    """Returns a note of how many steps are not finite or are above the frame, "" for none."""
    lost, above = [s for s, v in line.points if v is None], sum(v > frame.top for _, v in line.finite())
    notes = [f"{len(lost)} without a finite value (the first is step {lost[0]:,})"] if lost else []
    notes += [f"{above} above the frame"] if above else []
    return f'<p class="soft">Steps not drawn: {"; ".join(notes)}.</p>' if notes else ""


def escaped(value: object) -> str:
    """Returns the value as escaped HTML text; control characters that HTML forbids become U+FFFD."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", str(value)))
