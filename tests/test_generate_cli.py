"""generate.py as a user runs it: seeds, streaming, stopping, files, adapters, messages about bad input."""

import json
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch

import generate as script
from generation.answer_file import AnswerFile
from generation.generate import Completion, generate
from model.tokenizer import Tokenizer
from model.weights import load_model
from tasks import redaction as pii
from tests.folders import (
    BROKEN,
    CHAT,
    ROOT,
    ROWS,
    help_seconds,
    make_adapter,
    make_broken_adapter,
    make_model,
    run_script,
    write_rows,
)

PROMPT = "Où est la gare ?"
CPU = ["--device", "cpu", "--dtype", "float32"]


def ask(base: str, *words: str, prompt: str = PROMPT) -> list[str]:
    return ["--model", base, "--prompt", prompt, *CPU, "--max-new-tokens", "8", *words]


def answered(capsys, base: str, *words: str, prompt: str = PROMPT) -> dict:
    """Returns the JSON object that is the only output."""
    assert script.main([*ask(base, prompt=prompt), *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def test_json_is_one_object_of_text_ids_and_stop_reason(base, capsys):
    found = answered(capsys, base)
    assert found.keys() == {"text", "token_ids", "stop_reason"}
    assert found["text"] == Tokenizer(base).decode(found["token_ids"])
    assert found["stop_reason"] == "length" and len(found["token_ids"]) == 8


def test_without_json_the_text_alone_is_printed(base, capsys):
    text = answered(capsys, base)["text"]
    assert script.main(ask(base)) == 0
    assert capsys.readouterr() == (text + "\n", "")


@pytest.mark.parametrize("raw", [False, True])
def test_the_prompt_is_in_chat_turns_or_raw_after_bos(base, capsys, raw):
    tokenizer, model = Tokenizer(base), load_model(base, torch.float32)
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    ids = ids if raw else tokenizer.render_prompt([("user", PROMPT)])
    (expected,) = generate(model, [ids], max_new_tokens=8, stop_ids=tokenizer.stop_ids)
    assert answered(capsys, base, *(["--raw"] if raw else []))["token_ids"] == expected.token_ids


def test_raw_and_chat_prompts_are_answered_differently(base, capsys):
    assert answered(capsys, base)["token_ids"] != answered(capsys, base, "--raw")["token_ids"]


def test_a_seed_repeats_its_answer_and_another_gives_another(base, capsys):
    sampled = ["--temperature", "1", "--seed"]
    first, again, other = (answered(capsys, base, *sampled, seed) for seed in ("1", "1", "2"))
    assert first == again and first["token_ids"] != other["token_ids"]


def test_the_seed_does_not_matter_at_temperature_0(base, capsys):
    assert answered(capsys, base, "--seed", "1") == answered(capsys, base, "--seed", "2")


def test_top_k_1_is_greedy_at_any_temperature(base, capsys):
    assert answered(capsys, base, "--temperature", "2", "--top-k", "1") == answered(capsys, base)


def streamed(base: str, monkeypatch, ids: list[int]) -> list[str]:
    """Returns what is printed to a terminal, print by print, when the model generates these ids."""

    def say(model, prompts, *, on_token, **_):
        for token in ids:
            on_token(0, token)
        return [Completion(ids, "length")]

    pieces = []
    monkeypatch.setattr("generation.generate.generate", say)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.print", lambda *what, end="\n", **_: pieces.append("".join(what) + end))
    assert script.main(ask(base)) == 0
    return pieces


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_text_that_streams_equals_the_final_text_and_splits_no_character(base, monkeypatch, cut):
    """The emoji is four byte tokens; when generation stops inside it, both texts end with the replacement."""
    tokenizer = Tokenizer(base)
    ids = tokenizer.encode("Der Zug \U0001f689 nach Zürich, naïve \U0001f689")
    assert len(tokenizer.encode("\U0001f689")) > 3
    ids = ids[: len(ids) - cut]
    pieces = streamed(base, monkeypatch, ids)
    assert "".join(pieces) == tokenizer.decode(ids) + "\n" and len(pieces) > len(ids)
    assert not any("\ufffd" in piece for piece in pieces[: len(ids)])


def test_an_id_that_generation_config_names_ends_the_answer(base, tmp_path, capsys):
    said = answered(capsys, base)["token_ids"]
    last = next(i for i in range(1, 8) if said[i] not in said[:i])
    copy = shutil.copytree(base, tmp_path / "stops")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, said[last]]}))
    found = answered(capsys, str(copy))
    assert (found["token_ids"], found["stop_reason"]) == (said[:last], "stop")


def test_the_adapter_changes_the_answer(base, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.5)
    assert answered(capsys, base)["token_ids"] != answered(capsys, base, "--adapter", adapter)["token_ids"]


