"""tasks/redaction_pairs.py: each kind of error hurts the measure that it is meant to hurt, and no other."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from data.rows import Sample, read_samples
from tasks.redaction import is_redaction, prompt_for, score
from tasks.redaction_pairs import KINDS, main, pairs, redaction_of, rejected
from tests.folders import ROOT

SOURCE = "Ann Lee, call 555-01 now."
GOLD = "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now."
SAMPLES = ROOT / "assets/samples/val.jsonl"
ROWS = [json.loads(line) for line in SAMPLES.read_text("utf-8").splitlines()[:100]]
BETTER = {"leak_rate": -1, "over_mask_rate": -1}  # Of the other measures, more is better.
# {kind: (the measure that it is meant to hurt, other measures that the same error makes worse)}
HURT = {
    "leak": ("leak_rate", {"exact_match", "entity_f1", "entity_recall"}),
    "class": ("entity_f1", {"exact_match", "entity_precision", "entity_recall"}),
    "over_mask": ("over_mask_rate", {"exact_match", "entity_f1", "entity_precision", "preserved"}),
    "altered": ("preserved", {"exact_match"}),
    # The second beginning has labels that stand for nothing.
    "runs_on": ("preserved", {"exact_match", "entity_f1", "entity_precision"}),
}


def hurt(prompt, gold, response):
    """Returns the names of the measures that are worse than the gold's."""
    best, found = score([(prompt, gold, gold)]), score([(prompt, gold, response)])
    del best["per_label"], found["per_label"]
    return {name for name in best if found[name] * BETTER.get(name, 1) < best[name] * BETTER.get(name, 1)}


