"""Progress for people: a bar with an ETA on a terminal, nothing (or the caller's plain lines) elsewhere."""

import sys


def bar(total: int, what: str, unit: str, quiet: bool = False, initial: int = 0):
    """A tqdm bar on stderr; it is silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        dynamic_ncols=True,
        disable=quiet or not sys.stderr.isatty(),
        leave=False,
    )


def say(text: str = "") -> None:
    """A line for the user on stdout, at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
