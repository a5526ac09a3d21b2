"""Training files in, `Sample`s out; whatever is wrong in a file is collected first and told once.

A file is a JSON array or JSONL, in UTF-8. A row is one of

    {"prompt", "response"}
    {"instruction", "input", "output"}                     the prompt is instruction, blank line, input; input may be left out
    {"messages": [{"role", "content"}, ...]}               [system,] user, assistant, user, assistant, ...
    {"text"}                                               raw text, for pretraining

and may have other keys, which are ignored. A file of prompts, to be answered, needs no responses; as .txt it
is a prompt a line.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import listed

# The blanks that JSON allows between values.
WHITESPACE = re.compile(r"[ \t\n\r]*")
ROW_SHAPES = '{"prompt", "response"}, {"instruction", "input", "output"}, {"messages"} or {"text"}'


@dataclass(frozen=True)
class Sample:
    """One row: a conversation that ends with the assistant, or raw text; the other of the two is None."""

    id: str  # "train.jsonl:12" is a line, "train.json:[11]" an array's element
    messages: tuple[tuple[str, str], ...] | None = (
        None  # (role, content), role one of system, user, assistant
    )
    text: str | None = None


def read_samples(paths, format="auto", on_bad="error"):
    """Read the samples of one or several files, in order.

    Args:
        paths: a path or a list of paths.
        format: "json" (one array), "jsonl" (a row a line), or "auto": an array if the first character is "[".
        on_bad: what a bad row does: "error" stops, "skip" leaves the row out and counts it.

    Returns:
        (samples, problems): problems has one line of text a skipped row; it is empty under "error".

    Raises:
        ValueError: with every problem of every file; a file that is missing or unreadable as a whole, and a
        set with no sample left, are errors under "skip" too.
    """
    _check_choice("data.format", format, ("auto", "json", "jsonl"))
    _check_choice("data.on_bad", on_bad, ("error", "skip"))
    paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    return _read_files(paths, format, on_bad, _sample)


def read_prompts(path):
    """Read the prompts of a file, the rows that training takes but without their last response, or the lines
    of a .txt file.

    Returns:
        a list of Sample whose messages end with the user; the text of a {"text"} row or a line is the user's.

    Raises:
        ValueError: with every problem of the file.
    """
    return _read_files([Path(path)], "txt" if Path(path).suffix == ".txt" else "auto", "error", _prompt)[0]


def _read_files(paths, format, on_bad, parse):
    names = [p.name for p in paths]
    samples, problems, unreadable = [], [], []
    for path, name in zip(paths, names, strict=True):
        label = (
            name if names.count(name) == 1 else str(path)
        )  # ids stay unique when two folders hold a train.jsonl
        try:
            _read_file(path, label, format, samples, problems, parse)
        except _UnreadableFile as error:
            unreadable.append(f"{label}:{error}")
    if unreadable or (problems and on_bad == "error"):
        raise ValueError(_summary(unreadable + problems, remedy=not unreadable and parse is _sample))
    if not samples:
        raise ValueError(
            _summary(
                [f"no sample in {', '.join(names) or 'an empty list of files'}"] + problems, remedy=False
            )
        )
    return samples, problems


class _UnreadableFile(Exception):
    """The file as a whole is of no use; the text starts with the line number."""


def _read_file(path, label, format, samples, problems, parse):
    """Append the file's samples, as parse(id, row) makes them, and its problems to the two lists."""
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
    # surrogateescape keeps a bad byte as a lone surrogate, so that it spoils one row and not the whole file
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _lines(text, label):
    """Yield (id, line number, {"text"}, error text or None) for each line that is not blank."""
    # not str.splitlines: it also splits at U+2028 and U+0085, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip("\r\ufeff \t")  # files joined with `cat` carry a BOM in the middle
        if line:
            yield f"{label}:{number}", number, {"text": line}, _bad_bytes(line)


def _jsonl_rows(text, label):
    """Yield as _lines does, but the row that the line holds."""
    decoder, twice = _decoder()
    for row_id, number, line, error in _lines(text, label):
        row = None
        try:
            row = decoder.decode(line["text"])
        except (ValueError, RecursionError) as fault:
            error = error or f"not JSON: {_fault(fault)} at column {getattr(fault, 'colno', 1)}"
        yield row_id, number, row, error or _repeated(twice)


def _array_rows(text, label):
    """Yield as _jsonl_rows does, element by element, since json.loads would not say at which line an element
    stands.
    """
    decoder, twice = _decoder()
    line, counted, index = 1, 0, 0
    try:
        separator, position = _separator(text, 0, "[")
        if text[position : position + 1] == "]":
            separator, position = _separator(text, position, "]")
        while separator != "]":
            line, counted = line + text.count("\n", counted, position), position
            row, end = decoder.raw_decode(text, position)
            yield f"{label}:[{index}]", line, row, _bad_bytes(text[position:end]) or _repeated(twice)
            index += 1
            separator, position = _separator(text, end, ",]")
        if position != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, position)
    except (ValueError, RecursionError) as fault:
        where = getattr(fault, "lineno", line)
        raise _UnreadableFile(
            f"{where}: not JSON: {_fault(fault)}, after {index} whole element(s); repair the file or write "
            f"it as JSONL"
        ) from None


