"""evaluate.py as a user runs it: the JSON, the table, what --limit and --loss-only leave out, and what is
said of bad input.
"""

import importlib.util
import json
import math
from typing import get_args, get_type_hints

import pytest
import torch

import evaluate
import export
from exporting import llama_cpp
from generation.generate import generate
from lora.peft_io import load_adapter
from model.tokenizer import Tokenizer
from model.weights import load_model
from tasks import redaction as pii
from tests.folders import (
    BROKEN,
    CHAT,
    ROWS,
    help_seconds,
    make_adapter,
    make_broken_adapter,
    run_script,
    write_rows,
)
from training import evaluation
from training.config import Model

REDACTION = {
    "exact_match",
    "leak_rate",
    "entity_precision",
    "entity_recall",
    "entity_f1",
    "over_mask_rate",
    "preserved",
    "per_label",
}
ALWAYS = {"model", "adapter", "data", "rows", "rows_left_out", "loss", "tokens"}


@pytest.fixture
def data(tmp_path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def evaluated(capsys, *words: str) -> dict:
    """The one JSON object on stdout."""
    assert (
        evaluate.main([*words, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "4", "--json"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def answer_with(monkeypatch, texts: list[str]) -> None:
    """Lets the model say these texts, a row after the other."""

    def say(loaded, samples, *_, **__):
        prompts = [s.messages[-2][1] for s in samples]
        return evaluation.Answers(prompts, [s.messages[-1][1] for s in samples], texts[: len(samples)])

    monkeypatch.setattr(evaluation, "answer", say)


def test_json_of_redactions_has_the_loss_and_every_measure_and_nothing_else(base, data, capsys):
    found = evaluated(capsys, "--model", base, "--data", data)
    assert found.keys() == ALWAYS | REDACTION
    assert (found["model"], found["adapter"], found["data"], found["rows"], found["rows_left_out"]) == (
        base,
        None,
        data,
        2,
        0,
    )
    assert found["tokens"] == sum(
        len(Tokenizer(base).encode(row["response"])) + 1 for row in ROWS
    )  # and <end_of_turn>
    assert found["per_label"]["SURNAME"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2}


def test_json_of_chats_and_of_raw_text_has_perplexity_and_bits_per_byte(base, tmp_path, capsys):
    chat, text = (
        write_rows(tmp_path / "chat.jsonl", [CHAT]),
        write_rows(tmp_path / "text.jsonl", [{"text": "Once upon a time."}]),
    )
    both = {"perplexity", "bits_per_byte"}
    assert evaluated(capsys, "--model", base, "--data", chat).keys() == ALWAYS | both | {"exact_match"}
    found = evaluated(capsys, "--model", base, "--data", text)
    assert found.keys() == ALWAYS | both
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    bits = found["loss"] / math.log(2) * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(bits / len("Once upon a time."))
    assert found["tokens"] == len(Tokenizer(base).encode("Once upon a time.")) + 1  # and <eos>


def test_the_measures_are_those_of_the_answers(base, data, capsys, monkeypatch):
    leaky = ROWS[1]["response"].replace("[SURNAME_1]", "Gómez")
    answer_with(monkeypatch, [ROWS[0]["response"], leaky])
    found = evaluated(capsys, "--model", base, "--data", data)
    rows = [
        (pii.source_text(row["prompt"]), row["response"], said)
        for row, said in zip(ROWS, [ROWS[0]["response"], leaky], strict=True)
    ]
    assert {key: found[key] for key in REDACTION} == pii.score(rows)
    assert found["exact_match"] == 0.5 and found["entity_recall"] == 5 / 6 and 0 < found["leak_rate"] < 1


def test_the_responses_are_the_models_greedy_ones(base, tmp_path, capsys):
    """A row whose gold is what the model says is an exact match; the same row with other gold is none."""
    model, tokenizer = load_model(base, torch.float32), Tokenizer(base)
    questions = ["Say something.", "Say more.", "And then?"]
    prompts = [tokenizer.render_prompt([("user", q)]) for q in questions]
    said = [
        tokenizer.decode(c.token_ids).strip()
        for c in generate(model, prompts, max_new_tokens=4, stop_ids=tokenizer.stop_ids)
    ]
    rows = [
        {"prompt": q, "response": gold or "nothing"}
        for q, gold in zip(questions, [said[0], said[1], "else"], strict=True)
    ]
    found = evaluated(capsys, "--model", base, "--data", write_rows(tmp_path / "said.jsonl", rows))
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_limit_takes_the_first_rows(base, tmp_path, data, capsys):
    first = write_rows(tmp_path / "first.jsonl", ROWS[:1])
    limited, alone = (
        evaluated(capsys, "--model", base, *words)
        for words in (("--data", data, "--limit", "1"), ("--data", first))
    )
    assert limited["rows"] == 1 and limited | {"data": first} == alone


def test_loss_only_gives_the_same_loss_and_asks_for_no_answers(base, data, capsys, monkeypatch):
    whole = evaluated(capsys, "--model", base, "--data", data)
    monkeypatch.setattr(evaluation, "answer", None)
    found = evaluated(capsys, "--model", base, "--data", data, "--loss-only")
    assert found == {key: whole[key] for key in ALWAYS}


def test_the_adapter_changes_the_figures(base, tmp_path, data, capsys):
    adapter = make_adapter(tmp_path / "adapter", base)
    plain, adapted = (
        evaluated(capsys, "--model", base, "--data", data, "--loss-only", *words)
        for words in ((), ("--adapter", adapter))
    )
    assert adapted["adapter"] == adapter and abs(plain["loss"] - adapted["loss"]) > 1e-3


@pytest.mark.parametrize("type", get_args(get_type_hints(Model)["quantize"]))
def test_every_block_type_that_trains_also_evaluates(base, data, capsys, type):
    words = ("--model", base, "--data", data, "--loss-only")
    plain, found = evaluated(capsys, *words)["loss"], evaluated(capsys, *words, "--quantize", type)["loss"]
    assert abs(found - plain) < 0.05 and (found == plain) == (type in ("none", "keep"))


def test_rows_that_the_model_has_no_positions_for_are_counted_and_left_out(base, tmp_path, data, capsys):
    long = {"prompt": "word " * 300, "response": "[GIVENNAME_1]"}
    mixed = write_rows(tmp_path / "mixed.jsonl", [ROWS[0], long, ROWS[1]])
    assert (
        evaluate.main(
            [
                "--model",
                base,
                "--data",
                mixed,
                "--device",
                "cpu",
                "--dtype",
                "float32",
                "--max-new-tokens",
                "4",
                "--json",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "1 of 3 rows are left out: the model has 256 positions" in err
    found, short = json.loads(out), evaluated(capsys, "--model", base, "--data", data)
    assert found == short | {"data": mixed, "rows_left_out": 1}


def test_golds_longer_than_an_answer_may_be_are_told(base, data, capsys):
    evaluate.main(["--model", base, "--data", data, "--device", "cpu", "--max-new-tokens", "4", "--json"])
    longest = max(len(Tokenizer(base).encode(row["response"])) for row in ROWS)
    assert f"--max-new-tokens {longest}" in capsys.readouterr().err
    evaluate.main(
        ["--model", base, "--data", data, "--device", "cpu", "--max-new-tokens", str(longest), "--json"]
    )
    assert capsys.readouterr().err == ""


def test_the_table_has_the_figures_aligned(base, data, capsys, monkeypatch):
    answer_with(monkeypatch, [ROWS[0]["response"], ROWS[1]["response"].replace("[SURNAME_1]", "Gómez")])
    assert evaluate.main(["--model", base, "--data", data, "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "exact match        50.0%" in lines and "preserved         100.0%" in lines
    assert "CITY                    100.0%    100.0%    100.0%         1" in lines
    assert "SURNAME                 100.0%     50.0%     66.7%         2" in lines
    assert "all                     100.0%     83.3%     90.9%         6" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such folder"], "neither a folder"),
        (["--data", "no-such.jsonl"], "no-such.jsonl: cannot be read"),
        (["--adapter", "no-such-adapter"], "adapter_config.json: no such file"),
        (["--device", "no-such-device"], "no-such-device"),
    ],
)
def test_a_name_of_nothing_is_one_message_and_exit_code_2(base, data, capsys, words, message):
    assert evaluate.main(["--model", base, "--data", data, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_message_and_exit_code_2(base, tmp_path, data, capsys, what):
    folder, message = make_broken_adapter(tmp_path / "broken", base, what)
    assert evaluate.main(["--model", base, "--adapter", folder, "--data", data, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and folder in err and message in err


def test_every_bad_row_is_named_with_its_line(base, tmp_path, capsys):
    rows = write_rows(
        tmp_path / "bad.jsonl", [ROWS[0], {"prompt": "Hello"}, {"prompt": "Hello", "response": " "}]
    )
    assert evaluate.main(["--model", base, "--data", rows]) == 2
    err = capsys.readouterr().err
    assert 'bad.jsonl:2: missing key "response"' in err and "bad.jsonl:3: empty response" in err


@pytest.mark.fault("not finite")
def test_weights_that_are_not_finite_are_no_figures(base, tmp_path, data, capsys):
    model = load_model(base, torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    load_adapter(model, adapter)
    model.model.layers[0].self_attn.q_proj.lora_B.data.fill_(torch.nan)
    from lora.peft_io import save_adapter

    save_adapter(model, adapter, base_model_name=base)
    assert evaluate.main(["--model", base, "--adapter", adapter, "--data", data, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "q_proj.lora_B.weight: has an infinity or NaN" in err


@pytest.mark.parametrize("words", [["--limit", "0"], ["--max-new-tokens", "0"], ["--dtype", "int8"], []])
def test_an_impossible_command_line_is_exit_code_2(base, data, capsys, words):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--model", base, *(["--data", data, *words] if words else [])])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_process_has_the_exit_code_and_keeps_stdout_for_the_json(base, data):
    done = run_script(
        "evaluate.py", "--model", base, "--data", data, "--json", "--limit", "1", "--max-new-tokens", "2"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == 1
    done = run_script("evaluate.py", "--model", "nobody/no-such-model", "--data", data)
    assert (
        (done.returncode, done.stdout) == (2, "")
        and "Traceback" not in done.stderr
        and "HF_HUB_OFFLINE" in done.stderr
    )


def test_help_costs_less_than_a_second():
    assert help_seconds("evaluate.py") < 1


def test_limit_does_not_change_the_task(base, tmp_path, capsys):
    """Nineteen rows are too few to be recognized as classification; the file has 24."""
    rows = [{"prompt": f"text {i}", "response": ("good", "bad")[i % 2]} for i in range(24)]
    found = evaluated(
        capsys, "--model", base, "--data", write_rows(tmp_path / "labels.jsonl", rows), "--limit", "3"
    )
    assert found["rows"] == 3 and "accuracy" in found


def review_rows(path, n=24):
    rows = [{"prompt": f"Good or bad? Text {i}", "response": ("good", "bad")[i % 2]} for i in range(n)]
    return write_rows(path, rows)


def test_labels_are_measured_by_their_log_probabilities_and_in_a_confusion_matrix(base, tmp_path, capsys):
    data = review_rows(tmp_path / "labels.jsonl")
    found = evaluated(capsys, "--model", base, "--data", data)
    assert 0 <= found["label_accuracy"] <= 1 and 0 <= found["label_macro_f1"] <= 1
    assert {gold: sum(row.values()) for gold, row in found["confusion"].items()} == {"bad": 12, "good": 12}
    named = evaluated(capsys, "--model", base, "--data", data, "--labels", "bad", "good", "--limit", "4")
    assert named["rows"] == 4 and "label_accuracy" in named


def test_the_table_shows_the_confusion_matrix(base, tmp_path, capsys, monkeypatch):
    answer_with(monkeypatch, ["good", "good", "good", "bad"] * 6)
    data = review_rows(tmp_path / "labels.jsonl")
    assert evaluate.main(["--model", base, "--data", data, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "expected                 bad    good",
        "bad                        6       6",
        "good                       0      12",
    ]


@pytest.mark.parametrize("labels", [["", "good"], ["good ", "bad", "Good"]])
def test_empty_and_equal_labels_are_refused_as_those_of_a_config_are(base, data, capsys, labels):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--model", base, "--data", data, "--labels", *labels])
    assert end.value.code == 2 and f"--labels {labels} has " in capsys.readouterr().err


def test_a_response_that_is_none_of_the_named_labels_is_exit_code_2(base, tmp_path, capsys):
    data = review_rows(tmp_path / "labels.jsonl", 3)
    assert evaluate.main(["--model", base, "--data", data, "--labels", "bad", "awful"]) == 2
    err = capsys.readouterr().err
    assert "labels.jsonl:1: 'good'" in err and "bad, awful" in err and "--labels" in err


def test_more_labels_than_can_be_compared_are_told(base, tmp_path, capsys):
    rows = [{"prompt": "x", "response": f"{i}"} for i in range(51)]
    data = write_rows(tmp_path / "many.jsonl", rows)
    words = ["--model", base, "--data", data, "--task", "classification", "--limit", "2", "--device", "cpu"]
    assert evaluate.main([*words, "--max-new-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "label_accuracy" not in json.loads(out) and "51" in err and "--labels" in err


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> str:
    """The embedded base as a GGUF file of float32."""
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    words = ["--model", "tiny", "--to", "gguf", "--quant", "f32", "--no-verify", "--out", str(out)]
    assert export.main(words) == 0
    return str(out)


def test_llama_cpp_has_the_measures_of_loupe_on_the_same_gguf_file(gguf, data, capsys):
    words = ["--model", gguf, "--data", data, "--device", "cpu", "--dtype", "float32", "--json"]
    found = []
    for backend in ("loupe", "llama.cpp"):
        assert evaluate.main([*words, "--max-new-tokens", "24", "--backend", backend]) == 0
        found.append(json.loads(capsys.readouterr().out))
    loupe, llama_cpp = found
    assert llama_cpp == loupe | {"backend": "llama.cpp"}
    assert 0 < loupe["preserved"] or 0 < loupe["over_mask_rate"] or 0 < loupe["leak_rate"]


def test_the_responses_are_llama_cpps(gguf, data, capsys, monkeypatch):
    monkeypatch.setattr(llama_cpp, "respond", lambda *_: ([row["response"] for row in ROWS], 0))
    words = ["--model", gguf, "--data", data, "--device", "cpu", "--backend", "llama.cpp"]
    assert evaluate.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "exact match       100.0%" in lines and "backend         llama.cpp" in lines


def test_llama_cpp_without_xllamacpp_or_of_what_it_cannot_load_is_one_message(
    base, gguf, data, tmp_path, capsys, monkeypatch
):
    words = ["--data", data, "--backend", "llama.cpp"]
    for more, parts in (
        (["--model", base], [f"--model {base}", "GGUF", "export.py"]),
        (["--model", gguf, "--adapter", "a"], ["--adapter a", "GGUF", "export.py"]),
    ):
        assert evaluate.main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(part in err for part in parts)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert evaluate.main([*words, "--model", gguf]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--backend llama.cpp" in err and "pip install xllamacpp" in err


def test_loss_only_and_llama_cpp_exclude_each_other(base, data, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--model", base, "--data", data, "--loss-only", "--backend", "llama.cpp"])
    assert end.value.code == 2 and "leave one of them out" in capsys.readouterr().err
