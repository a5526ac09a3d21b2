"""Reads the turns of a conversation: lists of messages, and Gemma's chat format that a row spells as text.

The latter would be wrapped in turns a second time.
"""

import json
import re
from typing import Any, NamedTuple

from common.control_tokens import CONTROL_TOKENS, END_OF_TURN, START_OF_TURN
from data.files import bad_bytes

GEMMA = {"user": "user", "model": "assistant"}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}
TURN = re.compile(rf"{START_OF_TURN}(user|model)\n(.*?){END_OF_TURN}\s*", re.S)
HEADERS = tuple(f"{START_OF_TURN}{role}\n" for role in GEMMA)
BOS, EOS, *_ = CONTROL_TOKENS

Messages = tuple[tuple[str, str], ...]  # (role, content) pairs; a role is system, user or assistant


class Turn(NamedTuple):
    role: str
    content: str
    supervised: bool = True


def spelled_turns(prompt: str, response: str = "") -> Messages | None:
    """Returns the messages that prompt and response spell together; None if they are not turns throughout.

    The headers of the last turn may stand in either text or be missing, and so may its end.
    """
    prompt, response = prompt.strip().removeprefix(BOS).lstrip(), response.strip()
    if not prompt.startswith(HEADERS):
        return None
    if response and not prompt.endswith(HEADERS[1].strip()) and not response.startswith(HEADERS[1]):
        prompt += f"\n{HEADERS[1]}"
    text = f"{prompt}\n{response}".strip().removesuffix(EOS).rstrip()
    text += "" if text.endswith(END_OF_TURN) else f"\n{END_OF_TURN}"
    turns, position = [], 0
    while match := TURN.match(text, position):
        turns.append((GEMMA[match[1]], match[2].strip()))
        position = match.end()
    whole = position == len(text) and not any(START_OF_TURN in content for _, content in turns)
    if whole and not response and turns[-1] == ("assistant", ""):
        turns.pop()
    return tuple(turns) if whole else None


def without_marks(text: str) -> str:
    """Returns a text without the control tokens that rendering adds around it; any other text as it is."""
    found = text.strip().removeprefix(BOS).lstrip()
    for header in HEADERS:
        found = found.removeprefix(header)
    while found.endswith((END_OF_TURN, EOS)):
        found = found.removesuffix(EOS).removesuffix(END_OF_TURN).rstrip()
    return text if found == text.strip() else found


def read_turns(turns: Any, key: str) -> tuple[list[Turn], list[str]]:
    """Returns (the turns of a list of messages, faults); `key` is that of the list in the row."""
    if not isinstance(turns, list) or not turns:
        return [], [f'"{key}" must be a list of turns, not {type_name(turns)}']
    read, faults = list[Turn](), list[str]()
    for number, turn in enumerate(turns):
        where = f"{key}[{number}]"
        if not isinstance(turn, dict):
            faults.append(f"{where} must be an object, not {type_name(turn)}")
            continue
        role, content = ("from" if "from" in turn else "role"), ("value" if "value" in turn else "content")
        turn = turn | {content: _joined_parts(turn[content])} if content in turn else turn
        found = string_faults(turn, role)
        name = "" if found else str(ROLES.get(turn[role], turn[role]))
        found += string_faults(turn, content, "empty response" if name == "assistant" else None)
        weight = turn.get("weight", turn.get("train"))
        if weight not in (None, 0, 1):
            found.append(f'"weight" must be 0 or 1, not {type_name(weight)}')
        faults += [f"{where}: {fault}" for fault in found]
        if not found:
            read.append(Turn(name, turn[content], weight != 0))
    return read, faults


def _joined_parts(content: Any) -> Any:
    """Returns the text of {"type": "text"} parts, each stripped as Gemma's template does; else `content`."""
    parts = content if isinstance(content, list) else []
    found = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text.strip() for text in found if isinstance(text, str)]
    return "".join(texts) if texts and len(texts) == len(parts) else content


def string_faults(row, key, empty=None):
    """Returns the faults of the string row[key]; if `empty` is given, it is the fault of a blank string."""
    if key not in row:
        return [f'missing key "{key}"']
    value = row[key]
    if not isinstance(value, str):
        return [f'"{key}" must be a string, not {type_name(value)}']
    if empty and not value.strip():  # The chat template strips each turn, so a blank one is empty.
        return [f'{empty} ("{key}")']
    if bad_bytes(value):
        return [f'"{key}" has half a surrogate pair (\\ud800 to \\udfff), which is no character']
    return []


def type_name(value):
    if value is None:
        return "null"
    name = TYPE_NAMES.get(type(value), "a number")
    if isinstance(value, (list, str, dict)) and not value:
        return f"an empty {name.split()[1]}"
    try:
        return f"{name} ({json.dumps(value, default=str)[:40]})"
    except (RecursionError, ValueError):
        return name
