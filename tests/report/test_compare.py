"""report/compare.py and its page: which rows are compared, what is said of the runs, and of bad input."""

import json
import re
import subprocess
import sys

import pytest

import evaluate
from report.compare import as_json, as_text, compare
from report.compare_page import write_comparison
from tests.folders import ROOT
from tests.report.pages import Page
from tests.report.runs import GOLDS, lines, write_run

RIGHT = [gold for _, gold in GOLDS]
# Two thirds of the names are leaked.
LEAKY = [gold.replace("[GIVENNAME_1]", "Anna") if n % 3 else gold for n, (_, gold) in enumerate(GOLDS)]
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def runs(tmp_path):
    better = write_run(tmp_path / "good", RIGHT)
    worse = write_run(
        tmp_path / "leaky", LEAKY, config="max_steps = 9\n[adapter]\nr = 4\n", base_sha256="e" * 64
    )
    return better, worse


def test_a_worse_run_is_called_worse_and_its_differences_are_named(runs):
    found = as_json(compare(runs))
    assert found["differences"] == {
        "train.max_steps": ["-", "9"],
        "adapter.r": ["-", "4"],
        "base_sha256": ["ab" * 6, "e" * 12],
    }
    measured = found["sets"]["val"]
    assert (measured["rows"], measured["rows_of_runs"], measured["disagreements"]) == (30, [30, 30], 20)
    first, second = measured["measures"]["exact_match"]
    assert first["verdict"] is None and (first["value"], second["value"]) == (1, pytest.approx(1 / 3))
    assert (
        second["verdict"] == "worse" and second["interval"][0] < second["difference"] < second["interval"][1]
    )
    text = as_text(compare(runs))
    assert re.search(r"exact match +A +100.0%\n +B +33.3% +-66.7 +\[-\d\d\.\d, -\d\d\.\d\] +worse", text)


KNOWN = {
    "data.labels": {"config": '[data]\nlabels = ["yes", "no", "Maybe"]\n'},
    "training rows": {"after": {"val": {"confusion": {"yes": {"yes": 9, "maybe": 6}, "no": {"no": 15}}}}},
    "nothing": {"after": {"val": {"confusion": {"yes": {"yes": 9, "(no label)": 6}, "no": {"no": 15}}}}},
}


@pytest.mark.parametrize("known", KNOWN)
def test_a_response_that_a_run_knew_as_a_label_is_no_invalid_one(tmp_path, known):
    golds = [(f"Is it {n}?", ("yes", "no")[n % 2]) for n in range(32)]
    right = [gold for _, gold in golds]
    said = [gold if n % 4 else "maybe" for n, gold in enumerate(right)]
    given = {"golds": golds, "task": "classification"} | KNOWN[known]
    runs = [write_run(tmp_path / name, texts, **given) for name, texts in (("a", right), ("b", said))]
    invalid = as_json(compare(runs))["sets"]["val"]["measures"]["invalid"][1]
    share, verdict = (0.25, "worse") if known == "nothing" else (0, "no clear difference")
    assert (invalid["value"], invalid["verdict"]) == (share, verdict)


def test_the_other_way_round_it_is_better(runs):
    measures = as_json(compare(runs[::-1]))["sets"]["val"]["measures"]
    assert measures["exact_match"][1]["verdict"] == measures["entity_f1"][1]["verdict"] == "better"


def test_equal_runs_have_no_verdict_and_no_row_to_show(tmp_path):
    a, b = write_run(tmp_path / "a", LEAKY), write_run(tmp_path / "b", LEAKY)
    found = as_json(compare([a, b]))
    assert not found["differences"] and not found["sets"]["val"]["disagreements"]
    verdicts = {runs[1]["verdict"] for runs in found["sets"]["val"]["measures"].values()}
    assert verdicts == {"no clear difference"}


def test_only_rows_that_both_runs_have_are_compared_and_they_are_counted(tmp_path):
    """The second run has 10 rows of the first in another order, and one row twice."""
    own = [*GOLDS[9::-1], GOLDS[0], ("another", "row")]
    a = write_run(tmp_path / "a", RIGHT)
    b = write_run(tmp_path / "b", [gold for _, gold in own], golds=own)
    comparison = compare([a, b])
    [found] = comparison.sets
    assert len(found.rows[0]) == 10 and found.totals == [30, 12]
    assert [row[:2] for row in found.rows[0]] == [row[:2] for row in found.rows[1]] == GOLDS[:10]
    assert "10 rows that all runs have (of 30, 12 rows)" in as_text(comparison)


