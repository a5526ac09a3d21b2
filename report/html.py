"""Writes the report of a run as one HTML file, for screen and print, without scripts or network access.

The surrounding HTML and the CSS are in report_template.html.
"""

from collections.abc import Sequence
from pathlib import Path
from string import Template
from types import ModuleType

from common.files import replacing
from report.charts import curves, escaped
from report.diagnosis import Diagnosis, Kept, diagnose, first_set, turned
from report.metrics_log import figure, number, present_metrics, set_title
from report.retention import retention_table
from tasks.classification import columns

MAX_EXAMPLES, MAX_CHARACTERS = 40, 4000
VISIBLE_SPACE = str.maketrans({" ": "\u2423", "\n": "\u21b5\n", "\t": "\u21e5"})


def write_report(
    path: str | Path,
    *,
    run: dict,
    steps: list[dict],
    evals: list[dict],
    before: dict,
    after: dict,
    examples: list[dict],
    task: ModuleType,
    kept: Kept | None = None,
    retention: dict | None = None,
) -> None:
    """Writes the report to `path`.

    Args:
        run: {label: value}, listed at the top; "name" (default: the folder's name) is the page's title.
        steps, evals: the training and evaluation records, as read_metrics returns them.
        before, after: measures, {validation set: {metric: value, "per_label": {class: scores}}}.
        examples: dicts with some of the keys "set", "prompt", "gold", "before" and "after".
        task: a module of tasks/, which defines how examples are shown.
        kept: the step whose weights the run kept.
        retention: what report.retention.retention_changes returns.
    """
    path, sets = Path(path), dict.fromkeys([*before, *after])
    cards = "".join(card(s, before.get(s, {}), after.get(s, {})) for s in sets)
    tables = "".join(class_table(s, before.get(s, {}), after.get(s, {})) for s in sets)
    tables += "".join(confusion_table(s, after.get(s, {})) for s in sets)
    facts = {k: v for k, v in run.items() if k != "name"}
    drawn = curves(steps, evals, kept.step if kept else None, turned(first_set(evals)))
    diagnosis = diagnose(steps, evals, kept, before.get(next(iter(sets), "")))
    body = section("Before and after", cards)
    body += section("Retention: what training forgot", retention_table(retention or {}))
    body += section("Curves", notes(diagnosis) + drawn)
    body += section("By class", tables and f'<div class="pair">{tables}</div>')
    body += section("Examples", example_list(examples, task))
    write_page(path, "Training report", run.get("name", path.resolve().parent.name), facts, body)


def write_page(path: Path, over: str, title: object, facts: dict, body: str) -> None:
    """Writes a page with a line over its title, {label: value} below it, and the HTML `body`."""
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    listed = "".join(f"<div><dt>{escaped(k)}</dt><dd>{_fact(v)}</dd></div>\n" for k, v in facts.items())
    page = template.substitute(over=over, title=escaped(title), facts=listed, body=body)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


def notes(diagnosis: Diagnosis) -> str:
    """Returns HTML with the warnings and findings about a run, "" if there are none."""
    items = [f'<li class="warning"><b>Warning.</b> {escaped(text)}</li>' for text in diagnosis.warnings]
    items += [f"<li>{escaped(text)}</li>" for text in diagnosis.findings]
    return f'<ul class="notes">{"".join(items)}</ul>\n' if items else ""


def card(name: str, before: dict, after: dict) -> str:
    """Returns HTML with the measures of one validation set, after and before training."""
    rows = ""
    for metric in present_metrics(before, after):
        was, now = number(before.get(metric.key)), number(after.get(metric.key))
        worse = False
        if was is not None and now is not None:
            worse = now > was if metric.lower_is_better else now < was
        rows += (
            f"<div><dt>{metric.label}</dt><dd>"
            f"<strong>{escaped(figure(metric, after.get(metric.key)))}</strong> "
            f'<span class="soft">before {escaped(figure(metric, before.get(metric.key)))}</span>'
            f"{' <em>worse</em>' if worse else ''}</dd></div>\n"
        )
    title = f"<h3>{escaped(set_title(name, before | after))}</h3>"
    return rows and f'<article class="card">{title}<dl>\n{rows}</dl></article>\n'


