"""training/check_data.py: a file with 22 kinds of defects, the shipped samples, and rows ranked by loss."""

import json
from pathlib import Path

import pytest

import train
from tasks.redaction import INSTRUCTION
from tests.folders import ROOT

SAMPLES = ROOT / "assets" / "samples"
CLAUSES = [json.loads(line) for line in (SAMPLES / "pretrain-text.jsonl").read_text().splitlines()]


def text(number: int) -> str:
    return CLAUSES[number]["text"]


def redaction(source: str, response: str) -> dict:
    return {"prompt": f"{INSTRUCTION}\n\nText:\n{source}", "response": response}


def clean(number: int) -> dict:
    """A redaction without a defect, unlike those of other numbers."""
    return redaction(f"{text(number)} Ask Ana.", f"{text(number)} Ask [GIVENNAME_1].")


LONG = " ".join(text(n) for n in range(100, 130))
LOOP = "the lamp burned and " * 12
LONGEST = " ".join(text(n) for n in range(130, 290))
# {kind: rows}; the rows before them are clean.
PLANTED = {
    "bad_rows": [{"prompt": "Say yes.", "response": " "}],
    "duplicates": [clean(0)],
    "near_duplicates": [redaction(f"{text(4)} {text(5)} Go.", f"{text(4)} {text(5)} Go.")],
    "several_responses": [
        redaction("See Ana now.", "See [GIVENNAME_1] now."),
        redaction("See Ana now.", "See Ana now."),
    ],
    "same_response": [
        {"prompt": f"{text(n)} What now?", "response": "I am sorry, I cannot say."} for n in range(20, 26)
    ],
    "empty_prompts": [{"prompt": " ", "response": "Good morning."}],
    "placeholders": [{"prompt": text(30), "response": "N/A"}],
    "echoes": [{"prompt": text(31), "response": text(31)}],
    "repetitions": [{"prompt": text(32), "response": LOOP}],
    "template_marks": [{"prompt": f"[INST] {text(33)} [/INST]", "response": "Yes."}],
    "mojibake": [{"prompt": text(34), "response": "At the caf\u00c3\u00a9."}],
    "control_characters": [{"prompt": text(35), "response": "Fine\u200b, thanks."}],
    "too_long": [{"prompt": text(36), "response": LONG}],
    "cut_prompts": [{"prompt": LONGEST, "response": "A log."}],
    "changed_text": [redaction(f"{text(37)} Ask Ana.", f"{text(37)} Ask about [GIVENNAME_1].")],
    "rare_labels": [redaction(f"{text(38)} Ask Ana.", f"{text(38)} Ask [GIVENAME_1].")],
    "broken_labels": [redaction(f"{text(39)} Ask Ana.", f"{text(39)} Ask [GIVENNAME_1.")],
    "left_values": [redaction(f"Zoraida! {text(40)} Zoraida.", f"Zoraida! {text(40)} [GIVENNAME_1].")],
}
HELD_OUT = {
    "overlap": redaction(f"{text(1)} Ask Ana.", f"{text(1)} Ask Ana."),
    "overlap_normalised": redaction(f"{text(2)} ask ANA!", f"{text(2)} ask [GIVENNAME_1]!"),
    "overlap_near": redaction(f"{text(6)} {text(7)} Go.", f"{text(6)} {text(7)} Go."),
}
# A defect that comes with another one.
BESIDE = {"long_rows": ["cut_prompts"], "changed_text": ["broken_labels"]}


@pytest.fixture
def planted(tmp_path, monkeypatch) -> dict[str, list[str]]:
    """Writes rows.jsonl, held-out.jsonl and c.toml; returns {kind: ids of its rows}."""
    rows = [clean(n) for n in range(4)] + [
        redaction(f"{text(n)} {text(n + 1)}", f"{text(n)} {text(n + 1)}") for n in (4, 6)
    ]
    rows += [clean(n) for n in range(50, 95)]
    expected = {}
    for kind, more in PLANTED.items():
        expected[kind] = [f"rows.jsonl:{len(rows) + n}" for n in range(1, len(more) + 1)]
        rows += more
    for kind, others in BESIDE.items():
        expected[kind] = sorted(expected.get(kind, []) + [id for other in others for id in expected[other]])
    expected |= {kind: [f"held-out.jsonl:{n}"] for n, kind in enumerate(HELD_OUT, 1)}
    monkeypatch.chdir(tmp_path)
    for name, made in (("rows.jsonl", rows), ("held-out.jsonl", [*HELD_OUT.values(), clean(96)])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in made))
    Path("c.toml").write_text(
        '[data]\ntrain = "rows.jsonl"\nvalidation = "held-out.jsonl"\nmax_length = 700\n'
    )
    return expected


