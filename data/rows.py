"""Reads training files into Samples. Faulty rows of all files are collected into one error.

A file is a JSON array or JSONL, in UTF-8. A row is one of

    {"prompt", "response"}
    {"instruction", "input", "output"}         the prompt is instruction, blank line, input; input is optional
    {"messages": [{"role", "content"}, ...]}   [system,] user, assistant, user, assistant, ...
    {"text"}                                   raw text, for pretraining
    {"prompt", "chosen", "rejected"}           a better and a worse answer; each of the three is a string or a
                                               list of messages, and "prompt" may be left out if the two begin
                                               with the same messages or the same words

Other keys of a row are ignored. In a file of prompts (read_prompts) the rows need no response, and a .txt
file has one prompt a line.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import listed

ROW_SHAPES = (
    '{"prompt", "response"}, {"instruction", "input", "output"}, {"messages"}, {"text"} '
    'or {"prompt", "chosen", "rejected"}'
)
BLANKS = re.compile(r"[ \t\n\r]*")  # JSON allows these between values.
TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}

Messages = tuple[tuple[str, str], ...]  # (role, content) pairs; a role is system, user or assistant.


@dataclass(frozen=True)
class Sample:
    """One row of a file: either a conversation (`messages`) or raw text (`text`). The other field is None.

    A preference row has a worse answer than the last message in `rejected`.
    """

    id: str  # "train.jsonl:12" is a line, "train.json:[11]" an element of an array
    messages: Messages | None = None
    text: str | None = None
    rejected: str | None = None


def read_samples(
    paths: str | Path | Sequence[str | Path],
    format: str = "auto",
    on_bad: str = "error",
    needs_response: bool = True,
) -> tuple[list[Sample], list[str]]:
    """Reads files; returns their samples in order, and an error message for each row that was skipped.

    Args:
        paths: one path or several.
        format: "json" (one array), "jsonl" (one row a line), or "auto": an array if the file starts with "[".
        on_bad: "error" raises for a bad row, "skip" leaves it out.
        needs_response: if False, a row may lack its response, which is then "".

    Raises:
        ValueError: lists every problem of every file. Even with "skip" it is raised if a file as a whole
            cannot be read, or if there is no sample.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    parse = _sample if needs_response else _sample_or_prompt
    return _read_files([Path(p) for p in paths], format, on_bad, parse)


def read_prompts(path: str | Path) -> list[Sample]:
    """Returns the prompts of a file as Samples whose last message is the user's.

    The rows are those of training; a response at the end of a row is ignored and may be missing. In a .txt
    file each line is a user's message, and so is the text of a {"text"} row.

    Raises:
        ValueError: lists every problem of the file.
    """
    format = "txt" if Path(path).suffix == ".txt" else "auto"
    return _read_files([Path(path)], format, "error", _prompt)[0]


def _read_files(paths, format, on_bad, parse):
    names = [p.name for p in paths]
    samples, problems, unreadable = [], [], []
    for path, name in zip(paths, names, strict=True):
        # Ids stay unique when two folders hold a train.jsonl.
        label = name if names.count(name) == 1 else str(path)
        try:
            _read_file(path, label, format, parse, samples, problems)
        except _UnreadableFile as error:
            unreadable.append(f"{label}:{error}")
    if unreadable or (problems and on_bad == "error"):
        raise ValueError(_summary(unreadable + problems, remedy=not unreadable and parse is not _prompt))
    if not samples:
        nothing = f"no sample in {', '.join(names) or 'an empty list of files'}"
        raise ValueError(_summary([nothing, *problems], remedy=False))
    return samples, problems


class _UnreadableFile(Exception):
    """No row of a file can be used. The message is the part of the error after "FILE:"."""


def _read_file(path, label, format, parse, samples, problems):
    """Adds a file's samples and problems to two lists; parse(id, row) returns (Sample or None, faults)."""
    text = _read_text(path)
    if not text.strip():
        problems.append(f"{label}:1: the file is empty")
        return
    is_array = format == "json" or (format == "auto" and text.lstrip()[0] == "[")
    rows = _lines if format == "txt" else _array_rows if is_array else _jsonl_rows
    for row_id, line, row, error in rows(text, label):
        sample, faults = (None, [error]) if error else parse(row_id, row)
        if faults:
            element = f"element {row_id.removeprefix(label + ':')}: " if is_array else ""
            problems.append(f"{label}:{line}: {element}{'; '.join(faults)}")
        else:
            samples.append(sample)


