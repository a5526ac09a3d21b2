"""Reads the rows of a file, whatever it is: JSON, JSONL, CSV, plain text or parquet; any but parquet gzipped.

    [{...}, {...}]              a JSON array
    {...}                       JSONL, an object a line, or objects on several lines each, one after the other
    {"data": [{...}, {...}]}    one object in which one key holds the rows
    prompt,response             CSV, whose first line names the keys; separated by commas, semicolons or tabs
    any text                    a paragraph, which ends at a blank line, is the row {"text": paragraph}

All are in UTF-8. A row comes with its id ("train.jsonl:12" is a line, "train.json:[11]" an element), its
place as error messages show it after the name of the file, and an error message or None.
"""

import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str, Any, str | None]  # (id, place, row, error)

BLANKS = re.compile(r"[ \t\n\r]*")  # JSON allows these between values.
MAX_EXPANSION = 200  # Text in gzip has about a tenth of its size; a file of zeros would fill the memory.
STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/")  # A file may stand behind these, but not at a resume.
# An object with one of these is a row; its lists of objects are not rows themselves.
OF_A_ROW = {
    "messages",
    "conversations",
    "prompt",
    "instruction",
    "text",
    "chosen",
    "rejected",
    "role",
    "from",
}


class UnreadableFile(Exception):
    """No row of a file can be used. The message is the part of the error after "FILE:"."""


def why_unreadable(path: Path) -> str:
    """Returns why a path cannot be read as a data file, or ""; opens nothing, because a pipe would wait."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # a NUL in the name
        return f"cannot be read: {error}"
    if stat.S_ISDIR(mode):
        return "cannot be read: Is a directory"
    if not stat.S_ISREG(mode) or str(path.absolute()).startswith(STREAMS):
        return "is a pipe or a device, and a resumed run could not read it again; save the rows in a file"
    return ""


def read_rows(path: Path, label: str, format: str, note: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows of a file as (id, place, row, error).

    Args:
        label: the name of the file in ids.
        format: "json" (one array), "jsonl", "csv", "txt" (paragraphs), "lines" (a row {"text"} for each
            line), or "auto", which decides by the content and, for CSV and text, by the name.
        note: is called with a sentence about rows that are not where they usually are.

    Raises:
        UnreadableFile: no row of the file can be used.
    """
    raw = _read_bytes(path)
    if raw[:4] == b"PAR1" and format == "auto":
        yield from _parquet_rows(raw, label)
        return
    text = _decoded(raw)
    if not text.strip():
        yield label, ":1", None, "the file is empty"
        return
    format = _format_of(path.name.removesuffix(".gz"), text) if format == "auto" else format
    start = 0
    if format in ("jsonl", "objects"):
        key, start = _wrapped(text)
        if key:
            note(f'{label}: the rows are those of the key "{key}"; the other keys of the file are not used')
            format = "element"
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "txt": _paragraphs, "lines": _lines}
    if format in readers:
        yield from readers[format](text, label)
    else:
        yield from _values(text, label, format, start)


def _read_bytes(path: Path) -> bytes:
    """Returns the bytes of a regular file, unpacked if they are in gzip's format."""
    if why := why_unreadable(path):
        raise UnreadableFile(f" {why} ({path})")
    try:
        raw = path.read_bytes()
        if raw[:2] != b"\x1f\x8b":
            return raw
        limit = MAX_EXPANSION * len(raw) + 2**20
        with gzip.open(io.BytesIO(raw)) as file:
            unpacked = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile(f" damaged gzip data ({error}); pack the file again") from None
    except OSError as error:
        raise UnreadableFile(f" cannot be read: {error.strerror} ({path})") from None
    if len(unpacked) > limit:
        raise UnreadableFile(f" unpacks to over {MAX_EXPANSION} times its size; unpack it yourself (gunzip)")
    return unpacked