def check(capsys, *words: str, config: str = "c.toml") -> tuple[int, str]:
    code = train.main(["--config", config, "--check-data", *words])
    out, err = capsys.readouterr()
    assert code != 2, err
    return code, out


def test_every_planted_defect_is_found_in_its_rows_and_in_no_others(planted, capsys):
    code, out = check(capsys, "--json")
    found = json.loads(out)
    ids = {f["kind"]: sorted(row["id"] for row in f["rows"]) for f in found["findings"]}
    assert ids == {kind: sorted(rows) for kind, rows in planted.items()} and len(ids) >= 15
    assert code == 1 and found["spoiled"] and found["task"] == "redaction"
    spoils = {f["kind"] for f in found["findings"] if f["spoils"]}
    assert {"bad_rows", "overlap", "overlap_normalised", "cut_prompts", "too_long"} <= spoils
    assert not spoils & {"duplicates", "mojibake", "long_rows"}  # a few of them spoil nothing


@pytest.mark.parametrize(
    ("on_long", "expected"),
    [("error", {"too_long", "cut_prompts"}), ("truncate", {"cut_prompts"}), ("drop", set())],
)
def test_what_the_config_does_with_long_rows_decides_whether_they_spoil_a_run(
    planted, capsys, on_long, expected
):
    _, out = check(capsys, "--json", "--set", f"data.on_long={on_long}")
    spoils = {f["kind"] for f in json.loads(out)["findings"] if f["spoils"]}
    assert spoils & {"too_long", "cut_prompts"} == expected


def test_the_table_and_the_page_show_the_first_rows_by_file_and_line(planted, capsys):
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("caf", "<script>caf"))
    code, out = check(capsys, "--html", "page.html")
    assert code == 1 and "SPOILS A RUN" in out and "kinds of defects, of which" in out
    for ids in planted.values():
        assert ids[0] in out
    page = Path("page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;caf" in page
    assert all(ids[0] in page for ids in planted.values())
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["small", "configs/chat", "configs/classification", "configs/translation"])
def test_nothing_is_found_in_the_shipped_samples(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, out = check(capsys, "--json", config=f"{name}.toml")
    found = json.loads(out)
    assert code == 0 and not found["findings"] and not found["spoiled"] and not found["ranking"]
    assert set(found) == {
        *("files", "train", "validation", "task", "spoiled", "tokens", "languages", "findings", "ranking")
    }
    assert found["tokens"]["percentiles"]["50"] > 10 and abs(sum(found["languages"].values()) - 1) < 1e-9


def test_labels_outside_the_declared_ones_and_misspelt_ones_are_found(tmp_path, monkeypatch, capsys):
    labels = ["good", "bad"] * 30
    rows = [{"prompt": text(n), "response": label} for n, label in enumerate(labels)]
    rows[7]["response"] = "godo"
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = '[data]\ntrain = "rows.jsonl"\nvalidation_fraction = 0\n'
    Path("c.toml").write_text(f'{base}labels = ["good", "bad"]\n')
    code, out = check(capsys)
    assert code == 1 and "unknown_labels" in out and "rows.jsonl:8  'godo'; did you mean 'good'?" in out
    Path("c.toml").write_text(base)
    code, out = check(capsys)
    assert code == 0 and "rare_labels" in out and "rows.jsonl:8  'godo'; did you mean 'good'?" in out


def test_rows_are_ranked_by_the_mean_loss_of_a_supervised_token(place, capsys):
    _, out = check(capsys, "--json", "--rank-by", "base", config="tiny.toml")
    losses = [row["loss"] for row in json.loads(out)["ranking"]]
    train_rows = json.loads(out)["train"]
    assert losses == sorted(losses, reverse=True) and 0 < len(losses) <= train_rows


def test_files_of_one_name_in_two_folders_keep_their_rows_apart(planted, capsys):
    Path("held").mkdir()
    Path("held-out.jsonl").rename("held/rows.jsonl")
    _, out = check(capsys, "--set", "data.validation=held/rows.jsonl")
    assert "held/rows.jsonl:1  as rows.jsonl:2" in out


@pytest.mark.parametrize("words", [["--json"], ["--rank-by", "base"], ["--check-data", "--sweep", "a.b=1"]])
def test_options_that_do_not_go_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", "c.toml", *words])
    assert stop.value.code == 2 and "--check-data" in capsys.readouterr().err


def test_rows_are_read_with_the_configs_own_names_of_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": text(n), "answer": f"Answer {n}: {text(n + 1)}"} for n in range(0, 8, 2)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = 'columns = ["prompt=question", "response=answer"]'
    config = f'[model]\nname = "tiny"\n[data]\ntrain = "own.jsonl"\nvalidation_fraction = 0\n{columns}\n'
    (tmp_path / "c.toml").write_text(config)
    code, out = check(capsys, "--json")
    assert code == 0 and json.loads(out)["train"] == 4