def class_table(name: str, before: dict, after: dict) -> str:
    """Returns an HTML table of each class's precision, recall and F1, the most frequent class first."""
    old, new = before.get("per_label") or {}, after.get("per_label") or {}
    support = {label: number(scores.get("support")) or 0 for label, scores in (old | new).items()}
    rows = ""
    for label in sorted(support, key=lambda k: (-support[k], k)):
        rows += f'<tr><th scope="row">{escaped(label)}</th><td>{support[label]:,.0f}</td>'
        for key in ("precision", "recall", "f1"):
            was, now = (_percent(scores.get(label, {}).get(key)) for scores in (old, new))
            rows += f'<td><span class="soft">{was} \u2192</span> {now}</td>'
        rows += "</tr>\n"
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Class", "Support", "Precision", "Recall", "F1"))
    caption = f"{escaped(name)}: per cent, before \u2192 after"
    return rows and (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def confusion_table(name: str, measured: dict) -> str:
    """Returns an HTML table of the rows by expected label (down) and answered label (across).

    On a narrow screen it scrolls sideways, and the column of the expected labels stays.
    """
    confusion, rows = measured.get("confusion") or {}, ""
    across = columns(confusion)
    for gold, row in confusion.items():
        rows += f'<tr><th scope="row">{escaped(gold)}</th>'
        for label in across:
            kind = ' class="right"' if label == gold else ""
            rows += f"<td{kind}>{row.get(label, 0):,}</td>"
        rows += "</tr>\n"
    head = "".join(f'<th scope="col">{escaped(label)}</th>' for label in ("Expected", *across))
    caption = f"{escaped(name)}: rows by expected label (down) and answered label (across), after training"
    return rows and (
        f'<div class="scroll confusion" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def example_list(examples: list[dict], task: ModuleType) -> str:
    """Returns HTML with the legend of the markings, and the first MAX_EXAMPLES examples."""
    shown = [example(n, item, task) for n, item in enumerate(examples[:MAX_EXAMPLES], start=1)]
    return with_legend(shown, len(examples) - MAX_EXAMPLES, task)


def with_legend(shown: Sequence[str], rest: int, task: ModuleType) -> str:
    """Returns HTML examples after the legend of their markings; `rest` is the number of those not shown."""
    legend = "".join(f"<li>{_mark(*entry)}</li>" for entry in task.LEGEND.items())
    more = f'<p class="soft">{rest:,} more are not shown.</p>\n' if rest > 0 else ""
    return f'<ul class="legend" aria-label="Legend">{legend}</ul>\n{"".join(shown)}{more}' if shown else ""


def example(n: int, item: dict, task: ModuleType) -> str:
    """Returns HTML with the prompt, the gold response, and the responses with differences from it marked."""
    prompt, gold = item.get("prompt") or "", item.get("gold") or ""
    answers = {k: task.pieces(item[k], gold, prompt) for k in ("before", "after") if item.get(k) is not None}
    parts = {"source": [("", task.shown_prompt(prompt))] if prompt else None}
    parts |= {**answers, "gold": [("", gold)] if gold else None}
    body = "".join(
        f'<div class="{k}"><h4>{task.TITLES.get(k, k.title())}</h4><p dir="auto">{marked(part)}</p></div>\n'
        for k, part in parts.items()
        if part is not None
    )
    kinds = [kind for kind, _ in answers.get("after", [])]
    found = "as expected" if gold and item.get("after") == gold else verdict(kinds, task)
    remark = f'<span class="soft">{found and f"after: {found}"}</span>'
    head = f"<h3>{n}. {escaped(item.get('set', ''))} {remark}</h3>"
    return f'<article class="example">{head}<div class="cells">\n{body}</div></article>\n'


def verdict(kinds: list[str], task: ModuleType) -> str:
    """Returns the number of differences of each kind as text, for readers who cannot see the colours."""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in task.LEGEND if kind in kinds and kind != "ok")


def marked(pieces: list[tuple[str, str]]) -> str:
    """Returns (kind, text) pieces as HTML; over 2 * MAX_CHARACTERS characters are cut off, unmarked."""
    whole = "".join(piece for _, piece in pieces)
    if len(whole) > 2 * MAX_CHARACTERS:
        return f"{escaped(whole[:MAX_CHARACTERS])} \u2026 ({len(whole) - MAX_CHARACTERS:,} more characters)"
    return "".join(_mark(*piece) for piece in pieces) or '<span class="soft">(empty)</span>'


def _mark(kind: str, piece: str) -> str:
    """Returns a piece as HTML, marked by its kind; white space that is marked is shown as symbols."""
    if not kind:
        return escaped(piece)
    tag, shown = "del" if kind == "missing" else "mark", piece
    if piece.isspace():
        shown = piece.translate(VISIBLE_SPACE)
    return f'<{tag} class="{kind}">{escaped(shown)}</{tag}>'


def section(title: str, body: str) -> str:
    return body and f"<section><h2>{title}</h2>\n{body}</section>\n"


def _percent(value: object) -> str:
    known = number(value)
    return "-" if known is None else f"{100 * known:.1f}"


def _fact(value: object) -> str:
    """Returns a value as HTML, with thousands separators; a float below 1,000 has four significant digits."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escaped(value)
