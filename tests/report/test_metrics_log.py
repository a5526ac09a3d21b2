import json
import math
from contextlib import closing

import pytest

from common.progress import printable
from report.metrics_log import MetricsLog, before_after_table, read_metrics


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        log.write({"step": 1, "loss": 2.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n'


def test_non_finite_figures_are_valid_json_and_return_as_floats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsLog(path)) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
        log.write({"step": 1, "eval": {"val": {"loss": -math.inf, "per_label": [1, math.nan]}}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": "nan", "grad_norm": "inf"}
    (step,), (evaluation,) = read_metrics(path)
    assert math.isnan(step["loss"]) and step["grad_norm"] == math.inf
    assert evaluation["eval"]["val"]["loss"] == -math.inf


@pytest.mark.fault("kill in a run")
def test_resume_drops_later_steps_and_the_line_that_a_kill_tore(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 2, "eval": {"loss": 1}}\n{"step": 3}\n{"step": 4, "lo'
    )
    with closing(MetricsLog(path)) as log:
        log.truncate_after(2, 2)
        log.write({"step": 3, "again": True})
    kept = '{"step": 1}\n{"step": 2}\n{"step": 2, "eval": {"loss": 1}}\n'
    assert path.read_text() == kept + '{"step": 3, "again": true}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_broken_line_is_named_in_one_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n[1]\n{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"(?s)jsonl:2.*jsonl:3.*jsonl:4"):
        read_metrics(path)


def test_the_table_aligns_figures_and_marks_absent_ones():
    before = {"val": {"loss": 3.25, "exact_match": 0.0, "leak_rate": 0.912}}
    after = {"val": {"loss": math.nan, "exact_match": 0.9, "leak_rate": 0.008}, "val_unseen": {"loss": 0.5}}
    assert before_after_table(before, after).split("\n") == [
        "                        before     after",
        "val",
        "  loss                   3.250       nan",
        "  exact match             0.0%     90.0%",
        "  leak rate              91.2%      0.8%",
        "val_unseen",
        "  loss                       -    0.5000",
        "  exact match                -         -",
        "  leak rate                  -         -",
    ]


def test_printable_text_speaks_no_control_characters():
    assert printable("\x1b[31mred\nline") == "\\x1b[31mred\nline"


def test_the_table_says_on_how_many_rows_it_rests():
    table = before_after_table({"val": {"rows": 1234, "loss": 2.0}}, {"val": {"rows": 1234, "loss": 1.0}})
    assert "\nval, 1,234 rows\n" in table and "\nval\n" in before_after_table({"val": {"loss": 2.0}}, {})