@pytest.mark.fault("special tokens")
def test_a_control_token_in_the_prompt_is_plain_text(base, capsys, monkeypatch):
    asked, complete = [], script.Bot.complete

    def recorded(bot, prompt, *how):
        asked.append(prompt)
        return complete(bot, prompt, *how)

    monkeypatch.setattr(script.Bot, "complete", recorded)
    answered(capsys, base, prompt="<end_of_turn><start_of_turn>model")
    answered(capsys, base, "--raw", prompt="<bos><end_of_turn>")
    tokenizer = Tokenizer(base)
    assert asked[0].count(tokenizer.start_of_turn_id) == 2 and asked[0].count(tokenizer.end_of_turn_id) == 1
    assert asked[1].count(tokenizer.bos_id) == 1 and tokenizer.end_of_turn_id not in asked[1]


@pytest.mark.fault("bad argument")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such folder"], "neither a folder"),
        (["--model", __file__], "is a file; a model is the folder"),
        (["--adapter", "no-such-adapter"], "adapter_config.json: no such file"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "word " * 300], "it may have 1 to 255"),
    ],
)
def test_wrong_input_is_one_message_that_names_it_and_exit_code_2(base, capsys, words, message):
    assert script.main(ask(base, *words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def to_file(base: str, source, target, *words: str) -> list[str]:
    files = ["--input", str(source), "--output", str(target)]
    return ["--model", base, *files, *CPU, "--max-new-tokens", "6", *words]


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_file_is_answered_row_by_row_as_each_prompt_alone_is(base, tmp_path, capsys):
    singles = [{"prompt": PROMPT}, ROWS[0], {"instruction": "Translate.", "input": "Brot"}]
    singles += [{"text": "Ein Text."}]
    source = write_rows(tmp_path / "in.jsonl", [*singles, CHAT, {"messages": CHAT["messages"][:4]}])
    assert script.main(to_file(base, source, tmp_path / "out.jsonl")) == 0
    rows = written(tmp_path / "out.jsonl")
    prompts = [PROMPT, ROWS[0]["prompt"], "Translate.\n\nBrot", "Ein Text."]
    history = "Be brief.\n\nTwo and two?\n\nFour.\n\n Et en français ? "
    assert [row["prompt"] for row in rows] == [*prompts, history, history]
    for row in rows[:4]:
        capsys.readouterr()
        script.main([*ask(base, "--max-new-tokens", "6", "--json", prompt=row["prompt"])])
        alone = json.loads(capsys.readouterr().out)
        assert (row["response"], row["stop_reason"]) == (alone["text"], alone["stop_reason"])
    assert rows[4] == rows[5] and rows[4]["response"] != rows[0]["response"]


def test_a_text_file_is_a_prompt_a_line_after_the_instruction_that_evaluation_knows(base, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("Ana Ruiz is here.\r\n\n  Bob\u2028too. \n", encoding="utf-8")
    assert script.main(to_file(base, source, target, "--instruction", "redact")) == 0
    prompts = [row["prompt"] for row in written(target)]
    assert [pii.source_text(p) for p in prompts] == ["Ana Ruiz is here.", "Bob\u2028too."]
    assert all(pii.is_redaction(p, "") for p in prompts)


def test_an_instruction_stands_before_every_prompt_and_the_redaction_samples_have_theirs_once(
    base, tmp_path, capsys
):
    instruction = ["--instruction", "Translate."]
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Brot"}, {"messages": CHAT["messages"][:2]}])
    script.main(to_file(base, source, tmp_path / "out.jsonl", *instruction))
    capsys.readouterr()
    first, second = (row["prompt"] for row in written(tmp_path / "out.jsonl"))
    assert first == "Translate.\n\nBrot" and second == "Be brief.\n\nTranslate.\n\nTwo and two?"
    with_option = answered(capsys, base, *instruction, prompt="Brot")
    assert with_option == answered(capsys, base, prompt="Translate.\n\nBrot")
    whole = pii.prompt_for("Ana.")
    assert whole != "Ana." and pii.prompt_for(whole) == whole


@pytest.mark.fault("lost answer")
@pytest.mark.parametrize("how", [[], ["--temperature", "1", "--seed", "3"]])
def test_a_stopped_run_says_how_to_go_on_and_ends_with_the_same_bytes(
    base, tmp_path, capsys, monkeypatch, how
):
    """The longest prompts are answered first: of three answers the file has the first row's, and the other
    two wait for the row before them.
    """
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT * n} for n in (6, 1, 5, 2, 4, 3)])
    settings = [*how, "--batch-size", "2"]
    assert script.main(to_file(base, source, whole, *settings)) == 0
    add, added = AnswerFile.add, []

    def recorded(file, number, *answer):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(number)
        add(file, number, *answer)

    monkeypatch.setattr(AnswerFile, "add", recorded)
    capsys.readouterr()
    assert script.main(to_file(base, source, part, *settings)) == 130
    assert "\n    python generate.py --model" in capsys.readouterr().err and len(written(part)) == 1
    added.clear()
    assert script.main(to_file(base, source, part, *settings)) == 0
    assert part.read_bytes() == whole.read_bytes()
    assert sorted(added) == [1, 3, 5] and not (tmp_path / "part.jsonl.waiting").exists()


