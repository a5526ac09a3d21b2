"""Shows what train.py --check-data found: as lines for the terminal, and as a page with the rows."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from common.progress import printable
from data.defects import prompt_and_response
from data.rows import Sample
from report.charts import escaped
from report.html import MAX_EXAMPLES, marked, section, write_page

EXAMPLES, WORST = 3, 10  # rows of a finding, and of the ranking, on the terminal
SPOILS, LOOK = "SPOILS A RUN", "look at"


def table(summary: dict) -> str:
    """Returns the facts about the rows, the findings with their first rows, and the rows of highest loss."""
    lines = [f"{name:12}{text}" for name, text in facts(summary).items()]
    for finding in summary["findings"]:
        mark = SPOILS if finding["spoils"] else LOOK
        lines += ["", f"{mark:14}{finding['count']:>7,}  {finding['what']} ({finding['kind']})"]
        lines += [f"{'':23}{row['id']}  {row['note']}".rstrip() for row in finding["rows"][:EXAMPLES]]
        if finding["count"] > EXAMPLES:
            lines.append(f"{'':23}...")
    if summary["ranking"]:
        lines += [
            "",
            f"{'ranking':14}{len(summary['ranking']):>7,}  rows by loss; wrong labels gather at the top",
        ]
        lines += [f"{'':14}{row['loss']:>7.3f}  {row['id']}" for row in summary["ranking"][:WORST]]
    return printable("\n".join([*lines, "", _verdict(summary)]))


def facts(summary: dict) -> dict[str, str]:
    """Returns {name: text} of the numbers of rows, their tokens and their languages."""
    tokens = summary["tokens"]
    percentiles = ", ".join(f"{p}%: {n:,}" for p, n in tokens["percentiles"].items())
    languages = ", ".join(f"{name} {share:.0%}" for name, share in summary["languages"].items())
    return {
        "rows": f"{summary['train']:,} for training, {summary['validation']:,} for validation",
        "task": summary["task"],
        "tokens": f"{percentiles} (of {tokens['rows']:,} rows); limit {tokens['max_length']:,}",
        "languages": languages,
    }


def write_defects(
    path: Path, name: str, summary: dict, samples: Mapping[str, Sample], task: ModuleType
) -> None:
    """Writes the page: the facts, then each finding with the text of its rows, MAX_EXAMPLES at most."""
    body = section("Verdict", f"<p>{escaped(_verdict(summary))}</p>")
    for finding in summary["findings"]:
        spoils = f'<span class="worse">{SPOILS.lower()}</span> ' if finding["spoils"] else ""
        head = f"<p>{spoils}{finding['count']:,} rows ({escaped(finding['kind'])})</p>\n"
        body += section(escaped(finding["what"]), head + _rows(finding["rows"], samples, task))
    ranked = [row | {"note": f"loss {row['loss']:.3f}"} for row in summary["ranking"]]
    body += section("Highest loss: probably wrong labels", _rows(ranked, samples, task) if ranked else "")
    write_page(path, "Data checks", name, facts(summary), body)


def _rows(rows: list[dict], samples: Mapping[str, Sample], task: ModuleType) -> str:
    """Returns the first rows as HTML: id, note, prompt and response, if the row could be read."""
    shown = []
    for row in rows[:MAX_EXAMPLES]:
        head = f'<h3>{escaped(row["id"])} <span class="soft">{escaped(row["note"])}</span></h3>'
        cells = ""
        if row["id"] in samples:
            prompt, response = prompt_and_response(samples[row["id"]])
            prompt = task.shown_prompt(prompt)
            for title, text in (("Prompt", prompt), ("Response", response)):
                cells += f'<div><h4>{title}</h4><p dir="auto">{marked([("", text)])}</p></div>\n'
        shown.append(f'<article class="example">{head}<div class="cells">\n{cells}</div></article>\n')
    rest = len(rows) - MAX_EXAMPLES
    more = f'<p class="soft">{rest:,} more are not shown.</p>\n' if rest > 0 else ""
    return "".join(shown) + more


def _verdict(summary: dict) -> str:
    if not summary["findings"]:
        return "nothing was found"
    spoiling = sum(finding["spoils"] for finding in summary["findings"])
    return f"{len(summary['findings'])} kinds of defects, of which {spoiling} would spoil a run"
