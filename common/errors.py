"""Exit codes and error messages that all entry scripts (train.py, generate.py, ...) share."""

import difflib
import os
import select
import signal
from collections.abc import Callable, Iterable, Sequence

from common.progress import complain

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130
SHOWN = 20  # An error message lists this many problems and counts the rest.


class Unfinished(RuntimeError):
    """The work ended too early, and the same command continues it. The message says what to repair first."""


class UserCodeError(Unfinished):
    """A function of the user failed, such as a reward. The message says where, and what to repair."""


class DiskError(Unfinished):
    """The disk refused a write. The message names the file or folder, and what is safe."""


def listed(head: str, problems: Sequence[str], remedy: str = "") -> str:
    """Returns a message: `head`, the first SHOWN problems, the number of those not shown, and `remedy`."""
    lines = [head, *(f"  {problem}" for problem in problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join([*lines, remedy] if remedy else lines)


def closest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" with the known name most like `word`, or else lists all known names."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(map(repr, known))}"


def run(work: Callable[[], int], stopped: Callable[[], str] = lambda: "stopped") -> int:
    """Calls work() and returns an exit code. If work() fails, prints its error on stderr without a traceback.

    The code is work()'s own, 2 after a ValueError (wrong input), 130 after Ctrl-C, SIGTERM or
    SIGHUP, else 1. stopped() returns the message for these signals and for Unfinished work. With
    LOUPE_TRACEBACK=1 in the environment, errors are raised.
    """
    stops = []

    def interrupt(*_: object) -> None:
        stops.append(True)
        raise KeyboardInterrupt  # Sending SIGINT would not do: a shell's background jobs ignore it.

    # All signals stop a command in the same way. The training loop replaces the handlers while it runs.
    for number in stop_signals():
        if number != signal.SIGINT or signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, interrupt)
    try:
        return work()
    except (KeyboardInterrupt, Exception) as e:
        if isinstance(e, BrokenPipeError) and _reader_is_gone():
            return FAILED
        # An extension that is being imported (numpy) turns the KeyboardInterrupt into an ImportError.
        if stops or isinstance(e, KeyboardInterrupt):
            complain(f"\n{stopped()}")
            return STOPPED
        if os.environ.get("LOUPE_TRACEBACK"):
            raise
        if isinstance(e, Unfinished):
            complain(f"error: {e}\n{stopped()}")
            return FAILED
        complain(f"error: {_message(e)}")
        return WRONG_INPUT if isinstance(e, ValueError) else FAILED


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that stop a command: SIGINT, SIGTERM, and, without nohup, SIGHUP."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def _message(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    line = next(iter(str(error).splitlines()), "no message")
    if type(error).__name__ == "OutOfMemoryError":  # torch's class, but torch need not be loaded here
        return f"out of memory ({line}); use fewer or shorter rows at a time, bfloat16, or a smaller model"
    return f"{type(error).__name__}: {line} (run again with LOUPE_TRACEBACK=1 to see where)"


def _reader_is_gone() -> bool:
    """Returns whether stdout's reader (`| head`) has ended; if so, it also discards all further output."""
    stdout = select.poll()  # Other broken pipes, such as a connection to a registry, are errors.
    stdout.register(1, 0)  # poll() reports POLLERR without being asked for it.
    gone = bool(stdout.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would report the unwritten rest when it exits.
    return gone
