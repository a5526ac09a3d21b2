"""Converts text to token ids and back, and renders Gemma's chat format, which is split into two lines here:

<bos><start_of_turn>user\\n{system message and a blank line, if any}{user message}<end_of_turn>\\n
<start_of_turn>model\\n{response}<end_of_turn>\\n
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from common.control_tokens import CONTROL_TOKENS

# What transformers needs besides tokenizer.json, where a model has no tokenizer_config.json.
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
SETTINGS |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
ROLES = {"user": "user", "assistant": "model"}
REPLACEMENT = "\ufffd"  # Bytes of an unfinished UTF-8 character are decoded to this.

Messages = Iterable[tuple[str, str]]  # (role, content) pairs
Piece = tuple[list[int], bool]  # ids, and whether they are a response


class Tokenizer:
    """The tokenizer of a model folder. Text that spells a control token, such as "<bos>", stays text."""

    def __init__(self, path: str | Path):
        """Reads tokenizer.json in `path`; raises ValueError if it is missing, damaged or not Gemma 3's."""
        from tokenizers import Tokenizer as Backend  # Its import takes 60 ms, which --help does not need.

        self.folder = Path(path)
        file = self.folder / "tokenizer.json"
        if not file.is_file() and (self.folder / "tokenizer.model").is_file():
            raise ValueError(
                f"{file}: no such file, only sentencepiece's tokenizer.model, which is not read; copy "
                "tokenizer.json from the model that this one was made from, or write it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; a model folder holds config.json, tokenizer.json and *.safetensors"
            )
        try:
            self.backend = Backend.from_file(str(file))
        except Exception as e:  # the library raises a bare Exception
            raise ValueError(f"{file}: not a tokenizer.json ({e}); download the model again") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # encodes a control token's text as plain text
        ids = {name: self.backend.token_to_id(name) for name in CONTROL_TOKENS}
        missing = ", ".join(name for name, id in ids.items() if id is None)
        if missing:
            raise ValueError(f"{file}: has no {missing}; Loupe needs the tokenizer of a Gemma 3 model")
        typed = ", ".join(name for name, id in ids.items() if id in self.encode(name))
        if typed:
            raise ValueError(
                f"{file}: {typed} typed by a user would become a control token; "
                'set "special": true for it in added_tokens'
            )
        known = [id for id in ids.values() if id is not None]
        self.bos_id, self.eos_id, self.pad_id, self.start_of_turn_id, self.end_of_turn_id = known
        stops = _generation_stops(file.with_name("generation_config.json"))
        self.stop_ids = frozenset((self.eos_id, self.end_of_turn_id)) | stops

    @cached_property
    def vocab_size(self) -> int:
        """Returns the highest token id plus one. The first access takes 0.2 s with Gemma's vocabulary."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text; adds no <bos> or other control token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str) -> list[int]:
        """Returns the ids of a text in which "<bos>" and other control tokens stand for themselves."""
        with self.parsing_special_tokens():
            return self.encode(text)

    @contextmanager
    def parsing_special_tokens(self, parse: bool = True) -> Iterator[None]:
        """In its block, if `parse`, text that spells a special token becomes that token."""
        self.backend.encode_special_tokens = not parse
        try:
            yield
        finally:
            self.backend.encode_special_tokens = True

    @property
    def special_tokens(self) -> list[str]:
        """The texts of the special tokens: control tokens, and those that a model adds to Gemma's."""
        return [t.content for t in self.backend.get_added_tokens_decoder().values() if t.special]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes many texts in parallel."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, without control tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Returns a token's text in tokenizer.json, where "\u2581" is a space, or "" for an unknown id."""
        return self.backend.id_to_token(token) or ""

    def render_turns(self, messages: Messages) -> list[Piece]:
        """Returns a conversation as pieces (token ids, whether they are a response), without <bos>.

        A system message, if any, comes first and is put before the first user message. User and assistant
        messages then alternate. As in Gemma's published template, these two are stripped of surrounding
        whitespace, and the system message is not. The piece of a response ends with <end_of_turn>.
        """
        return self.render_batch([messages])[0]

    def render_batch(self, conversations: Iterable[Messages]) -> list[list[Piece]]:
        """Returns the pieces of each conversation as render_turns does; encodes all texts in parallel."""
        rendered = [self._parts(messages) for messages in conversations]
        parts = {part for pieces in rendered for piece, _ in pieces for part in piece}
        texts = [part for part in parts if isinstance(part, str)]
        ids: dict[str | int, list[int]] = {i: [i] for i in (self.start_of_turn_id, self.end_of_turn_id)}
        ids.update(zip(texts, self.encode_batch(texts), strict=True))
        return [
            [([i for part in piece for i in ids[part]], is_response) for piece, is_response in pieces]
            for pieces in rendered
        ]

    def _parts(self, messages: Messages) -> list[tuple[list[str | int], bool]]:
        """Returns the pieces of render_turns before encoding: lists of texts and control-token ids."""
        pieces: list[tuple[list[str | int], bool]] = []
        start, end, system = self.start_of_turn_id, self.end_of_turn_id, ""
        for role, content in messages:
            if role == "system":
                system = content + "\n\n"
            elif role == "user":
                pieces.append(([start, f"{ROLES[role]}\n{system}{content.strip()}", end, "\n"], False))
                system = ""
            else:
                pieces.append(([start, ROLES[role] + "\n"], False))
                pieces.append(([content.strip(), end], True))
                pieces.append((["\n"], False))
        return pieces

    def render_prompt(self, messages: Messages) -> list[int]:
        """Returns the ids of a generation prompt: <bos>, the conversation and "<start_of_turn>model\\n"."""
        ids = [i for piece, _ in self.render_turns(messages) for i in piece]
        return [self.bos_id, *ids, self.start_of_turn_id] + self.encode(ROLES["assistant"] + "\n")


class TextStream:
    """Decodes token ids that arrive one by one, and holds back the bytes of an incomplete UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.done = tokenizer, list[int](), 0

    def push(self, token: int) -> str:
        """Adds a token and returns the new text, or "" if it ends within a UTF-8 character."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(REPLACEMENT):
            return ""
        new, self.done = text[self.done :], len(text)
        return new

    def flush(self) -> str:
        """Returns the text that push has not returned yet."""
        text = self.tokenizer.decode(self.ids)
        new, self.done = text[self.done :], len(text)
        return new


def _generation_stops(path: Path) -> set[int]:
    """Returns the ids in eos_token_id of generation_config.json; an empty set if there is no such file."""
    if not path.is_file():
        return set()
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        ids = ids if isinstance(ids, list) else [ids]
        if all(isinstance(i, int) for i in ids):
            return set(ids)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f'{path}: not a generation_config.json with "eos_token_id" (an id or a list of ids); '
        "repair it, or remove it"
    )