def _read_text(path):
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _UnreadableFile(f" cannot be read: {error.strerror} ({path})") from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _UnreadableFile("1: the file is UTF-16; save it as UTF-8")
    # surrogateescape turns a bad byte into a lone surrogate, so it spoils one row and not the whole file.
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _lines(text, label):
    """Yields (id, line number, {"text": line}, error or None) for each line that is not blank."""
    # str.splitlines would also split at U+2028 and U+0085, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip("\r\ufeff \t")  # Files joined with `cat` have a BOM in the middle.
        if line:
            yield f"{label}:{number}", number, {"text": line}, _bad_bytes(line)


def _jsonl_rows(text, label):
    """Yields (id, line number, row, error or None) for each line of JSONL that is not blank."""
    decoder, repeated = _decoder()
    for row_id, number, line, error in _lines(text, label):
        row = None
        try:
            row = decoder.decode(line["text"])
        except (ValueError, RecursionError) as e:
            error = error or f"not JSON: {_json_fault(e)} at column {getattr(e, 'colno', 1)}"
        yield row_id, number, row, error or _repeated_keys(repeated)


def _array_rows(text, label):
    """Yields (id, line number, row, error or None) for each element; json.loads would not give its line."""
    decoder, repeated = _decoder()
    line, counted, index = 1, 0, 0
    try:
        separator, position = _separator(text, 0, "[")
        if text[position : position + 1] == "]":
            separator, position = _separator(text, position, "]")
        while separator != "]":
            line, counted = line + text.count("\n", counted, position), position
            row, end = decoder.raw_decode(text, position)
            error = _bad_bytes(text[position:end]) or _repeated_keys(repeated)
            yield f"{label}:[{index}]", line, row, error
            index += 1
            separator, position = _separator(text, end, ",]")
        if position != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, position)
    except (ValueError, RecursionError) as e:
        raise _UnreadableFile(
            f"{getattr(e, 'lineno', line)}: not JSON: {_json_fault(e)}, after {index} whole element(s); "
            "repair the file or write it as JSONL"
        ) from None


def _decoder():
    """Returns a JSON decoder, and a list to which it adds each key that an object has twice."""
    repeated = []

    def make_object(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in found if keys.count(key) > 1)
        return found

    # Without the hook, json keeps the last value of such a key and raises no error.
    return json.JSONDecoder(object_pairs_hook=make_object), repeated


def _repeated_keys(repeated):
    """Returns an error message that names the keys in the list, or None if it is empty; empties the list."""
    keys = ", ".join(f'"{key}"' for key in repeated)
    repeated.clear()
    return f"the same key twice in one object: {keys}" if keys else None


def _json_fault(error):
    """Returns json's error message, or our own for a RecursionError or a number of over 4,300 digits."""
    return getattr(error, "msg", "nested too deeply, or an endless number")


def _separator(text, position, allowed):
    """Skips blanks; returns the separator that follows, and the position of the next value."""
    position = BLANKS.match(text, position).end()
    found = text[position : position + 1]
    if not found or found not in allowed:
        raise json.JSONDecodeError(f"Expecting {' or '.join(allowed)}", text, position)
    return found, BLANKS.match(text, position + 1).end()