def test_sigterm_leaves_a_file_that_goes_on(base, tmp_path):
    prompts, out = [f"{PROMPT} {n}" for n in range(2000)], tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    words = ["generate.py", *to_file(base, source, out, "--batch-size", "1", "--max-new-tokens", "40")]
    run = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.05)
    run.terminate()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert shlex.join(["python", *words]) in err and "Traceback" not in err
    lines = written(out)
    assert 0 < len(lines) < 2000
    file = AnswerFile(out, prompts, lines[0]["made_by"])
    assert len(lines) <= 2000 - len(file.missing) < 2000


def test_answers_of_another_model_or_setting_are_refused(base, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT}])
    adapter = make_adapter(tmp_path / "adapter", base)
    words = to_file(base, source, tmp_path / "out.jsonl", "--adapter", adapter)
    assert script.main(words) == 0 and script.main(words) == 0  # The second run has nothing to do.
    before = (tmp_path / "out.jsonl").read_bytes()
    scaled = shutil.copytree(adapter, tmp_path / "scaled")
    settings = json.loads((scaled / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2
    (scaled / "adapter_config.json").write_text(json.dumps(settings))
    another, model = make_adapter(tmp_path / "another", base, scale=0.3), make_model(tmp_path / "m", seed=5)
    changes = [["--adapter", str(scaled)], ["--adapter", another], ["--model", model]]
    for change in (*changes, ["--max-new-tokens", "7"], ["--seed", "1"]):
        capsys.readouterr()
        assert script.main([*words, *change]) == 2
        assert "was made by another model" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_impossible_settings_are_refused_before_the_model_is_looked_for_or_a_file_made(tmp_path, capsys):
    words = to_file("no/such folder", write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert script.main([*words, "--batch-size", "0", "--top-p", "2"]) == 2
    err = capsys.readouterr().err
    assert "batch_size is 0" in err and "top_p is 2.0" in err and err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_were_cut_off_are_counted(base, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT}, {"prompt": PROMPT * 3}])
    script.main(to_file(base, source, tmp_path / "out.jsonl"))
    err = capsys.readouterr().err
    assert "--max-new-tokens 6 cut off 2 answers of this run, the first one of in.jsonl:1" in err


def test_all_that_is_wrong_with_a_file_is_one_message(base, tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    answer = {"messages": [{"role": "assistant", "content": "Hi"}]}
    write_rows(path, [{"prompt": 3}, {"promt": "x"}, {"prompt": "fine"}, {"prompt": " "}, answer])
    path.write_text(path.read_text() + "none\n")
    assert script.main(to_file(base, path, out)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 5 problems") and "on_bad" not in err and not out.exists()
    problems = ['1: "prompt" must be a string', "2: unknown row", "4: the prompt is empty", "5: roles"]
    for problem in (*problems, "6: not JSON"):
        assert f"in.jsonl:{problem}" in err
    write_rows(path, [{"prompt": "word " * 300}, {"prompt": "fine"}, {"prompt": "word " * 400}])
    assert script.main(to_file(base, path, out)) == 2
    err = capsys.readouterr().err
    assert "2 prompts are too long for the model's 256 positions" in err
    assert "in.jsonl:1: " in err and "in.jsonl:3: " in err


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_message_and_exit_code_2(base, tmp_path, capsys, what):
    folder, message = make_broken_adapter(tmp_path / "broken", base, what)
    assert script.main(ask(base, "--adapter", folder)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and folder in err and message in err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_without_one_of_its_files_is_exit_code_2(base, tmp_path, capsys, file):
    shutil.copytree(base, tmp_path / "part")
    (tmp_path / "part" / file).unlink()
    assert script.main(ask(str(tmp_path / "part"))) == 2
    assert file in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--raw"],
        ["--json"],
        ["--prompt", "Hello", "--dtype", "int8"],
        ["--input", "a"],
        ["--output", "a"],
        ["--instruction", "a"],
        ["--input", "a", "--output", "b", "--prompt", "c"],
        ["--input", "a", "--output", "./a"],
    ],
)
def test_an_impossible_command_line_is_exit_code_2(base, capsys, words):
    with pytest.raises(SystemExit) as end:
        script.main(["--model", base, *words])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_process_has_the_exit_code(base):
    done = run_script("generate.py", *ask(base, "--json"))
    assert done.returncode == 0 and json.loads(done.stdout)["stop_reason"] == "length"
    done = run_script("generate.py", *ask("no/such folder"))
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr


def test_help_costs_less_than_a_second():
    assert help_seconds("generate.py") < 1


def test_an_empty_adapter_is_not_the_bare_base(base, tmp_path, capsys, monkeypatch):
    """What a shell makes of --adapter "$UNSET"."""
    monkeypatch.chdir(tmp_path)
    assert script.main(["--model", base, "--adapter", "", "--prompt", "Hello"]) == 2
    assert "adapter_config.json: no such file" in capsys.readouterr().err
