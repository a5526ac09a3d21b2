"""Turns rows into Samples. A row is one of

    {"prompt", "response"}                     each is a string or a list of messages; responses within a
                                               prompt are not supervised
    {"instruction", "input", "output"}         the prompt is instruction, blank line, input
    {"messages": [{"role", "content"}, ...]}   [system,] user, assistant, user, assistant, ...; a response
                                               of "weight" 0 is not supervised
    {"text"}                                   raw text, for pretraining
    {"prompt", "chosen", "rejected"}           a better and a worse answer; each of the three is a string or a
                                               list of messages, and "prompt" may be left out if the two begin
                                               with the same messages or the same words

Other names: "conversations", "from" and "value" (ShareGPT's), "completion" and "output" for a response,
"context" for an input. All but raw text may have "system", a message before the first turn, and "history", a
list of [user, assistant] pairs.

A key that would change what is learnt and that has no place here (tools, images, ...) is an error. METADATA
is ignored, and other keys that are not used are reported once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import closest
from common.progress import warn
from data.turns import Messages, Turn, read_turns, spelled_turns, string_faults, type_name, without_marks

ROW_SHAPES = (
    '{"prompt", "response"}, {"instruction", "input", "output"}, {"messages"}, {"conversations"}, {"text"} '
    'or {"prompt", "chosen", "rejected"}; data.columns names other keys, such as "prompt=question"'
)
PREFERENCE, TURNS, TEXT = ("chosen", "rejected"), ("messages", "conversations"), ("text",)
PROMPTS, RESPONSES = ("prompt", "instruction"), ("response", "completion", "output")
PAIR = (*PROMPTS, *RESPONSES)
SHAPES: tuple[tuple[str, ...], ...] = (PREFERENCE, TURNS, PAIR, TEXT)
INPUTS, HEAD = ("input", "context"), ("system", "system_prompt", "history")
COLUMNS = ("prompt", "response", "input", "system", "history", "messages", "text", "chosen", "rejected")
METADATA = set(
    "id idx index uid uuid guid category source dataset lang language topic tags license url title date "
    "created timestamp split meta metadata model".split()
)
# Loupe trains on text alone. Without these the rows would teach something else.
LOST = (
    "tools functions tool_calls function_call tool_call_id reasoning_content thinking "
    "image images audio audios video videos".split()
)
OF_A_TURN = {"role", "content", "from", "value", "weight", "train", *METADATA}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
EMPTY: tuple[Any, ...] = (None, "", [], {})

SPELLED = "spell turns as text and are read as messages"
MARKED = "have control tokens as text around a turn, which rendering adds; they are left out"
LOST_REMEDY = "remove these rows, or write what counts into the text and remove the keys"
LABELLED_TEXT = (
    'a "text" with a "label": set data.columns = ["prompt=text", "response=label"] to learn the label, '
    'or data.columns = ["text=text"] to learn the text'
)
KTO = (
    '"label" says whether the answer is a good one (KTO): keep the rows where it is true, without the key, '
    'or pair them as "chosen" and "rejected"'
)

# A row without a response is an error, or gets the response ""; or the responses of all rows are ignored.
Response = Literal["required", "optional", "ignored"]


@dataclass(frozen=True)
class Sample:
    """One row of a file: either a conversation (`messages`) or raw text (`text`). The other field is None.

    A preference row has a worse answer than the last message in `rejected`.
    """

    id: str  # "train.jsonl:12" is a line, "train.json:[11]" an element of an array
    messages: Messages | None = None
    text: str | None = None
    rejected: str | None = None
    unsupervised: tuple[int, ...] = ()  # indices of responses in `messages` that get no labels


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Returns {our key: the rows' key} of texts such as "prompt=question"; ValueError lists wrong ones."""
    pairs = [(ours.strip(), theirs.strip()) for ours, _, theirs in (text.partition("=") for text in columns)]
    wrong = [
        f"{ours!r} is no key of rows{closest(ours, COLUMNS)}" for ours, _ in pairs if ours not in COLUMNS
    ]
    wrong += [
        f"{ours!r} has no key of the rows; write prompt=question" for ours, theirs in pairs if not theirs
    ]
    for names in zip(*pairs, strict=True):
        wrong += [f"{name!r} is named twice" for name, count in Counter(names).items() if count > 1]
    if wrong:
        raise ValueError(f"data.columns = {list(columns)!r}: {'; '.join(wrong)}")
    return dict(pairs)


