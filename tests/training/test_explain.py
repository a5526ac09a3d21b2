"""train.py --explain-batch: the first micro-batch, and the samples that are left out."""

import re
from itertools import pairwise
from pathlib import Path

import train
from tests.makers import rows, write_jsonl
from training import explain

LONG = {"prompt": "Count to 1 from 1." + " 1" * 60, "response": "1"}


def explained(capsys, *settings: str) -> str:
    words = [word for s in settings for word in ("--set", s)]
    assert train.main(["--config", "tiny.toml", "--explain-batch", *words]) == 0
    return capsys.readouterr().out


def test_each_sample_that_is_left_out_comes_with_its_tokens_and_its_supervised_tokens(place, capsys):
    write_jsonl(place / "train.jsonl", [LONG, *rows(3)])
    out = explained(capsys, "data.max_length=100", "data.on_long=drop")
    assert "left out: 1 samples" in out and "1 exceed data.max_length = 100" in out
    (found,) = re.findall(
        r"^  train\.jsonl:1: (\d+) tokens, (\d+) of those kept are supervised$", out, re.MULTILINE
    )
    assert int(found[0]) > 100 and int(found[1]) > 0


def test_the_tokens_of_the_batch_stand_with_positions_ids_and_targets_in_plain_text(place, capsys):
    out = explained(capsys)
    lines = re.findall(r"^ +(\d+) +(\d+)  (\S*).*?(?: -> (\d+) .*)?$", out, re.MULTILINE)
    head = re.search(r"^([\d,]+) tokens in (\d+) documents, ([\d,]+) supervised$", out, re.MULTILINE)
    assert (len(lines), sum(bool(target) for *_, target in lines)) == (int(head[1]), int(head[3]))
    assert int(head[3]) > 0 and "\x1b" not in out
    # Positions count up by one, and start again with a document or behind a shared prefix.
    positions = [int(position) for position, *_ in lines]
    assert all(later <= earlier or later == earlier + 1 for earlier, later in pairwise(positions))


def test_neither_weights_nor_a_run_folder_are_needed(place, capsys):
    for file in (place / "base").glob("*.safetensors"):
        file.unlink()
    assert "micro-batch 1 of" in explained(capsys)
    assert not Path("runs").exists()


def test_supervised_positions_are_green_on_a_terminal_only_and_say_what_they_predict(
    place, capsys, monkeypatch
):
    monkeypatch.setattr(explain.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    green = [line for line in explained(capsys).splitlines() if line.startswith(explain.GREEN)]
    assert green and all(" -> " in line and line.endswith(explain.PLAIN) for line in green)
    monkeypatch.setenv("NO_COLOR", "1")
    assert explain.GREEN not in explained(capsys)


def test_a_cut_that_leaves_no_response_is_shown_as_no_supervised_token(place, capsys):
    write_jsonl(place / "train.jsonl", [LONG, *rows(3)])
    out = explained(capsys, "data.max_length=60", "data.on_long=truncate")
    assert re.search(r"^  train\.jsonl:1: \d+ tokens, 0 of those kept are supervised$", out, re.MULTILINE)