def _decoded(raw: bytes) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UnreadableFile("1: the file is UTF-16; save it as UTF-8")
    if b"\0" in raw[:4096]:
        raise UnreadableFile(" is no text; write the rows as JSON, JSONL, CSV, parquet or plain text")
    # surrogateescape turns a bad byte into a lone surrogate, so it spoils one row and not the whole file.
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _format_of(name: str, text: str) -> str:
    """Returns "csv", "txt", "json" (an array), "objects" (on several lines each) or "jsonl"."""
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    first, _, rest = text.lstrip().partition("\n")
    first, rest = first.strip("\r\ufeff \t"), rest.lstrip()
    try:
        is_value = isinstance(json.loads(first), (dict, list))
    except (ValueError, RecursionError):
        is_value = False
    if suffix == ".txt" and not (is_value or first in ("{", "[")):
        return "txt"
    if first[:1] == "[":
        return "json"
    # A first line that JSONL has cut off is followed by a line with the next object.
    return "objects" if first[:1] == "{" and not is_value and rest and rest[0] != "{" else "jsonl"


def _lines(text: str, label: str) -> Iterator[Row]:
    """Yields the row {"text": line} for each line that is not blank."""
    # str.splitlines would also split at U+2028 and U+0085, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip("\r\ufeff \t")  # Files joined with `cat` have a BOM in the middle.
        if line:
            yield f"{label}:{number}", f":{number}", {"text": line}, bad_bytes(line)


def _paragraphs(text: str, label: str) -> Iterator[Row]:
    """Yields the row {"text": paragraph} for each paragraph; its line is the first one."""
    paragraph: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.rstrip("\r")
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            first, whole = number - len(paragraph), "\n".join(paragraph)
            yield f"{label}:{first}", f":{first}", {"text": whole}, bad_bytes(whole)
            paragraph = []


def _jsonl_rows(text: str, label: str) -> Iterator[Row]:
    decoder, repeated = _decoder()
    for row_id, place, line, error in _lines(text, label):
        row = None
        try:
            row = decoder.decode(line["text"])
        except (ValueError, RecursionError) as e:
            error = error or f"not JSON: {_json_fault(e)} at column {getattr(e, 'colno', 1)}"
        yield row_id, place, row, error or _repeated_keys(repeated)


def _values(text: str, label: str, kind: str, position: int = 0) -> Iterator[Row]:
    """Yields each JSON value; json.loads would not give its line.

    `kind` is "json" (a text that is an array), "element" (an array at `position`) or "objects" (objects one
    after the other).
    """
    decoder, repeated = _decoder()
    line, counted, index, is_array = 1, 0, 0, kind != "objects"
    try:
        separator, position = _separator(text, position, "[") if is_array else ("", _next(text, 0))
        if is_array and text[position : position + 1] == "]":
            separator, position = _separator(text, position, "]")
        while separator != "]" and (is_array or position < len(text)):
            line, counted = line + text.count("\n", counted, position), position
            row, end = decoder.raw_decode(text, position)
            error = bad_bytes(text[position:end]) or _repeated_keys(repeated)
            if is_array:
                yield f"{label}:[{index}]", f":{line}: element [{index}]", row, error
            else:
                yield f"{label}:{line}", f":{line}", row, error
            index += 1
            separator, position = _separator(text, end, ",]") if is_array else ("", _next(text, end))
        if kind == "json" and position != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, position)
    except (ValueError, RecursionError) as e:
        raise UnreadableFile(
            f"{getattr(e, 'lineno', line)}: not JSON: {_json_fault(e)}, after {index} whole element(s); "
            "repair the file or write it as JSONL"
        ) from None


