"""Output about progress: a bar on stderr, lines on stdout, and warnings on stderr."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

LONGEST_LINE = 2000  # characters of a message; a damaged file may hold a value of megabytes

if TYPE_CHECKING:  # A command without a bar must not wait for the import.
    from tqdm import tqdm as Bar


def bar(total: int, what: str, unit: str, quiet: bool = False, initial: int = 0) -> "Bar":
    """Returns a tqdm bar on stderr. It shows nothing if `quiet` is true or stderr is not a terminal."""
    from tqdm import tqdm

    off = quiet or not sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=True, disable=off, leave=False
    )


def say(text: str = "") -> None:
    """Prints a line on stdout at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning on stderr at once."""
    complain(f"warning: {text}")


def complain(text: str) -> None:
    """Prints a message on stderr at once; if the terminal is gone, it is lost, and the work goes on."""
    text = "\n".join(map(_shortened, text.split("\n")))
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def _shortened(line: str) -> str:
    left_out, half = len(line) - LONGEST_LINE, LONGEST_LINE // 2
    return f"{line[:half]} ... ({left_out:,} characters) ... {line[-half:]}" if left_out > 0 else line


def printable(text: str) -> str:
    """Returns the text with control characters (not newlines) escaped; a terminal would execute them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
