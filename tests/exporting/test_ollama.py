"""exporting/ollama.py: Go's template engine renders the prompts of model/tokenizer.py, in Ollama's syntax."""

import json
import random

import pytest

from common.control_tokens import END_OF_TURN, START_OF_TURN
from exporting.ollama import chat_template, write_modelfile
from model.hub import TINY
from model.tokenizer import Tokenizer
from tests.exporting.make_ollama_golden import CONVERSATIONS, GOLDEN, render


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def prompt_of(tokenizer: Tokenizer, conversation) -> str:
    """Returns the prompt that the tokenizer renders, as text without <bos>."""
    return tokenizer.backend.decode(
        tokenizer.render_prompt(conversation), skip_special_tokens=False
    ).removeprefix("<bos>")


# the template


def test_the_golden_prompts_are_of_the_template_that_is_written(golden):
    """If this fails, the template has changed: run make_ollama_golden, which needs go."""
    assert golden["template"] == chat_template() and golden["conversations"] == json.loads(
        json.dumps(CONVERSATIONS)
    )


def test_a_conversation_worked_by_hand(golden):
    s, e = START_OF_TURN, END_OF_TURN
    assert golden["prompts"][2] == f"{s}user\nBe brief.\n\nHello{e}\n{s}model\n"
    assert golden["prompts"][3] == (
        f"{s}user\n Two lines,\nkept as they are \n\n\nA{e}\n{s}model\nB{e}\n{s}user\nC{e}\n{s}model\nD{e}\n"
        f"{s}user\nE{e}\n{s}model\n"
    )


def test_go_renders_what_the_tokenizer_renders(golden, tokenizer):
    for conversation, prompt in zip(golden["conversations"], golden["prompts"], strict=True):
        assert prompt == prompt_of(tokenizer, conversation)


@pytest.mark.external
def test_go_renders_random_conversations_as_the_tokenizer_does(tokenizer):
    rng = random.Random(0)

    def text():
        return "".join(rng.choice(" \t\n\r\v\f\x1f {}\"'<>&abÄß€😀") for _ in range(rng.randrange(9)))

    conversations = []
    for _ in range(300):
        turns = [(("user", "assistant")[i % 2], text()) for i in range(rng.randint(1, 6))]
        conversations.append(([("system", "x" + text())] if rng.random() < 0.5 else []) + turns)
    assert render(conversations) == [prompt_of(tokenizer, c) for c in conversations]


# the Modelfile


def commands(modelfile: str) -> list[tuple[str, str]]:
    """Returns [(command, argument)] as Ollama does: an argument is quoted, or is the rest of the line."""
    found, rest = [], modelfile
    while rest := rest.lstrip():
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            parameter, _, rest = rest.partition(" ")
            name = f"{name} {parameter}"
        quote = next((q for q in ('"""', '"') if rest.startswith(q)), None)
        argument, _, rest = rest[len(quote) :].partition(quote) if quote else rest.partition("\n")
        found.append((name, argument))
    return found


def test_the_modelfile_says_what_ollama_reads(tmp_path):
    file = write_modelfile(tmp_path, "gemma q8.gguf")
    assert file == tmp_path / "Modelfile"
    assert commands(file.read_text(encoding="utf-8")) == [
        ("FROM", "./gemma q8.gguf"),
        ("TEMPLATE", chat_template()),
        ("PARAMETER stop", END_OF_TURN),
        ("PARAMETER temperature", "1"),
        ("PARAMETER top_k", "64"),
        ("PARAMETER top_p", "0.95"),
    ]


def test_an_adapter_and_other_settings_stand_in_the_modelfile(tmp_path):
    file = write_modelfile(
        tmp_path,
        "base.gguf",
        adapter_name="lora.gguf",
        stops=(END_OF_TURN, "###"),
        temperature=0.1,
        top_k=1,
        top_p=1.0,
    )
    found = commands(file.read_text(encoding="utf-8"))
    assert found[:2] == [("FROM", "./base.gguf"), ("ADAPTER", "./lora.gguf")]
    assert found[3:] == [
        ("PARAMETER stop", END_OF_TURN),
        ("PARAMETER stop", "###"),
        ("PARAMETER temperature", "0.1"),
        ("PARAMETER top_k", "1"),
        ("PARAMETER top_p", "1"),
    ]


def test_nothing_in_the_template_ends_its_quotes_early():
    assert (
        '"""' not in chat_template()
        and not chat_template().startswith('"')
        and not chat_template().endswith('"')
    )


@pytest.mark.parametrize("name", ["../x.gguf", "a/b.gguf", 'a"b.gguf', "a\nPARAMETER stop x.gguf", " a.gguf"])
def test_a_file_name_that_a_modelfile_cannot_hold_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot stand in a Modelfile"):
        write_modelfile(tmp_path, "x.gguf", adapter_name=name)
    assert not (tmp_path / "Modelfile").exists()