def _wrapped(text: str) -> tuple[str, int]:
    """Returns the key that holds the rows and the position of their list; ("", 0) if there is none.

    Raises UnreadableFile if several keys hold lists of objects.
    """
    decoder, _ = _decoder()
    found, keys = dict[str, int](), set[str]()
    try:
        separator, position = _separator(text, 0, "{")
        while separator != "}":
            key, position = decoder.raw_decode(text, position)
            _, position = _separator(text, position, ":")
            value, end = decoder.raw_decode(text, position)
            keys.add(key)
            if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
                found[key] = position
                keys |= {k for k in value[0] if k in ("role", "from")}  # a conversation
            separator, position = _separator(text, end, ",}")
    except (ValueError, RecursionError):
        return "", 0
    if position != len(text) or OF_A_ROW & keys:
        return "", 0
    if len(found) > 1:
        names = " and ".join(f'"{key}"' for key in found)
        raise UnreadableFile(f"1: one object, whose keys {names} hold rows; save each list in its own file")
    return next(iter(found.items()), ("", 0))


def _csv_rows(text: str, label: str) -> Iterator[Row]:
    """Yields an object for each record of a CSV file; the first record has its keys."""
    csv.field_size_limit(2**31 - 1)  # The default refuses a text of 128 KiB.
    head = text.lstrip("\r\n").partition("\n")[0]
    records = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    keys, line = list[str](), 1
    try:
        for record in records:
            if not keys:
                keys = [key.strip() for key in record]
                if len(set(keys)) < len(keys):
                    raise UnreadableFile(f"{line}: the same column twice in {', '.join(keys)}; rename one")
            elif record:
                counts = f"{len(record)} fields, but the first line has {len(keys)}; quote texts with commas"
                error = bad_bytes("".join(record)) or (counts if len(record) != len(keys) else None)
                yield f"{label}:{line}", f":{line}", dict(zip(keys, record, strict=False)), error
            line = records.line_num + 1
    except csv.Error as error:
        raise UnreadableFile(
            f"{line}: not CSV: {error}; quote each text, and double the quotes in it"
        ) from None


def _parquet_rows(raw: bytes, label: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise UnreadableFile(' a parquet file needs pyarrow: pip install -e ".[parquet]"') from None
    index = 0
    try:
        for batch in parquet.ParquetFile(BufferReader(raw)).iter_batches():
            for row in batch.to_pylist():
                yield f"{label}:[{index}]", f": row [{index}]", row, None
                index += 1
    except (ArrowException, OSError, ValueError) as error:
        first = (str(error).splitlines() or ["no message"])[0]
        raise UnreadableFile(f" damaged parquet data ({first}); write the file again") from None


def _decoder() -> tuple[json.JSONDecoder, list[str]]:
    """Returns a JSON decoder, and a list to which it adds each key that an object has twice."""
    repeated: list[str] = []

    def make_object(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in found if keys.count(key) > 1)
        return found

    # Without the hook, json keeps the last value of such a key and raises no error.
    return json.JSONDecoder(object_pairs_hook=make_object), repeated


def _repeated_keys(repeated: list[str]) -> str | None:
    """Returns an error message that names the keys in the list, or None if it is empty; empties the list."""
    keys = ", ".join(f'"{key}"' for key in repeated)
    repeated.clear()
    return f"the same key twice in one object: {keys}" if keys else None


def _json_fault(error: Exception) -> str:
    """Returns json's error message, or our own for a RecursionError or a number of over 4,300 digits."""
    return getattr(error, "msg", "nested too deeply, or an endless number")


def _next(text: str, position: int) -> int:
    """Returns the position of the first character that is not blank."""
    return BLANKS.match(text, position).end()  # type: ignore[union-attr]


def _separator(text: str, position: int, allowed: str) -> tuple[str, int]:
    """Skips blanks; returns the separator that follows, and the position of the next value."""
    position = _next(text, position)
    found = text[position : position + 1]
    if not found or found not in allowed:
        raise json.JSONDecodeError(f"Expecting {' or '.join(allowed)}", text, position)
    return found, _next(text, position + 1)


def bad_bytes(text: str) -> str | None:
    """Returns an error message for the first byte that is not UTF-8 (now a surrogate in `text`), or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return f"not UTF-8: byte 0x{ord(text[e.start]) - 0xDC00:02x} at character {e.start + 1}"
    return None