def _decoder():
    """A JSON decoder, and the list where it leaves each key that stands twice in one object: by itself, json
    keeps the last and says nothing.
    """
    twice = []

    def whole(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for key in found if keys.count(key) > 1)
        return found

    return json.JSONDecoder(object_pairs_hook=whole), twice


def _repeated(twice):
    """Say which keys stand twice in the row that was just decoded, and forget them; None where none does."""
    keys = ", ".join(f'"{key}"' for key in twice)
    twice.clear()
    return f"the same key twice in one object: {keys}" if keys else None


def _fault(fault):
    """What json's decoder says; it has no words for a RecursionError, nor for the plain ValueError of a
    number of over 4,300 digits.
    """
    return getattr(fault, "msg", "nested too deeply, or an endless number")


def _separator(text, position, allowed):
    """Return the separator at `position`, past blanks, and where the next thing begins."""
    position = WHITESPACE.match(text, position).end()
    found = text[position : position + 1]
    if not found or found not in allowed:
        raise json.JSONDecodeError(f"Expecting {' or '.join(allowed)}", text, position)
    return found, WHITESPACE.match(text, position + 1).end()


def _bad_bytes(raw):
    """Say where text that was decoded with surrogateescape holds a byte that is not UTF-8; None where it does
    not.
    """
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError as fault:
        return f"not UTF-8: byte 0x{ord(raw[fault.start]) - 0xDC00:02x} at character {fault.start + 1}"
    return None


def _sample(row_id, row):
    """Return (Sample, []) or (None, what is wrong with the row)."""
    if not isinstance(row, dict):
        return None, [f"a row must be an object, not {_kind(row)}"]
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


def _prompt(row_id, row):
    """As _sample, but the messages end with the user: a response stands in for the one that is wanted and is
    taken away again.
    """
    if isinstance(row, dict):
        if "messages" in row:
            turns = row["messages"]
            unanswered = (
                isinstance(turns, list)
                and turns
                and isinstance(turns[-1], dict)
                and turns[-1].get("role") == "user"
            )
            row = {"messages": [*turns, {"role": "assistant", "content": "..."}] if unanswered else turns}
        elif "prompt" in row or "text" in row:
            row = {"prompt": row.get("prompt", row.get("text")), "response": "..."}
        elif "instruction" in row:
            row = row | {"output": "..."}
    sample, faults = _sample(row_id, row)
    if sample and not sample.messages[-2][1].strip():
        return None, ["the prompt is empty"]
    return (None, faults) if faults else (Sample(row_id, sample.messages[:-1]), [])


def _from_pair(row, prompt, response):
    faults = _string_faults(row, prompt) + _string_faults(row, response, empty="empty response")
    return faults or (("user", row[prompt]), ("assistant", row[response])), faults


def _from_messages(turns):
    if not isinstance(turns, list) or not turns:
        return None, [f'"messages" must be a list of turns, not {_kind(turns)}']
    faults = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            faults.append(f"messages[{number}] must be an object, not {_kind(turn)}")
            continue
        empty = "empty response" if turn.get("role") == "assistant" else None
        faults += [
            f"messages[{number}]: {fault}"
            for fault in _string_faults(turn, "role") + _string_faults(turn, "content", empty)
        ]
    if faults:
        return None, faults
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        return None, [
            f"roles must be an optional system, then user and assistant in turn, ending with assistant; got "
            f"{', '.join(roles)}"
        ]
    return tuple((turn["role"], turn["content"]) for turn in turns), []


def _string_faults(row, key, empty=None):
    """What is wrong with row[key] as text; `empty` is the complaint about a blank one, None lets it pass."""
    if key not in row:
        return [f'missing key "{key}"']
    value = row[key]
    if not isinstance(value, str):
        return [f'"{key}" must be a string, not {_kind(value)}']
    if empty and not value.strip():  # the chat template strips a turn, so blanks alone are empty
        return [f'{empty} ("{key}")']
    if _bad_bytes(value):
        return [f'"{key}" has half a surrogate pair (\\ud800 to \\udfff), which is no character']
    return []


def _kind(value):
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    if isinstance(value, (list, str, dict)) and not value:
        return f"an empty {names[type(value)].split()[1]}"
    return "null" if value is None else f"{names[type(value)]} ({json.dumps(value)[:40]})"


def _summary(problems, remedy):
    head = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:"
    skip = 'Repair these rows, or let training leave them out with data.on_bad = "skip".'
    return listed(head, problems, skip if remedy else "")


def _check_choice(key, value, choices):
    if value not in choices:
        raise ValueError(f"{key} = {value!r} is not one of {', '.join(map(repr, choices))}")
