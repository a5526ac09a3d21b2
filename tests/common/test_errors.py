"""common/errors.py: an exit code and one message for every way to end."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from common import errors as cli
from common.errors import SHOWN, closest, listed
from tests.folders import ROOT


def fail(error):
    def work():
        raise error

    return work


def test_what_went_well_is_exit_code_0(capsys):
    assert cli.run(lambda: cli.DONE) == 0
    assert capsys.readouterr() == ("", "")


def test_the_users_mistake_is_exit_code_2_and_the_message_whole(capsys):
    assert cli.run(fail(ValueError("data.train: no such file\nname a file"))) == 2
    assert capsys.readouterr() == ("", "error: data.train: no such file\nname a file\n")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ\nand more"),
        AssertionError("shapes differ"),
        OSError("shapes differ"),
        BrokenPipeError("shapes differ"),
    ],
)  # the last of a socket: stdout is well
def test_whatever_else_fails_is_exit_code_1_and_one_line_that_says_how_to_see_more(capsys, error):
    assert cli.run(fail(error)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{type(error).__name__}: shapes differ" in err and "LOUPE_TRACEBACK=1" in err


def test_an_error_without_a_message_has_its_line_too(capsys):
    assert cli.run(fail(AssertionError())) == 1
    assert "AssertionError: no message" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("broken")])
def test_the_traceback_is_shown_on_request(monkeypatch, error):
    monkeypatch.setenv("LOUPE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run(fail(error))


@pytest.fixture
def handlers():
    """Puts both signals' handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "on_ctrl_c"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # as in a background job
    ],
)
def test_ctrl_c_and_sigterm_are_exit_code_130(capsys, handlers, number, on_ctrl_c):
    signal.signal(signal.SIGINT, on_ctrl_c)
    assert (
        cli.run(lambda: os.kill(os.getpid(), number), stopped=lambda: "stopped; go on with --resume") == 130
    )
    assert capsys.readouterr() == ("", "\nstopped; go on with --resume\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_an_import_turns_into_an_error_of_its_own_is_still_130(capsys, handlers, number):
    """As numpy's does while it is imported."""

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert cli.run(work, stopped=lambda: "stopped; go on") == 130
    assert capsys.readouterr() == ("", "\nstopped; go on\n")


def test_an_exit_that_argparse_asked_for_passes():
    with pytest.raises(SystemExit):
        cli.run(fail(SystemExit(2)))


def test_a_reader_that_has_read_enough_ends_a_command_quietly():
    program = "import sys; from common import errors as cli; sys.exit(cli.run(lambda: [print(i, flush=True) for i in range(10**6)] and 0))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "0\n", "")


@pytest.mark.parametrize("count", [1, SHOWN, SHOWN + 5])
def test_a_long_list_of_problems_is_cut_off_and_the_rest_counted(count):
    lines = listed("head:", [f"problem {i}" for i in range(count)], "do this").splitlines()
    assert lines[0] == "head:" and lines[-1] == "do this"
    assert [line.strip() for line in lines[1:-1]] == [f"problem {i}" for i in range(min(count, SHOWN))] + [
        "... and 5 more"
    ] * (count > SHOWN)
    assert listed("head:", ["a"]).splitlines() == ["head:", "  a"]


def test_an_unknown_name_is_answered_by_the_nearest_known_one_or_by_all():
    assert "did you mean 'epochs'" in closest("epoch", ["epochs", "lr"])
    assert closest("zzz", ["epochs", "lr"]).endswith("'epochs', 'lr'")
