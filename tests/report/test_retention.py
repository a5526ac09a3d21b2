"""report/retention.py: the change of the loss is told in the terminal and in the page."""

import math

import pytest

from report.html import write_report
from report.retention import retention_changes, retention_lines, retention_table
from tasks import text
from tests.report.pages import Page


def measured(loss: float) -> dict:
    return {"rows": 40, "tokens": 9, "loss": loss, "perplexity": 2.0, "bits_per_byte": loss / 2}


BEFORE = {"<b>": measured(2.0), "wiki": measured(1.0)}
CHANGES = retention_changes(BEFORE, {"<b>": measured(2.5), "wiki": measured(0.5)})


def test_the_change_is_the_loss_after_minus_the_loss_before():
    assert CHANGES["<b>"] == {
        "rows": 40,
        "tokens": 9,
        "loss_before": 2.0,
        "loss_after": 2.5,
        "bits_per_byte_before": 1.0,
        "bits_per_byte_after": 1.25,
        "change": pytest.approx(0.5),
    }
    assert retention_lines(CHANGES)[0] == "retention  <b>, 40 rows: loss 2.000 -> 2.500 (+0.500 nats a token)"


def test_the_page_shows_the_change_and_says_in_words_what_is_worse(tmp_path):
    nothing = {"run": {}, "steps": [], "evals": [], "before": {}, "after": {}, "examples": [], "task": text}
    write_report(tmp_path / "report.html", **nothing, retention=CHANGES)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "Retention: what training forgot" in page.text and "<b>" in page.text and "<b>" not in html
    assert html.count("<em>worse</em>") == 1 and "+0.500" in html and "-0.500" in html
    assert "2.000 \u2192" in page.text and "1.250" in page.text
    write_report(tmp_path / "report.html", **nothing)
    assert "Retention" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_set_that_was_not_measured_before_and_a_loss_that_is_not_finite_are_dashes():
    changes = retention_changes({"b": measured(math.nan)}, {"a": measured(1.0), "b": measured(math.nan)})
    assert retention_lines(changes)[0] == "retention  a, 40 rows: loss - -> 1.000 (- nats a token)"
    assert "(- nats a token)" in retention_lines(changes)[1] and "worse" not in retention_table(changes)