class RowReader:
    """Turns rows into Samples, and counts the keys that are not used and what is read in another way."""

    def __init__(self, response: Response, columns: Mapping[str, str]):
        self.response, self.columns = response, columns
        self.unused: Counter[str] = Counter()
        self.notes: dict[str, list[str]] = {}  # what was done -> ids of the rows

    def report(self) -> None:
        """Prints what the rows have that is not used, and what was read in another way, as warnings."""
        if self.unused:
            keys = ", ".join(f'"{key}" ({n} times)' for key, n in self.unused.most_common(20))
            more = f" and {len(self.unused) - 20} more" if len(self.unused) > 20 else ""
            warn(f"keys of the rows that are not used: {keys}{more}")
        for note, ids in self.notes.items():
            warn(f"{len(ids)} rows {note}; the first is {ids[0]}")

    def sample(self, row_id: str, row: Any) -> tuple[Sample | None, list[str]]:
        """Returns (Sample, []) or (None, faults of the row)."""
        if not isinstance(row, dict):
            return None, [f"a row must be an object, not {type_name(row)}"]
        row = self._named(row)
        if self.response == "ignored" and row.get("prompt", row.get("instruction")) is not None:
            row = {key: value for key, value in row.items() if key not in (*RESPONSES, *PREFERENCE)}
        has = [shape for shape in SHAPES if any(row.get(key) is not None for key in shape)]
        named = [shape for shape in has if set(shape) & set(self.columns)]
        shape = next(iter(named or has), ())
        if lost := _lost(row):
            return None, [f"{', '.join(lost)} would be lost: Loupe trains on text alone; {LOST_REMEDY}"]
        if not shape:
            keys = ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"
            return None, [f"unknown row, its keys are: {keys}; expected {ROW_SHAPES}"]
        if faults := self._count_unused(row, shape):
            return None, faults
        if shape is TEXT and self.response == "ignored":
            row, shape = {"prompt": row["text"]}, PAIR
        read = {PREFERENCE: self._preference, TURNS: self._turns, TEXT: self._text}.get(shape, self._pair)
        return read(row_id, row)

    def _named(self, row: dict) -> dict:
        """Returns the row with the keys of data.columns under our names."""
        named = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        rest = {key: value for key, value in row.items() if key not in self.columns.values()}
        self.unused.update(key for key in named if key in rest)
        return rest | named

    def _count_unused(self, row: dict, shape: tuple[str, ...]) -> list[str]:
        """Counts the keys that a row of this shape does not use; returns faults for those that matter."""
        used = {*shape, *(HEAD if shape is not TEXT else ()), *(PROMPTS if shape is PREFERENCE else ())}
        used |= set(INPUTS) if shape is PAIR else set()
        used |= METADATA
        left = [
            k for k, value in row.items() if k not in used and not k.endswith("_id") and value not in EMPTY
        ]
        # Who names the text's own key in data.columns has said what the others are worth.
        asked = set(shape) & set(self.columns)
        matters = [key for key in left if key in (*INPUTS, *HEAD) and not asked]
        faults = [f'"{key}" would change what is learnt, and has no place in this row' for key in matters]
        if shape is TEXT and "label" in left and not asked and self.response != "ignored":
            faults = [LABELLED_TEXT]
        if isinstance(row.get("label"), bool) and shape is PAIR:
            faults = [KTO]
        if not faults:
            turns = [(name, key) for name, _, turn in _messages(row) for key in turn.keys() - OF_A_TURN]
            self.unused.update(left)
            self.unused.update(f"{name}[].{key}" for name, key in turns)
        return faults

    def _text(self, row_id, row):
        if faults := string_faults(row, "text", empty="empty text"):
            return None, faults
        if turns := spelled_turns(row["text"]):
            self._note(SPELLED, row_id)
            return self._finish(row_id, [Turn(*turn) for turn in turns])
        text = self._unmarked(row_id, row["text"])
        return (Sample(row_id, text=text), []) if text.strip() else (None, ['empty text ("text")'])

    def _turns(self, row_id, row):
        key = next(key for key in TURNS if row.get(key) is not None)
        head, faults = _head(row)
        turns, found = read_turns(row[key], key)
        return (None, faults + found) if faults + found else self._finish(row_id, head + turns)

    def _pair(self, row_id, row):
        prompts, responses = (_present(row, keys) for keys in (PROMPTS, RESPONSES))
        for ours, keys in (("prompt", prompts), ("response", responses)):
            if len(keys) > 1:
                names, remedy = " and ".join(f'"{key}"' for key in keys), f'["{ours}={keys[0]}"]'
                return None, [f"the row has {names}; say which one counts: data.columns = {remedy}"]
        prompt = (prompts or ["instruction" if responses == ["output"] else "prompt"])[0]
        response = (responses or ["output" if prompt == "instruction" else "response"])[0]
        head, faults = _head(row)
        inputs = [key for key in INPUTS if row.get(key) not in (None, "")]
        faults += [fault for key in inputs for fault in string_faults(row, key)]
        if inputs and isinstance(row.get(prompt), list):
            faults.append(f'"{inputs[0]}" has no place beside a prompt of messages; add it to one of them')
        asked, found = self._half(row, prompt, "user")
        faults += found
        answered = []
        if responses or self.response == "required":
            answered, found = self._half(row, response, "assistant")
            faults += found
        if faults:
            return None, faults
        if inputs:
            texts = [asked[0].content, *(row[key] for key in inputs)]
            asked = [Turn("user", "\n\n".join(texts))]
        return self._finish(row_id, head + self._joined(row_id, asked, answered))

    def _half(self, row, key, role):
        """Returns (the turns of a prompt or a response, faults)."""
        if isinstance(row.get(key), list) and row[key]:
            return read_turns(row[key], key)
        empty = "empty response" if role == "assistant" else None
        faults = string_faults(row, key, empty)
        if faults and key not in row and key in self.columns:
            faults = [f'{faults[0]} (data.columns: it is called "{self.columns[key]}")']
        return ([] if faults else [Turn(role, row[key])]), faults

    def _joined(self, row_id, asked, answered):
        """Returns the turns of a prompt and its answer. Those that the prompt spells as text are read."""
        if len(asked) == 1 and len(answered) < 2:
            spelled = spelled_turns(asked[0].content, "".join(turn.content for turn in answered))
            if spelled:
                self._note(SPELLED, row_id)
                *context, last = [Turn(*turn) for turn in spelled]
                return [*(turn._replace(supervised=False) for turn in context), last]
        return [turn._replace(supervised=False) for turn in asked] + answered

    def _preference(self, row_id, row):
        """Returns (Sample with a rejected answer, []) or (None, faults); the rows are TRL's."""
        if missing := [key for key in PREFERENCE if key not in row]:
            return None, [f'missing key "{missing[0]}"']
        prompt, answers = row.get("prompt", row.get("instruction")), [row["chosen"], row["rejected"]]
        if prompt is None and all(isinstance(answer, str) for answer in answers):
            prompt, *answers = _split_common_start(*answers)
            if not prompt:
                return None, [
                    '"chosen" and "rejected" do not begin with the same words; add the key "prompt"'
                ]
        read, (head, faults) = [], _head(row)
        for key, answer in zip(PREFERENCE, answers, strict=True):
            turns, found = self._answered(row_id, prompt, answer)
            sample, found = (None, found) if found else self._finish(row_id, head + turns)
            read.append(sample)
            faults += [f'"{key}": {fault}' for fault in found]
        if faults:
            return None, faults
        chosen, rejected = read
        # The chat template strips each turn.
        better, worse = ([(role, text.strip()) for role, text in sample.messages] for sample in read)
        if better[:-1] != worse[:-1]:
            return None, [
                '"chosen" and "rejected" differ before their last answer; they must share the prompt'
            ]
        if better == worse:
            return None, ['"chosen" and "rejected" are the same answer']
        if self.response == "ignored":
            return chosen, []
        last = rejected.messages[-1][1]
        return Sample(row_id, messages=chosen.messages, rejected=last, unsupervised=chosen.unsupervised), []

    def _answered(self, row_id, prompt, answer):
        """Returns (turns that end with the answer, []) or ([], faults)."""
        for name, value in (("the prompt", prompt or ""), ("the answer", answer)):
            if not isinstance(value, (str, list)):
                return [], [f"{name} must be a string or a list of messages, not {type_name(value)}"]
        row = {"prompt": prompt or [], "answer": answer}
        asked, faults = self._half(row, "prompt", "user") if prompt else ([], [])
        answered, found = self._half(row, "answer", "assistant")
        return ([], faults + found) if faults + found else (self._joined(row_id, asked, answered), [])

    def _finish(self, row_id: str, turns: Sequence[Turn]) -> tuple[Sample | None, list[str]]:
        """Returns (Sample of a conversation, []) or (None, faults)."""
        turns = [turn._replace(content=self._unmarked(row_id, turn.content)) for turn in turns]
        roles = [turn.role for turn in turns]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        is_open = self.response != "required" and spoken[-1:] == ["user"]
        if not spoken or [*spoken, *["assistant"] * is_open] != ["user", "assistant"] * (
            (len(spoken) + 1) // 2
        ):
            expected = "an optional system, then user and assistant in turn, ending with assistant"
            return None, [f"roles must be {expected}; got {', '.join(roles) or 'none'}"]
        if any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
            return None, ["empty response"]
        if self.response == "ignored":
            turns = turns if is_open else turns[:-1]
            if not turns[-1].content.strip():
                return None, ["the prompt is empty"]
        elif is_open:
            turns.append(Turn("assistant", ""))
        unsupervised = [i for i, t in enumerate(turns) if t.role == "assistant" and not t.supervised]
        return Sample(row_id, tuple(turn[:2] for turn in turns), unsupervised=tuple(unsupervised)), []

    def _unmarked(self, row_id: str, text: str) -> str:
        plain = without_marks(text)
        if plain is not text:
            self._note(MARKED, row_id)
        return plain

    def _note(self, note: str, row_id: str) -> None:
        ids = self.notes.setdefault(note, [])
        if row_id not in ids[-1:]:
            ids.append(row_id)