def test_equal_rows_are_paired_in_their_order(tmp_path):
    golds = [GOLDS[0], GOLDS[0]]
    a, b = (write_run(tmp_path / name, [RIGHT[0], "no"], golds=golds) for name in "ab")
    [found] = compare([a, b]).sets
    assert len(found.rows[0]) == 2 and not found.disagreements()


def refused(capsys, *words) -> str:
    assert evaluate.main(["--compare", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and "Traceback" not in error
    return error


def test_each_run_that_cannot_be_compared_is_named_with_its_remedy(tmp_path, runs, capsys):
    names = ("unfinished", "older", "damaged")
    unfinished, older, damaged = (write_run(tmp_path / name, RIGHT) for name in names)
    (unfinished / "manifest.json").unlink()
    (older / "answers.jsonl").unlink()
    (damaged / "answers.jsonl").write_text('{"set": "val"}\n')
    error = refused(capsys, runs[0], tmp_path / "nothing", unfinished, older, damaged)
    again = "python train.py --config {}/config.toml --resume"
    assert f"{tmp_path / 'nothing'}: no run is here" in error
    assert "not finished" in error and again.format(unfinished) in error
    assert "without answers.jsonl" in error and again.format(older) in error
    assert f"{damaged}: damaged" in error and error.count("\n") == 5


DAMAGE = {
    ("answers.jsonl", '"after": "It is Anna and 1."', '"after": null'): "answers.jsonl:2: ",
    ("answers.jsonl", "{", "[{"): "answers.jsonl:1: ",
    ("manifest.json", '"tasks": {"val": "redaction"}', '"tasks": []'): "'tasks' is not an object",
    ("manifest.json", '"tasks": {"val": "redaction"}', '"tasks": {"val": 3}'): "'tasks' is not an object",
    ("manifest.json", '"after": {', '"after": null, "then": {'): "'after' is not an object",
    ("manifest.json", '"after": {"val": {', '"after": {"val": 3, "then": {'): "'after' is not an object",
    ("metrics.jsonl", '"eval": {"set": "val", "loss": 0.2}', '"eval": null'): "metrics.jsonl:31: ",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=DAMAGE.values())
def test_a_damaged_file_is_named_with_its_line(runs, capsys, damage):
    file, text, changed = damage
    whole = (runs[1] / file).read_text()
    (runs[1] / file).write_text(whole.replace(text, changed, 1))
    assert (runs[1] / file).read_text() != whole
    error = refused(capsys, *runs)
    assert DAMAGE[damage] in error and f"{runs[1]}: damaged" in error and "--resume" in error


def test_a_set_that_the_runs_scored_by_different_tasks_is_told(tmp_path):
    a = write_run(tmp_path / "a", RIGHT)
    b = write_run(tmp_path / "b", LEAKY, task="text")
    comparison = compare([a, b])
    assert comparison.differences == {"tasks val": ["redaction", "text"]}
    assert "val (redaction), 30 rows" in as_text(comparison)


def test_what_the_runs_were_trained_for_is_shown_over_all_rows_of_each_run(tmp_path):
    """The reward is of manifest.json; entity F1 in it is not shown, because the shared rows give it."""
    figures = [{"loss": 0.5, "reward": r, "rewards/accuracies": 0.9, "entity_f1": 0.1} for r in (0.25, 0.75)]
    runs = [write_run(tmp_path / n, RIGHT, after={"val": f}) for n, f in zip("ab", figures, strict=True)]
    comparison = compare(runs)
    assert re.search(r"over all rows .*\n.* reward +A +0.2500\n +B +0.7500\n", as_text(comparison), re.S)
    assert as_json(comparison)["sets"]["val"]["reward"] == [0.25, 0.75]
    assert "10.0%" not in as_text(comparison)
    html = page(tmp_path, runs)
    assert all(text in html for text in ("reward, all rows", "0.7500", "preferred, all rows", "90.0%"))


def test_runs_without_a_shared_row_are_refused(tmp_path, runs, capsys):
    other = write_run(tmp_path / "other", ["x"], golds=[("p", "g")])
    error = refused(capsys, runs[0], other)
    assert "share no validation row" in error and "30 rows" in error and "data.validation" in error


def test_one_run_is_not_compared_with_itself(runs, capsys):
    assert "two or more different folders" in refused(capsys, runs[0], runs[0])
    assert "two or more different folders" in refused(capsys, runs[0])


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("good", "is a folder; name a file"),
        ("none/page.html", "there is no folder"),
        ("good/config.toml", "is a file of the run"),
        ("good/../leaky/report.html", "is a file of the run"),
    ],
)
def test_a_page_replaces_no_folder_and_no_file_of_a_run(tmp_path, runs, capsys, page, message):
    (tmp_path / "leaky" / "report.html").write_text("report")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    error = refused(capsys, *runs, "--html", tmp_path / page)
    assert f"--html {tmp_path / page}" in error and message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_page_may_be_new_in_a_folder_of_a_run_and_is_replaced_elsewhere(tmp_path, runs):
    for page in (runs[0] / "compare.html", tmp_path / "page.html", tmp_path / "page.html"):
        assert evaluate.main(["--compare", *map(str, runs), "--html", str(page)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "a", "b", "--model", "tiny", "--data", "x"], "leave out --data, --model"),
        (["--html", "x.html", "--model", "tiny", "--data", "x"], "--html needs --compare"),
        (["--model", "tiny"], "required: --data"),
        ([], "required: --model, --data"),
    ],
)
def test_options_that_do_not_go_together_are_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        evaluate.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_process_that_compares_prints_json_and_loads_no_torch(tmp_path, runs):
    code = (
        "import sys, evaluate; code = evaluate.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    words = ["--compare", *map(str, runs), "--json", "--html", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == [str(run) for run in runs]
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


# --- the page


def page(path, runs) -> str:
    write_comparison(path / "page.html", compare(runs))
    return (path / "page.html").read_text(encoding="utf-8")


def test_the_page_is_balanced_escapes_texts_and_asks_nothing_of_the_network(tmp_path):
    golds = [(prompt + SCRIPT, gold + SCRIPT) for prompt, gold in GOLDS]
    said = [SCRIPT + gold for _, gold in golds]
    a = write_run(tmp_path / "a", said, golds=golds)
    b = write_run(tmp_path / "b", LEAKY, golds=golds, config=f"name = '{SCRIPT}'\n")
    html = page(tmp_path, [a, b])
    read = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not re.search(r"https?:|url\(|@import", html) and read.text.count(SCRIPT) > 12


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_the_page_has_every_run_in_every_part(tmp_path, count):
    responses = [RIGHT, LEAKY] * 4
    runs = [write_run(tmp_path / f"run-{n}", responses[n], config=f"epochs = {n}\n") for n in range(count)]
    html = page(tmp_path, runs)
    text = Page(html).text
    assert all(text.count(f"run-{n}") >= 3 for n in range(count))
    assert html.count('<polyline class="train') == html.count('<polyline class="eval') == count


def test_rewards_are_drawn_if_the_runs_have_them(tmp_path, runs):
    for run in runs:
        lines(run / "metrics.jsonl", [{"step": s, "loss": 0.1, "reward": s / 9} for s in range(9)])
    assert "<b>Reward</b>" in page(tmp_path, runs)


def test_losses_of_different_units_are_different_charts_and_a_policy_loss_is_in_none(tmp_path):
    methods = ({}, {"rewards/margins": 0.1}, {"reward": 0.5})  # SFT, DPO, GRPO
    runs = [write_run(tmp_path / name, RIGHT) for name in ("sft", "dpo", "grpo")]
    for run, own in zip(runs, methods, strict=True):
        steps = [{"step": s, "loss": 1 / s, **own} for s in (1, 2)]
        lines(run / "metrics.jsonl", [*steps, {"step": 2, "eval": {"set": "val", "loss": 0.4}}])
    tokens, pairs = re.findall(r"<b>Loss</b>.*?</figure>", page(tmp_path, runs), re.S)
    assert "nats per token" in tokens and "A sft" in tokens and "C grpo" in tokens and "B dpo" not in tokens
    assert "nats per pair" in pairs and "B dpo" in pairs and "A sft" not in pairs
    assert tokens.count('<polyline class="train') == 1 and tokens.count('<polyline class="eval') == 2