def write(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def made(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_hurts_its_measure_and_no_unrelated_one_on_100_rows(kind):
    meant, related = HURT[kind]
    count = 0
    for row in ROWS:
        prompt, gold = row["prompt"], row["response"]
        response = rejected(prompt, gold, kind)
        if response is None:
            continue
        count += 1
        worse = hurt(prompt, gold, response)
        # If one side has no span at all, the shares of its spans are 0 by definition.
        total = set() if "[" in gold and "[" in response else {"entity_precision", "entity_recall"}
        assert meant in worse and worse <= {meant, *related, *total}, (worse, gold, response)
        assert response.strip() != gold.strip()
    entities = sum("[" in row["response"] for row in ROWS)
    assert (
        count >= {"leak": entities, "class": entities, "over_mask": 100, "altered": 95, "runs_on": 80}[kind]
    )


@pytest.mark.parametrize(
    ("kind", "responses"),
    [
        (
            "leak",
            {
                "Ann [SURNAME_1], call [TELEPHONENUM_1] now.",
                "[GIVENNAME_1] Lee, call [TELEPHONENUM_1] now.",
                "[GIVENNAME_1] [SURNAME_1], call 555-01 now.",
            },
        ),
        (
            "over_mask",
            {
                f"[GIVENNAME_1] [SURNAME_1], {first} [TELEPHONENUM_1] {last}."
                for label in ("CITY_1", "GIVENNAME_2", "PASSWORD_1", "STREET_1", "SURNAME_2", "USERNAME_1")
                for first, last in ((f"[{label}]", "now"), ("call", f"[{label}]"))
            },
        ),
        (
            "altered",
            {
                f"[GIVENNAME_1] [SURNAME_1], {first} [TELEPHONENUM_1] {last}."
                for first, last in (("clal", "now"), ("now", "now"), ("call", "call"))
            }
            | {"[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1]."},
        ),
    ],
)
def test_all_errors_of_a_kind_by_hand(kind, responses):
    found = {rejected(SOURCE, GOLD, kind, seed) for seed in range(60)}
    assert found <= responses and len(found) > len(responses) / 3


def test_a_wrong_class_is_one_that_the_entity_looks_like_and_gets_the_next_index():
    source, gold = "Ann met Bo in Rome.", "[GIVENNAME_1] met [GIVENNAME_2] in [CITY_1]."
    found = {rejected(source, gold, "class", seed) for seed in range(80)}
    assert "[GIVENNAME_1] met [CITY_2] in [CITY_1]." in found
    assert "[GIVENNAME_1] met [GIVENNAME_2] in [GIVENNAME_3]." in found
    assert not any("NUM" in response or "DATE" in response for response in found)


def test_a_digit_or_an_accent_outside_entities_is_altered():
    source, gold = "Ann: né 1999", "[GIVENNAME_1]: né 1999"
    found = {rejected(source, gold, "altered", seed) for seed in range(40)}
    assert "[GIVENNAME_1]: ne 1999" in found
    digits = found - {"[GIVENNAME_1]: ne 1999"}
    assert len(digits) > 5
    for response in digits:
        assert sum(a != b for a, b in zip(response, gold, strict=True)) == 1 and response[-4:].isdigit()


def test_a_redaction_that_runs_on_begins_with_the_gold_and_goes_on_with_its_words():
    for seed in range(20):
        response = rejected(SOURCE, GOLD, "runs_on", seed)
        assert response.startswith(GOLD) and GOLD.startswith(response.removeprefix(GOLD).strip()[:5])
        assert "Ann" not in response


def test_a_text_without_entities_permits_neither_leak_nor_class():
    text = "All is well today."
    assert rejected(text, text, "leak") is None and rejected(text, text, "class") is None
    assert all(rejected(text, text, kind) for kind in ("over_mask", "altered", "runs_on"))


def test_one_label_for_all_classes_stays_that_label():
    gold = "[MASKED] [MASKED], call [MASKED] now."
    assert rejected(SOURCE, gold, "class") is None
    assert "[MASKED] [MASKED], " in rejected(SOURCE, gold, "over_mask")
    assert rejected(SOURCE, gold, "over_mask").count("[MASKED]") == 4
    without_index = "[GIVENNAME] [SURNAME], call [TELEPHONENUM] now."
    assert "_" not in rejected(SOURCE, without_index, "class")


def test_a_gold_that_is_not_its_source_with_labels_permits_nothing():
    assert redaction_of(SOURCE, GOLD).text() == GOLD
    assert redaction_of(SOURCE, "[GIVENNAME_1] [SURNAME_1], cal [TELEPHONENUM_1] now.") is None
    assert rejected(SOURCE, "Sure: " + GOLD, "leak") is None


def test_brackets_of_the_source_are_text():
    source, gold = "[NOTE] Ann said yes", "[NOTE] [GIVENNAME_1] said yes"
    assert rejected(source, gold, "leak") == source


def test_kinds_are_spread_evenly_and_follow_their_rows():
    samples = read_samples(SAMPLES)[0][:103]
    found = pairs(samples, list(KINDS))
    counts = Counter(pair["kind"] for pair in found)
    assert len(found) == 103 and counts.keys() == KINDS.keys() and max(counts.values()) == 21
    assert pairs(samples[:40], list(KINDS)) == found[:40]
    assert pairs(samples, list(KINDS), seed=1) != found
    for pair in found:
        again = rejected(pair["prompt"], pair["chosen"], pair["kind"])
        assert pair["rejected"] == again  # whatever the other rows are


def test_pairs_of_a_row_without_entities_are_of_the_other_kinds():
    text = "All is well today."
    sample = Sample("a:1", messages=(("user", prompt_for(text)), ("assistant", text)))
    assert {pair["kind"] for pair in pairs([sample] * 6, list(KINDS))} == {"over_mask", "altered", "runs_on"}
    assert pairs([sample], ["leak", "class"]) == []


def test_the_command_writes_pairs_and_prints_the_count_of_each_kind(tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    arguments = ["--data", str(SAMPLES), "--out", str(out), "--limit", "20", "--kinds", "leak, altered"]
    assert main(arguments) == 0
    text, found = capsys.readouterr().out, made(out)
    assert [*found[0]] == ["prompt", "chosen", "rejected", "kind"] and len(found) == 20
    counts = Counter(pair["kind"] for pair in found)
    assert [line.split() for line in text.splitlines()] == [
        [f"{out}:", "20", "pairs"],
        ["leak", str(counts["leak"])],
        ["altered", str(counts["altered"])],
    ]
    before = out.read_bytes()
    assert main(arguments) == 0 and out.read_bytes() == before
    assert all(is_redaction(pair["prompt"], pair["chosen"]) for pair in found)


def test_rows_that_permit_no_error_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"prompt": prompt_for(SOURCE), "response": r} for r in (GOLD, "Sure: " + GOLD)]
    out = tmp_path / "pairs.jsonl"
    assert main(["--data", write(tmp_path, rows), "--out", str(out)]) == 0
    assert len(made(out)) == 1 and capsys.readouterr().out.splitlines()[-1].split()[:3] == [
        "left",
        "out",
        "1",
    ]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--kinds", "leek,class"], "'leek' is unknown; did you mean 'leak'?"),
        (["--limit", "0"], "--limit is 0"),
        (["--out", "."], "is a folder"),
        (["--out", "none/such.jsonl"], "no folder none"),
        (["--out", "rows.jsonl"], "also a file of --data"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--data", "chat.jsonl"], "chat.jsonl:1"),
        (["--data", "turns.jsonl"], "turns.jsonl:1"),
        (["--data", "bad.jsonl"], "bad.jsonl:1"),
        (["--data", "plain.jsonl", "--kinds", "leak"], "none of the 1 rows permits"),
    ],
)
def test_wrong_input_is_exit_code_2_and_one_error_and_writes_nothing(
    tmp_path, monkeypatch, capsys, options, fact
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [{"prompt": SOURCE, "response": GOLD}])
    write(tmp_path, [{"prompt": "Write a list", "response": "milk"}], "chat.jsonl")
    turns = [("user", SOURCE), ("assistant", GOLD)] * 2
    messages = [{"role": role, "content": text} for role, text in turns]
    write(tmp_path, [{"messages": messages}], "turns.jsonl")
    write(tmp_path, [{"prompt": SOURCE}], "bad.jsonl")
    write(tmp_path, [{"prompt": prompt_for("All is well."), "response": "All is well."}], "plain.jsonl")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["--data", "rows.jsonl", "--out", "pairs.jsonl", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and fact in err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file, out = write(tmp_path, [{"prompt": SOURCE, "response": GOLD}]), tmp_path / "pairs.jsonl"
    out.write_text("old")

    def full(path, text, **settings):
        with open(path, "w") as f:
            f.write(text[:9])
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert main(["--data", file, "--out", str(out)]) == 1
    assert out.read_text() == "old" and sorted(f.name for f in tmp_path.iterdir()) == [
        "pairs.jsonl",
        "rows.jsonl",
    ]


def test_help_loads_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "tasks.redaction_pairs", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "--kinds" in done.stdout and not loaded & {"torch", "numpy", "tqdm"}
