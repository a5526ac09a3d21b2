"""Text to token ids and back, and the only place that knows Gemma's chat turns and where generation stops.

<bos><start_of_turn>user\\n{system, if any, and a blank
line}{user}<end_of_turn>\\n<start_of_turn>model\\n{response}<end_of_turn>\\n
"""

import json
from functools import cached_property
from pathlib import Path

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
ROLES = {"user": "user", "assistant": "model"}


class Tokenizer:
    """A tokenizer.json, with control tokens as ids only: text that spells one is encoded as plain text."""

    def __init__(self, path: str | Path):
        """Reads tokenizer.json in the folder `path`; raises ValueError where it is missing, broken, or has no
        Gemma chat turns.
        """
        from tokenizers import Tokenizer as Backend  # 60 ms that --help need not pay

        file = Path(path) / "tokenizer.json"
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
        self.backend.encode_special_tokens = (
            True  # "<bos>" typed by a user is five letters and brackets, never the id
        )
        names = {
            "bos_id": "<bos>",
            "eos_id": "<eos>",
            "pad_id": "<pad>",
            "start_of_turn_id": START_OF_TURN,
            "end_of_turn_id": END_OF_TURN,
        }
        missing = [name for name in names.values() if self.backend.token_to_id(name) is None]
        if missing:
            raise ValueError(
                f"{file}: has no {', '.join(missing)}; Loupe needs the tokenizer of a Gemma 3 model"
            )
        found = [self.backend.token_to_id(name) for name in names.values()]
        ids = [id for id in found if id is not None]  # None was refused above
        self.bos_id, self.eos_id, self.pad_id, self.start_of_turn_id, self.end_of_turn_id = ids
        typed = [name for name in names.values() if self.backend.token_to_id(name) in self.encode(name)]
        if typed:
            raise ValueError(
                f"{file}: {', '.join(typed)} typed by a user would become a control token; "
                'set "special": true for it in added_tokens'
            )
        self.stop_ids = frozenset((self.eos_id, self.end_of_turn_id)) | _generation_stops(
            file.with_name("generation_config.json")
        )

    @cached_property
    def vocab_size(self) -> int:
        """The highest id, plus one; a fifth of a second for Gemma's 262,144 words."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no <bos>, no control ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; control ids (start and end of turn, <bos>, ...) leave no trace."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Returns the vocabulary entry of an id as tokenizer.json spells it, where "\u2581" stands for a
        space.
        """
        return self.backend.id_to_token(token)

    def render_turns(self, messages) -> list[tuple[list[int], bool]]:
        """A conversation as pieces (ids, is a response) in order, without <bos>; the response's <end_of_turn>
        belongs to the response.

        `messages` are (role, content) pairs: a system turn, if any, first (it is put before the first user's
        text), then user and assistant in turn. User's and assistant's content is stripped and the system's is
        not, as in Gemma's published template.
        """
        return self.render_batch([messages])[0]

    def render_batch(self, conversations) -> list[list[tuple[list[int], bool]]]:
        """render_turns of many conversations: all their texts are tokenised at once, in parallel."""
        parts = [self._parts(messages) for messages in conversations]
        texts = list(
            {part for pieces in parts for piece, _ in pieces for part in piece if isinstance(part, str)}
        )
        ids = dict(zip(texts, self.encode_batch(texts), strict=True))
        return [
            [
                ([i for part in piece for i in ids.get(part, (part,))], is_response)
                for piece, is_response in pieces
            ]
            for pieces in parts
        ]

    def _parts(self, messages) -> list[tuple[list[str | int], bool]]:
        """The pieces of render_turns as texts and control ids."""
        pieces, system = [], ""
        for role, content in messages:
            if role == "system":
                system = content + "\n\n"
            elif role == "user":
                pieces.append(
                    (
                        [
                            self.start_of_turn_id,
                            f"{ROLES[role]}\n{system}{content.strip()}",
                            self.end_of_turn_id,
                            "\n",
                        ],
                        False,
                    )
                )
                system = ""
            else:
                pieces.append(([self.start_of_turn_id, ROLES[role] + "\n"], False))
                pieces.append(([content.strip(), self.end_of_turn_id], True))
                pieces.append((["\n"], False))
        return pieces

    def render_prompt(self, messages) -> list[int]:
        """<bos>, the conversation so far, and the opening of the model's turn: what a response is generated
        from.
        """
        ids = [i for piece, _ in self.render_turns(messages) for i in piece]
        return [self.bos_id, *ids, self.start_of_turn_id] + self.encode(ROLES["assistant"] + "\n")


class TextStream:
    """Turns ids that arrive one by one into text that never ends inside a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.done = tokenizer, [], 0

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character's bytes are still arriving."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(
            "\ufffd"
        ):  # byte-fallback tokens of an unfinished character decode to replacement marks
            return ""
        new, self.done = text[self.done :], len(text)
        return new

    def flush(self) -> str:
        """What was held back, if generation stopped inside a character."""
        text = self.tokenizer.decode(self.ids)
        new, self.done = text[self.done :], len(text)
        return new


def _generation_stops(path: Path) -> set[int]:
    """The eos_token_id entries of generation_config.json, where there is one."""
    if not path.is_file():
        return set()
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        ids = ids if isinstance(ids, list) else [ids]
        if all(isinstance(i, int) for i in ids):
            return set(ids)
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(
        f'{path}: not a generation_config.json with "eos_token_id" (an id or a list of ids); '
        "repair it, or remove it"
    )
