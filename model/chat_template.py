"""The chat template and the stop tokens of a model, which every export and a full run's model/ carry.

A model's own template is passed on only if it renders the turns that Loupe trains (model/tokenizer.py). It is
rendered as transformers does it (utils/chat_template_utils.py): by jinja2, which torch installs too, in a
sandbox, because a template is a program that comes with a model from the hub.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.files import read_json, write_together
from common.progress import warn
from model.hub import TINY
from model.tokenizer import SETTINGS, Messages, Tokenizer

REMEDY = "repair it, or remove it"
# A system message, white space at the ends, several turns, and characters that a template might escape.
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hello")],
    [("system", " Be brief.\n"), ("user", "\n  2 + 2? "), ("assistant", " 4.\n\nYes. "), ("user", "\tSo? ")],
    [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "Zürich <b>&amp;</b> '{{ x }}' 😀")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")],
]


def chat_template(tokenizer: Tokenizer) -> str:
    """Returns a Jinja template that renders the turns of `tokenizer`.

    It is that of the model's folder. If this one renders other turns, a warning says which, and the template
    is the embedded base's, as it is for a folder without a template.
    """
    template = stored_template(tokenizer.folder)
    if template is not None:
        found = wrong_turns(template, tokenizer)
        if not found:
            return template
        warn(f"{tokenizer.folder}: the chat template is replaced by Gemma's, because it {found}")
    ours = stored_template(TINY)
    assert ours is not None
    return ours


def stored_template(folder: Path) -> str | None:
    """Returns the chat template that transformers reads from a folder, or None.

    It is in chat_template.jinja or in tokenizer_config.json, there as a text or as one of several by name.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{file}: not UTF-8 ({e}); {REMEDY}") from None
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def wrong_turns(template: str, tokenizer: Tokenizer) -> str:
    """Returns what a template renders otherwise than Tokenizer.render_prompt, or "" if nothing.

    It renders CONVERSATIONS, with and without the start of the model's turn at the end, and compares ids.
    """
    for messages in CONVERSATIONS:
        prompt = tokenizer.render_prompt(messages)
        turns = [tokenizer.bos_id, *(i for piece, _ in tokenizer.render_turns(messages) for i in piece)]
        for add_generation_prompt, expected in ((True, prompt), (False, turns)):
            try:
                text = render(template, messages, add_generation_prompt)
                ids = tokenizer.encode_control(text)
            except Exception as e:  # A template is a program, and fails in any way.
                return f"fails on {messages} ({type(e).__name__}: {e})"
            if ids != expected:
                trained = tokenizer.backend.decode(expected, skip_special_tokens=False)
                return f"renders {text!r} where Loupe trains {trained!r}"
    return ""


def render(template: str, messages: Messages, add_generation_prompt: bool = True) -> str:
    """Returns the text that a Jinja chat template makes of a conversation, and raises what it raises."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    extensions = ["jinja2.ext.loopcontrols"]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    return jinja.from_string(template).render(
        messages=[{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=add_generation_prompt,
        raise_exception=raise_exception,
        **SETTINGS,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json.

    The last one has all stop ids as eos_token_id. Other settings of the model's own files are kept.
    """
    own = _optional_json(tokenizer.folder / "tokenizer_config.json")
    settings = SETTINGS | own | {"chat_template": chat_template(tokenizer)}
    generation: dict = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    generation |= _optional_json(tokenizer.folder / "generation_config.json")
    generation["eos_token_id"] = sorted(tokenizer.stop_ids)
    files: dict[str, Iterable[bytes]] = {
        "tokenizer.json": [(tokenizer.folder / "tokenizer.json").read_bytes()],
        "tokenizer_config.json": [json.dumps(settings, indent=2).encode()],
        "generation_config.json": [json.dumps(generation, indent=2).encode()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, files)


def _optional_json(path: Path) -> dict:
    """Returns the object in a JSON file, {} if there is no such file."""
    return read_json(path, REMEDY) if path.is_file() else {}
