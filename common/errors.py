"""What the entry scripts share: exit codes, and one message for whatever goes wrong."""

import os
import select
import signal
import sys
from collections.abc import Callable

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130


def run(work: Callable[[], int], stopped: Callable[[], str] = lambda: "stopped") -> int:
    """Calls work() and returns its exit code, or 2 for a ValueError (the user's input), 130 for Ctrl-C or SIGTERM, 1 for whatever else goes wrong.

    Each is told in one message on stderr, without a traceback; LOUPE_TRACEBACK=1 in the environment lets the exception through.
    """
    stops = []

    def interrupt(*_) -> None:
        stops.append(True)
        raise KeyboardInterrupt  # not by sending SIGINT, which a shell makes its background jobs ignore

    signal.signal(
        signal.SIGTERM, interrupt
    )  # one way to stop; the training loop takes both signals over while it runs
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\n{stopped()}", file=sys.stderr)
        return STOPPED
    except Exception as e:
        if isinstance(e, BrokenPipeError) and nobody_reads():
            return FAILED
        if (
            stops
        ):  # an extension that was being imported (numpy's does so) makes an ImportError of the interruption
            print(f"\n{stopped()}", file=sys.stderr)
            return STOPPED
        if os.environ.get("LOUPE_TRACEBACK"):
            raise
        if isinstance(e, ValueError):
            print(f"error: {e}", file=sys.stderr)
            return WRONG_INPUT
        if type(e).__name__ == "OutOfMemoryError":  # torch's; torch may not be loaded here
            print(
                f"error: out of memory ({first_line(e)}); take fewer or shorter rows at a time, bfloat16, or a smaller model",
                file=sys.stderr,
            )
            return FAILED
        print(
            f"error: {type(e).__name__}: {first_line(e)} (run again with LOUPE_TRACEBACK=1 to see where)",
            file=sys.stderr,
        )
        return FAILED


def nobody_reads() -> bool:
    """Whether stdout's reader has gone ("| head" has read enough); what is left for it is dropped then.  Another broken pipe, a registry's say, is an error."""
    stdout = select.poll()
    stdout.register(1, 0)  # POLLERR is told unasked
    gone = bool(stdout.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains of the rest when it ends
    return gone


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