def _bad_bytes(text):
    """Returns an error message for the first byte that is not UTF-8 (now a surrogate in `text`), or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return f"not UTF-8: byte 0x{ord(text[e.start]) - 0xDC00:02x} at character {e.start + 1}"
    return None


def _sample(row_id, row):
    """Returns (Sample, []) or (None, faults of the row)."""
    if not isinstance(row, dict):
        return None, [f"a row must be an object, not {_type_name(row)}"]
    if "chosen" in row or "rejected" in row:
        return _from_preference(row_id, row)
    if "messages" in row:
        messages, faults = _from_messages(row["messages"])
    elif "prompt" in row or "response" in row:
        messages, faults = _from_pair(row, "prompt", "response")
    elif "instruction" in row or "output" in row:
        messages, faults = _from_pair(row, "instruction", "output")
        if row.get("input") not in (None, "") and not faults:
            faults = _string_faults(row, "input")
            messages = faults or (("user", f"{row['instruction']}\n\n{row['input']}"), messages[1])
    elif "text" in row:
        faults = _string_faults(row, "text", empty="empty text")
        return (None, faults) if faults else (Sample(row_id, text=row["text"]), [])
    else:
        keys = ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"
        return None, [f"unknown row, its keys are: {keys}; expected {ROW_SHAPES}"]
    return (None, faults) if faults else (Sample(row_id, messages=messages), [])


def _sample_or_prompt(row_id, row):
    """Returns what _sample returns; a row without a response gets the response ""."""
    found = _sample(row_id, row)
    if found[0] is None and isinstance(row, dict) and not {"response", "output", "chosen", "text"} & set(row):
        sample, faults = _prompt(row_id, row)
        if not faults and row.get("messages", [{}])[-1].get("role") != "assistant":
            return Sample(row_id, (*sample.messages, ("assistant", ""))), []
    return found


def _prompt(row_id, row):
    """Returns (Sample that ends with its last user turn, []) or (None, faults); needs no response."""
    if isinstance(row, dict):
        if "messages" in row:
            turns = row["messages"]
            last = turns[-1] if isinstance(turns, list) and turns else None
            if isinstance(last, dict) and last.get("role") == "user":
                row = {"messages": [*turns, {"role": "assistant", "content": "..."}]}
        elif "prompt" in row or "text" in row:
            row = {"prompt": row.get("prompt", row.get("text")), "response": "..."}
        elif "instruction" in row:
            row = row | {"output": "..."}
    sample, faults = _sample(row_id, row)
    if faults:
        return None, faults
    if not sample.messages[-2][1].strip():
        return None, ["the prompt is empty"]
    return Sample(row_id, sample.messages[:-1]), []


def _from_pair(row, prompt, response):
    faults = _string_faults(row, prompt) + _string_faults(row, response, empty="empty response")
    return faults or (("user", row[prompt]), ("assistant", row[response])), faults


def _from_preference(row_id, row):
    """Returns (Sample with a rejected answer, []) or (None, faults); the rows are those that TRL takes."""
    if missing := [key for key in ("chosen", "rejected") if key not in row]:
        return None, [f'missing key "{missing[0]}"']
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    if prompt is None and all(isinstance(answer, str) for answer in answers):
        prompt, *answers = _split_common_start(*answers)
        if not prompt:
            return None, ['"chosen" and "rejected" do not begin with the same words; add the key "prompt"']
    read, faults = [], []
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        turns, found = _preference_turns(prompt, answer)
        read.append(turns)
        faults += [f'"{key}": {fault}' for fault in found]
    if faults:
        return None, faults
    chosen, rejected = read
    # The chat template strips each turn.
    better, worse = ([(role, text.strip()) for role, text in turns] for turns in read)
    if better[:-1] != worse[:-1]:
        return None, ['"chosen" and "rejected" differ before their last answer; they must share the prompt']
    if better == worse:
        return None, ['"chosen" and "rejected" are the same answer']
    return Sample(row_id, messages=chosen, rejected=rejected[-1][1]), []


def _preference_turns(prompt, answer):
    """Returns (messages that end with the answer, []) or (None, faults)."""
    for name, value in (("the prompt", prompt or ""), ("the answer", answer)):
        if not isinstance(value, (str, list)):
            return None, [f"{name} must be a string or a list of messages, not {_type_name(value)}"]
    head = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    tail = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return _from_messages([*head, *tail])


def _split_common_start(chosen, rejected):
    """Returns (prompt, chosen, rejected): the words that both texts begin with, and their other words."""
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    length = max(chosen.rfind(blank, 0, length) for blank in " \n\t") + 1
    return chosen[:length].rstrip(), chosen[length:], rejected[length:]


def _from_messages(turns):
    if not isinstance(turns, list) or not turns:
        return None, [f'"messages" must be a list of turns, not {_type_name(turns)}']
    faults = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            faults.append(f"messages[{number}] must be an object, not {_type_name(turn)}")
            continue
        empty = "empty response" if turn.get("role") == "assistant" else None
        found = _string_faults(turn, "role") + _string_faults(turn, "content", empty)
        faults += [f"messages[{number}]: {fault}" for fault in found]
    if faults:
        return None, faults
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        expected = "an optional system, then user and assistant in turn, ending with assistant"
        return None, [f"roles must be {expected}; got {', '.join(roles)}"]
    return tuple((turn["role"], turn["content"]) for turn in turns), []


def _string_faults(row, key, empty=None):
    """Returns the faults of the string row[key]; if `empty` is given, it is the fault of a blank string."""
    if key not in row:
        return [f'missing key "{key}"']
    value = row[key]
    if not isinstance(value, str):
        return [f'"{key}" must be a string, not {_type_name(value)}']
    if empty and not value.strip():  # The chat template strips each turn, so a blank one is empty.
        return [f'{empty} ("{key}")']
    if _bad_bytes(value):
        return [f'"{key}" has half a surrogate pair (\\ud800 to \\udfff), which is no character']
    return []


def _type_name(value):
    if value is None:
        return "null"
    name = TYPE_NAMES.get(type(value), "a number")
    if isinstance(value, (list, str, dict)) and not value:
        return f"an empty {name.split()[1]}"
    return f"{name} ({json.dumps(value)[:40]})"


def _summary(problems, remedy):
    head = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:"
    skip = 'Repair these rows, or let training leave them out with data.on_bad = "skip".'
    return listed(head, problems, skip if remedy else "")
