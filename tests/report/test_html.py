"""report/html.py: the page is whole, escapes what it shows, and marks differences by more than colour."""

import math
import re

import pytest

from report.html import write_report
from tasks import redaction, text
from tests.report.pages import Page

SCRIPT = '<script>alert("1")</script>'
SOURCE = "He is Ignacio Luna, born 21-07-2021, said to like tea."
GOLD = "He is [GIVENNAME_1] [SURNAME_1], born [DATEOFBIRTH_1], said to like tea."
LABELS = {"EMAIL": {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 4}}


def report(path, **changes) -> str:
    texts = {"prompt": SOURCE + SCRIPT, "gold": GOLD + SCRIPT, "before": SCRIPT, "after": GOLD + SCRIPT}
    given = {
        "run": {"name": f"run {SCRIPT}", f"Base {SCRIPT}": SCRIPT, "Samples": 35000},
        "steps": [
            {"step": s, "loss": 1 / s, "learning_rate": 1e-4, "grad_norm": math.nan} for s in range(1, 9)
        ],
        "evals": [{"step": 4, "eval": {SCRIPT: {"loss": 0.5}}}],
        "before": {SCRIPT: {"loss": 3.0, "leak_rate": 0.9, "per_label": {SCRIPT: LABELS["EMAIL"]}}},
        "after": {SCRIPT: {"loss": 0.5, "leak_rate": 0.1, "per_label": LABELS}},
        "examples": [{"set": SCRIPT, **texts}],
        "task": redaction,
    }
    write_report(path / "report.html", **{**given, **changes})
    return (path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_balanced_and_asks_nothing_of_the_network(tmp_path):
    html = report(tmp_path)
    page = Page(html)
    assert ("lang", "en") in page.attributes and page.tags.count("svg") == 4
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|//\w", html)


@pytest.mark.fault("HTML")
def test_markup_in_names_figures_and_texts_is_shown_as_text(tmp_path):
    html = report(tmp_path)
    assert "<script" not in html
    assert Page(html).text.count(SCRIPT) >= 12


def test_tables_have_captions_and_header_cells(tmp_path):
    html = report(tmp_path)
    assert (
        "<caption>" in html
        and 'scope="col">Precision' in html
        and '<th scope="row">EMAIL</th><td>4</td>' in html
    )


def test_the_confusion_matrix_is_a_table_that_scrolls_and_marks_its_diagonal(tmp_path):
    confusion = {"bad": {"bad": 1200, SCRIPT: 3}, SCRIPT: {SCRIPT: 7, "(no label)": 1}}
    html = report(tmp_path, after={"val": {"loss": 1, "confusion": confusion}})
    page = Page(html)
    assert "<script" not in html and "rows by expected label (down)" in page.text
    assert '<div class="scroll confusion" role="region" tabindex="0"' in html
    assert '<th scope="row">bad</th><td class="right">1,200</td><td>3</td><td>0</td>' in html
    assert '<td>0</td><td class="right">7</td><td>1</td>' in html
    assert '<th scope="col">(no label)</th></tr>' in html


def test_differences_are_marked_by_more_than_colour(tmp_path):
    example = {
        "set": "val",
        "prompt": SOURCE,
        "gold": GOLD,
        "before": SOURCE,
        "after": GOLD.replace(", said to", ""),
    }
    html = report(tmp_path, examples=[example])
    assert (
        '<mark class="leaked">Ignacio Luna</mark>' in html and '<mark class="ok">[SURNAME_1]</mark>' in html
    )
    assert '<del class="missing">, said to</del>' in html and "after: 1 missing" in html
    for rule in (r"mark\.leaked.*double", r"mark\.wrong.*wavy", "del .*line-through"):
        assert re.search(rule, html)


def test_a_run_without_redaction_has_no_redaction_figures(tmp_path):
    answers = {"gold": "The capital is Paris.", "before": "", "after": "The capital is Lyon."}
    chat = [{"prompt": "Capital of France?", **answers}]
    html = report(tmp_path, before={"val": {"loss": 3}}, after={"val": {"loss": 4}}, examples=chat, task=text)
    assert (
        not re.search("leak rate|By class|masked as", html) and "<em>worse</em>" in html and "(empty)" in html
    )
    assert '<mark class="wrong">Lyon</mark>' in html and ">Prompt<" in html and ">Expected<" in html


def test_huge_and_odd_texts_are_cut_and_cleaned(tmp_path):
    texts = {
        "prompt": "s" * 10**6,
        "gold": "g" * 10**6,
        "before": "\x00\x1b[31m \ud800",
        "after": "a" * 10**6,
    }
    html = report(tmp_path, examples=[{"set": "val", **texts}] * 50)
    assert len(html) < 10**6 and "996,000 more characters" in html and "10 more are not shown" in html
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", html)


def test_a_report_of_nothing_is_still_a_page(tmp_path):
    empty = {"run": {}, "steps": [], "evals": [], "before": {}, "after": {}, "examples": []}
    assert tmp_path.name in Page(report(tmp_path, **empty)).text
