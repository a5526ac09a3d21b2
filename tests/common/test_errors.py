"""common/errors.py: the exit code and the message of each way to end."""

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


def test_success_is_exit_code_0(capsys):
    assert cli.run(lambda: cli.DONE) == 0
    assert capsys.readouterr() == ("", "")


def test_a_value_error_is_exit_code_2_and_its_whole_message(capsys):
    assert cli.run(fail(ValueError("data.train: no such file\nname a file"))) == 2
    assert capsys.readouterr() == ("", "error: data.train: no such file\nname a file\n")


def test_an_endless_line_of_a_message_is_cut_in_its_middle(capsys):
    assert cli.run(fail(ValueError(f"a.json: {'x' * 10**6} is no key\ntake another"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a.json: xxx") and err.endswith("xxx is no key\ntake another\n")
    assert " characters) ..." in err and len(err) < 2200


# The BrokenPipeError is that of a socket, because stdout is open.
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, OSError, BrokenPipeError])
def test_other_errors_are_exit_code_1_and_one_line_that_says_how_to_see_more(capsys, kind):
    error = kind("shapes differ\nand more")
    assert cli.run(fail(error)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{type(error).__name__}: shapes differ" in err and "LOUPE_TRACEBACK=1" in err


def test_an_error_without_a_message_has_a_line_too(capsys):
    assert cli.run(fail(AssertionError())) == 1
    assert "AssertionError: no message" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("broken")])
def test_the_traceback_is_shown_on_request(monkeypatch, error):
    monkeypatch.setenv("LOUPE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run(fail(error))


@pytest.fixture
def handlers():
    """Restores the handlers of the signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = [(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
BACKGROUND_JOB = (signal.SIGTERM, signal.SIG_IGN)


@pytest.mark.fault("stop")
@pytest.mark.parametrize("number, on_ctrl_c", [*SIGNALS, BACKGROUND_JOB])
def test_ctrl_c_sigterm_and_a_closed_terminal_are_exit_code_130(capsys, handlers, number, on_ctrl_c):
    signal.signal(signal.SIGINT, on_ctrl_c)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    assert cli.run(lambda: os.kill(os.getpid(), number), stopped=lambda: "stopped; go on") == 130
    assert capsys.readouterr() == ("", "\nstopped; go on\n")


def test_under_nohup_a_closed_terminal_stops_nothing(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert cli.run(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_an_import_turns_into_another_error_is_exit_code_130(capsys, handlers, number):
    """numpy does so while it is imported."""

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert cli.run(work, stopped=lambda: "stopped; go on") == 130
    assert capsys.readouterr() == ("", "\nstopped; go on\n")


def test_the_system_exit_of_argparse_passes():
    with pytest.raises(SystemExit):
        cli.run(fail(SystemExit(2)))


def test_a_reader_that_closes_the_pipe_ends_a_command_without_a_message():
    work = "lambda: [print(i, flush=True) for i in range(10**6)] and 0"
    program = f"import sys; from common import errors as cli; sys.exit(cli.run({work}))"
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "0\n", "")


@pytest.mark.parametrize("count", [1, SHOWN, SHOWN + 5])
def test_a_long_list_of_problems_is_shortened_and_the_rest_counted(count):
    problems = [f"problem {i}" for i in range(count)]
    head, *lines, remedy = listed("head:", problems, "do this").splitlines()
    assert (head, remedy) == ("head:", "do this")
    rest = ["... and 5 more"] if count > SHOWN else []
    assert [line.strip() for line in lines] == problems[:SHOWN] + rest
    assert listed("head:", ["a"]).splitlines() == ["head:", "  a"]


def test_the_error_for_an_unknown_name_has_the_nearest_known_one_or_all():
    assert "did you mean 'epochs'" in closest("epoch", ["epochs", "lr"])
    assert closest("zzz", ["epochs", "lr"]).endswith("'epochs', 'lr'")