def _present(row, keys):
    """Returns those of the keys that are not null, or else the first one that is."""
    found = [key for key in keys if key in row]
    return [key for key in found if row[key] is not None] or found[:1]


def _messages(row: dict) -> Iterator[tuple[str, int, dict]]:
    """Yields (key, index, message) for each list of messages in a row."""
    for name in (*TURNS, *PAIR, *PREFERENCE):
        if isinstance(row.get(name), list):
            yield from ((name, i, turn) for i, turn in enumerate(row[name]) if isinstance(turn, dict))


def _lost(row: dict) -> list[str]:
    """Returns what a row has that text cannot hold: keys of LOST, roles of tools, and the row's weight."""
    found = [f'"{key}"' for key in LOST if row.get(key) not in EMPTY]
    found += ['"weight" of the whole row'] if row.get("weight") not in (None, "", "1", 1) else []
    for name, i, turn in _messages(row):
        found += [f'"{key}" of {name}[{i}]' for key in LOST if turn.get(key) not in EMPTY]
        role, content = turn.get("role", turn.get("from")), turn.get("content")
        found += [f'role "{role}" of {name}[{i}]'] if role in TOOL_ROLES else []
        parts = [p.get("type") for p in content if isinstance(p, dict)] if isinstance(content, list) else []
        found += [f'part "{kind}" of {name}[{i}]' for kind in parts if kind != "text"]
    return found


def _head(row: dict) -> tuple[list[Turn], list[str]]:
    """Returns (the turns of "system" and "history", faults)."""
    systems = [key for key in HEAD[:2] if row.get(key) not in (None, "")]
    faults = [fault for key in systems for fault in string_faults(row, key)]
    turns = [Turn("system", row[key]) for key in systems]
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return [], [
                *faults,
                f'"history" must be a list of [user, assistant] pairs of texts, not {type_name(history)}',
            ]
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns, faults


def _split_common_start(chosen, rejected):
    """Returns (prompt, chosen, rejected): the words that both texts begin with, and their other words."""
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    length = max(chosen.rfind(blank, 0, length) for blank in " \n\t") + 1
    return chosen[:length].rstrip(), chosen[length:], rejected[length:]
