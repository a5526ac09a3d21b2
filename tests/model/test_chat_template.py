"""model/chat_template.py: renders as transformers does; only a template of the trained turns is passed on."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from model.chat_template import (
    CONVERSATIONS,
    chat_template,
    render,
    save_tokenizer,
    stored_template,
    wrong_turns,
)
from model.hub import TINY
from model.tokenizer import Tokenizer
from tests.makers import write_tokenizer
from tests.model.test_tokenizer import TEMPLATE as GEMMAS

OURS = stored_template(TINY)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def folder_with(folder: Path, template: str | list | None, **generation) -> Tokenizer:
    """Makes a folder with the embedded base's tokenizer and this template, and returns its tokenizer."""
    folder.mkdir(parents=True)
    shutil.copy(TINY / "tokenizer.json", folder)
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | {"chat_template": template}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | generation))
    return Tokenizer(folder)


def test_a_conversation_by_hand():
    template = "{{ bos_token }}{% for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}\n"
    template += "{{ m['role'] }}: {{ m['content'] | trim }};\n{% endfor %}{{ add_generation_prompt }}"
    messages = [("system", "x"), ("user", " <a> "), ("assistant", "b")]
    assert render(template, messages) == "<bos>user: <a>;\nassistant: b;\nTrue"


@pytest.mark.parametrize("template", [OURS, GEMMAS, CHATML])
def test_a_template_renders_as_in_transformers(tmp_path, template):
    folder_with(tmp_path / "x", template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")
    for messages in CONVERSATIONS:
        turns = [{"role": role, "content": content} for role, content in messages]
        for prompt in (True, False):
            expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            assert render(template, messages, prompt) == expected


@pytest.mark.parametrize("template", [OURS, GEMMAS])
def test_a_template_of_the_trained_turns_is_passed_on_as_it_is(tmp_path, capsys, template):
    assert chat_template(folder_with(tmp_path / "x", template)) == template
    assert capsys.readouterr().err == ""


WRONG = {
    "other turns": (CHATML, "renders '<|im_start|>user"),
    "no <bos>": (OURS.replace("{{ bos_token }}", ""), "renders '<start_of_turn>user"),
    "no system message": (OURS.replace("messages[0]['content'] + '\\n\\n'", "''"), "where Loupe trains"),
    "untrimmed": (OURS.replace(" | trim", ""), "where Loupe trains"),
    "escaped": (OURS.replace("| trim", "| trim | replace('&', '&amp;')"), "&amp;amp;"),
    "a dropped thought": (OURS.replace("| trim", ".split('</think>')[-1] | trim"), "<think>b</think>c"),
    "always the model's turn": (OURS.replace("if add_generation_prompt", "if true"), "where Loupe trains"),
    "never the model's turn": (OURS.replace("if add_generation_prompt", "if false"), "where Loupe trains"),
    "no Jinja": ("{% if %}", "(TemplateSyntaxError: "),
    "an attack": ("{{ messages.__class__.__mro__ }}", "(SecurityError: "),
    "an error": ("{{ 1 // 0 }}", "(ZeroDivisionError: "),
}


@pytest.mark.fault("chat template")
@pytest.mark.parametrize("what", WRONG)
def test_another_template_is_replaced_with_a_warning_that_shows_what_it_renders(tmp_path, capsys, what):
    template, found = WRONG[what]
    tokenizer = folder_with(tmp_path / "x", template)
    assert template != OURS and chat_template(tokenizer) == OURS
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {tmp_path / 'x'}: the chat template is replaced by Gemma's")
    assert err.count("\n") == 1 and found in err


def test_half_a_surrogate_pair_in_a_template_or_a_setting_ends_no_save(tmp_path, capsys):
    tokenizer = folder_with(tmp_path / "x", "\ud800" + GEMMAS)
    settings = tmp_path / "x" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"other": "\ud800"}))
    save_tokenizer(tokenizer, tmp_path / "y")
    assert stored_template(tmp_path / "y") == OURS
    assert "the chat template is replaced by Gemma's" in capsys.readouterr().err


def test_a_template_that_is_not_utf_8_is_refused_by_its_file(tmp_path):
    tokenizer = folder_with(tmp_path / "x", None)
    (tmp_path / "x" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8 .*repair it, or remove it"):
        chat_template(tokenizer)


def test_a_folder_without_a_template_gets_ours_without_a_warning(tmp_path, capsys):
    assert chat_template(folder_with(tmp_path / "x", None)) == OURS and capsys.readouterr().err == ""


def test_the_template_that_is_checked_is_the_one_that_transformers_reads(tmp_path):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    for i, template in enumerate((named, CHATML, None, [{"name": "tool_use", "template": "a"}])):
        folder = tmp_path / str(i)
        folder_with(folder, template)
        assert stored_template(folder) == ("b", CHATML, None, None)[i]
    (folder / "chat_template.jinja").write_text("c")
    assert stored_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template == "c"


def test_our_templates_turns_are_right_for_every_tokenizer_of_gemma(tmp_path):
    write_tokenizer(tmp_path)
    assert wrong_turns(OURS, Tokenizer(tmp_path)) == wrong_turns(GEMMAS, Tokenizer(TINY)) == ""


# what is saved


@pytest.mark.fault("stop tokens")
@pytest.mark.parametrize("settings", [True, False])
def test_a_pre_trained_bases_files_gain_the_turns_and_the_end_of_a_turn(tmp_path, settings):
    tokenizer = folder_with(tmp_path / "base", None, temperature=0.5, do_sample=True)
    if not settings:
        (tmp_path / "base" / "tokenizer_config.json").unlink()
    save_tokenizer(tokenizer, tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": [1, 106],
        "temperature": 0.5,
        "do_sample": True,
    }
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for messages in CONVERSATIONS:
        turns = [{"role": role, "content": content} for role, content in messages]
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.render_prompt(messages)


def test_a_template_in_a_file_of_its_own_does_not_outlive_its_replacement(tmp_path):
    (folder_with(tmp_path / "base", OURS).folder / "chat_template.jinja").write_text(CHATML)
    save_tokenizer(Tokenizer(tmp_path / "base"), tmp_path / "out")
    assert stored_template(tmp_path / "out") == OURS


def test_stop_ids_of_the_bases_own_are_kept(tmp_path):
    save_tokenizer(folder_with(tmp_path / "base", OURS, eos_token_id=[1, 50]), tmp_path / "out")
    assert Tokenizer(tmp_path / "out").stop_ids == {1, 50, 106}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [
        1,
        50,
        106,
    ]


def test_what_is_saved_onto_itself_stays(tmp_path):
    save_tokenizer(Tokenizer(TINY), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save_tokenizer(Tokenizer(tmp_path), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert before["tokenizer.json"] == (TINY / "tokenizer.json").read_bytes()
