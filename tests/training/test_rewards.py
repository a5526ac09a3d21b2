"""training/objectives/rewards.py: the sums by hand, and one clear error for each way that a reward fails."""

import hashlib
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from common import errors
from common.files import sha256
from tests.folders import ROOT
from training.objectives.rewards import RewardError, Rewards, default_rewards

PROMPTS, COMPLETIONS, GOLDS, ENDED = ["p", "q", "r"], ["aa", "b", ""], ["aa", "B", "c"], [True, False, True]


def write(folder, text, name="mine.py"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file.resolve()


def load(folder, text, *names, **settings):
    """Returns the rewards `names` of the file mine.py, each with weight 1."""
    write(folder, text)
    return Rewards([f"mine:{name}" for name in names], [1.0] * len(names), folder, **settings)


def call(rewards):
    return rewards(PROMPTS, COMPLETIONS, GOLDS, ENDED)


def refusal(folder, names, weights=None, **settings):
    """Returns the message of the ValueError."""
    with pytest.raises(ValueError) as caught:
        Rewards(names, [1.0] * len(names) if weights is None else weights, folder, **settings)
    return str(caught.value)


def failure(rewards):
    """Returns the message of the RewardError, which is one line."""
    with pytest.raises(RewardError) as caught:
        call(rewards)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the values


def test_the_sum_is_weighted_and_each_reward_keeps_its_own_values(tmp_path):
    write(tmp_path, "def size(completion): return len(completion)")
    names = ["exact_match", "label_match", "ended", "mine:size"]
    rewards = Rewards(names, [0.5, 0.25, -1, 2], tmp_path)
    sums, values = call(rewards)
    assert values == {
        "exact_match": [1, 0, 0],
        "label_match": [1, 1, 0],
        "ended": [1, 0, 1],
        "mine:size": [2, 1, 0],  # A user's reward may be outside [0, 1].
    }
    assert sums == [0.5 + 0.25 - 1 + 4, 0.25 + 2, -1] and list(values) == names
    assert call(rewards) == (sums, values)


def test_format_takes_its_pattern():
    rewards = Rewards(["format"], [1.0], ROOT, pattern="a+|")
    assert call(rewards) == ([1, 0, 1], {"format": [1, 0, 1]})


def test_no_completions_are_no_rewards_and_no_call(tmp_path):
    rewards = load(tmp_path, "def fails(completions): raise OSError", "fails")
    assert rewards([], [], [], []) == ([], {"mine:fails": []})


@pytest.mark.parametrize(
    ("parameters", "seen"),
    [
        ("prompt, completion, gold, ended", ("q", "b", "B", False)),
        ("ended, gold", (False, "B")),
        ("ended", (False,)),
        ("completion, /, *, gold", ("b", "B")),
        ("completion, gold='', scale=1, *args, **kwargs", ("b", "B", 1, (), {})),
    ],
)
def test_a_reward_of_one_completion_gets_what_its_parameters_name(tmp_path, parameters, seen):
    names = [p.split("=")[0].strip(" *") for p in parameters.split(",") if p.strip(" *") and p.strip() != "/"]
    text = f"seen = []\ndef f({parameters}):\n    seen.append(({', '.join(names)},))\n    return 0\n"
    rewards = load(tmp_path, text + "def calls(completion): return len(seen)\n", "f", "calls")
    _, values = call(rewards)
    assert values["mine:calls"] == [3, 3, 3]
    module = sys.modules[f"reward file {tmp_path.resolve() / 'mine.py'}"]
    assert module.seen[1] == seen


def test_a_reward_of_lists_is_called_once_and_may_not_change_them(tmp_path):
    text = """
        calls = []
        def f(prompts, completions, golds, ended):
            calls.append((list(prompts), list(completions), list(golds), list(ended)))
            completions.clear()
            return [0.5, len(calls), -1]
        def after(completions, **kwargs):
            return [len(completions)] * 3
    """
    rewards = load(tmp_path, text, "f", "after")
    assert call(rewards)[1] == {"mine:f": [0.5, 1, -1], "mine:after": [3, 3, 3]}
    module = sys.modules[f"reward file {tmp_path.resolve() / 'mine.py'}"]
    assert module.calls == [(PROMPTS, COMPLETIONS, GOLDS, ENDED)]


@pytest.mark.parametrize(
    ("returned", "values"),
    [
        ("[True, 1, Fraction(1, 2)]", [1, 1, 0.5]),
        ("numpy.arange(3)", [0, 1, 2]),
        ("(x / 4 for x in range(3))", [0, 0.25, 0.5]),
    ],
)
def test_numbers_of_any_type_become_floats(tmp_path, returned, values):
    text = f"import numpy\nfrom fractions import Fraction\ndef f(completions): return {returned}\n"
    found = call(load(tmp_path, text, "f"))[1]["mine:f"]
    assert found == values and {type(v) for v in found} == {float}


# the user's files


def test_a_file_may_lie_below_the_folder_and_import_its_neighbours(tmp_path):
    write(tmp_path, "from beside import SCALE\ndef one(completion): return SCALE", "mine.py")
    write(tmp_path, "from next_door import f as two\nimport only_for_deep", "rewards/deep/other.py")
    write(tmp_path, "SCALE = 3", "beside.py")
    write(tmp_path, "", "only_for_deep.py")
    write(tmp_path, "def f(completions): return [len(completions)] * 3", "rewards/deep/next_door.py")
    before = list(sys.path)
    rewards = Rewards(["mine:one", "rewards.deep.other:two"], [1.0, 10.0], tmp_path)
    assert call(rewards)[0] == [33, 33, 33]
    assert sys.path == before


def test_a_file_that_fails_leaves_nothing_on_the_path(tmp_path):
    before = list(sys.path)
    write(tmp_path, "import sys\nsys.path.append('elsewhere')\nraise OSError")
    refusal(tmp_path, ["mine:f"])
    assert sys.path == before


def test_a_file_named_as_a_module_of_loupe_is_its_own(tmp_path):
    write(tmp_path, "def f(completion): return 5", "tasks/rewards.py")
    assert call(Rewards(["tasks.rewards:f"], [1.0], tmp_path))[0] == [5, 5, 5]
    assert "leak" in sys.modules["tasks.rewards"].REWARDS


def test_a_file_may_define_a_dataclass(tmp_path):
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Weight:
            value: int = 2
        def f(completion): return Weight().value
    """
    assert call(load(tmp_path, text, "f"))[0] == [2, 2, 2]


def test_files_lists_each_file_of_the_user_once_and_no_other(tmp_path):
    text = "def f(completion): return 0\ndef g(completion): return print(end='run')"
    first = write(tmp_path, text, "mine.py")
    second = write(tmp_path, text, "pkg/mine.py")
    rewards = Rewards(["leak", "pkg.mine:f", "mine:g", "mine:f"], [1.0] * 4, tmp_path)
    assert rewards.files == [second, first]
    assert sha256(rewards.files[1]) == hashlib.sha256(text.encode()).hexdigest()


def test_two_rewards_of_a_file_run_it_once(tmp_path, capsys):
    load(tmp_path, "print('run')\ndef f(completion): return 0\ndef g(gold): return 0", "f", "g")
    assert capsys.readouterr().out == "run\n"


# what is refused


def test_one_error_lists_every_problem(tmp_path):
    file = write(tmp_path, "def score(completion): return 0\ndef bad(text): return 0\nlimit = 3")
    names = ["leek", "mine:scor", "mine:bad", "yours:f", "mine:limit", "format", "mine:", "leak", "leak"]
    weights = [1, math.nan, math.inf, "1", True, 1, 1, 1]
    message = refusal(tmp_path, names, weights, pattern="(", timeout=0)
    for fact in (
        "reward 'leek'",
        "did you mean 'leak'?",
        f"no function 'scor' in {file}; did you mean 'score'?",
        f"no function 'limit' in {file}",
        "reward 'mine:bad': parameter 'text'",
        f"no file {tmp_path.resolve() / 'yours.py'}; known are 'mine'",
        "'(' is not a regular expression",
        "reward 'mine:': write 'module:function'",
        "reward 'leak': named twice",
        "8 weights for 9 rewards",
        "weight nan",
        "weight inf",
        "weight '1'",
        "weight True",
        "the timeout is 0",
    ):
        assert fact in message, fact
    assert message.startswith("14 problem")


def test_no_reward_is_an_error_that_names_the_known_ones(tmp_path):
    message = refusal(tmp_path, [])
    assert "'leak'" in message and "'format'" in message


def test_format_without_a_pattern_is_refused(tmp_path):
    assert "reward 'format': the pattern is empty" in refusal(tmp_path, ["format"])


@pytest.mark.parametrize("name", ["mine.py:f", "../mine:f", "/mine:f", "a:b:c", ":f", "pkg/mine:f", "a b:f"])
def test_a_name_that_is_no_module_and_function_is_refused_with_an_example(tmp_path, name):
    write(tmp_path, "def f(completion): return 0")
    assert "'pkg.module:function'" in refusal(tmp_path / "pkg", [name])


def test_a_folder_without_files_is_no_riddle(tmp_path):
    message = refusal(tmp_path, ["mine:f"])
    assert message.endswith(f"no file {tmp_path.resolve() / 'mine.py'}")


@pytest.mark.parametrize(
    ("parameters", "fact"),
    [
        ("", "neither a completion"),
        ("**kwargs", "neither a completion"),
        ("text", "'text' is unknown"),
        ("completion, answer", "'answer' is unknown"),
        ("completion, *, answer", "'answer' is unknown"),
        ("prompt, completions", "mix"),
        ("completions, gold=None", "mix"),
    ],
)
def test_a_wrong_signature_is_refused_with_a_right_one(tmp_path, parameters, fact):
    write(tmp_path, f"def f({parameters}): return 0")
    message = refusal(tmp_path, ["mine:f"])
    assert fact in message and "def length(completion, gold)" in message and "completions" in message


def test_weights_that_are_all_0_are_refused(tmp_path):
    assert "every weight is 0" in refusal(tmp_path, ["ended", "leak"], [0, 0.0])
    assert "every weight" not in refusal(tmp_path, ["ended", "leek"], [0, 1])


def test_the_rewards_that_read_the_gold_response_are_known(tmp_path):
    text = "def f(completion): return 0\ndef g(gold, completion): return 0\ndef h(golds, /): return [0]"
    assert load(tmp_path, text, "f", "g", "h").gold_readers == ["mine:g", "mine:h"]


def test_the_default_rewards_have_a_time_limit_too():
    assert default_rewards("redaction", [], 0.5).timeout == 0.5


def test_an_async_function_is_refused(tmp_path):
    write(tmp_path, "async def f(completion): return 0")
    assert "async" in refusal(tmp_path, ["mine:f"])


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("x = 1\ndef f(completion) return 0\n", "mine.py:2: SyntaxError"),
        (
            "x = 1\nimport no_such_module\n",
            "mine.py:2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("import json\n\njson.loads('')\n", "mine.py:3: JSONDecodeError"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_with_its_line(tmp_path, text, fact):
    write(tmp_path, text)
    assert fact in refusal(tmp_path, ["mine:f"])


# what fails while it runs


@pytest.mark.parametrize(
    ("body", "did", "on"),
    [
        ("(completion): return 1 / len(completion)", "ZeroDivisionError: division by zero", "3 of 3 ('')"),
        ("(completion): return float('nan') if completion == 'b' else 0", "returned nan", "2 of 3 ('b')"),
        ("(gold): return float('-inf')", "returned -inf", "1 of 3 ('aa')"),
        ("(completion): return None", "returned None, not a number", "1 of 3"),
        ("(completion): return '0.5'", "returned '0.5', not a number", "1 of 3"),
        ("(completion): return [0.5]", "returned [0.5], not a number", "1 of 3"),
        ("(completion): return 1j", "returned 1j, not a number", "1 of 3"),
        ("(completion): raise SystemExit", "raised SystemExit", "1 of 3"),
        ("(completions): return [0, 0]", "returned 2 values for 3 completions", "its 3 completions"),
        ("(completions): return 0.5", "returned 0.5, not a list of 3 numbers", "its 3 completions"),
        ("(completions): return None", "returned None, not a list", "its 3 completions"),
        ("(completions): return {'a': 1, 'b': 2, 'c': 3}", "not a list", "its 3 completions"),
        ("(completions): return '123'", "not a list", "its 3 completions"),
        ("(completions): return [0, 1, float('nan')]", "returned nan", "3 of 3"),
        ("(completions): return [0, None, 1]", "returned None, not a number", "2 of 3"),
        ("(completions): raise KeyError('x\\ny')", "raised KeyError", "its 3 completions"),
    ],
)
def test_a_reward_that_fails_is_named_in_one_line(tmp_path, body, did, on):
    message = failure(load(tmp_path, f"def f{body}", "f"))
    assert "'mine:f'" in message and did in message and f"for {on}" in message.replace("completion ", "", 1)
    assert "finite number for every completion" in message


def test_an_error_is_placed_at_the_line_of_the_user_s_file(tmp_path):
    text = "import json\n\ndef f(completion):\n    return read(completion)\n\ndef read(text):\n    "
    rewards = load(tmp_path, text + "return json.loads(text)\n", "f")
    assert f"raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) at {rewards.files[0]}:7" in (
        failure(rewards)
    )


def test_a_long_completion_is_shown_in_part(tmp_path):
    rewards = load(tmp_path, "def f(completion): return None", "f")
    with pytest.raises(RewardError) as caught:
        rewards(["p"], ["x" * 5000 + "\n"], ["g"], [True])
    assert "x" * 40 + "'..." in str(caught.value) and len(str(caught.value)) < 300


def test_the_user_sees_one_line_and_no_traceback(tmp_path, capsys):
    rewards = load(tmp_path, "def f(completion): return 1 / 0", "f")
    assert errors.run(lambda: call(rewards)) == errors.FAILED
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 2
        and err.endswith("\nstopped\n")
        and "RewardError" not in err
        and "mine.py:1" in err
        and "Traceback" not in err
    )


@pytest.mark.parametrize(
    "body",
    [
        "(completion):\n    time.sleep(60 if completion == 'b' else 0)\n    return 0",
        "(completions):\n    while going():\n        try: time.sleep(9)\n        except: time.sleep(0.3)",
        "(completions):\n    while going(): pass",
        "(completions): return re.fullmatch('(a+)+b', 'a' * 40)",  # keeps Python's lock
        "(completions):\n    try: time.sleep(60)\n    except: return [0, 0, 0]",
        "(completions):\n    yield 1\n    time.sleep(60)",
    ],
)
def test_a_reward_that_hangs_is_left_at_the_time_limit(tmp_path, body):
    ending = "import re, time\nend = time.monotonic() + 30\ndef going(): return time.monotonic() < end\n"
    rewards = load(tmp_path, f"{ending}def f{body}\n", "f", timeout=0.5)
    start = time.monotonic()
    message = failure(rewards)
    assert time.monotonic() - start < 10
    assert "'mine:f' took longer than 0.5 s" in message and f"{rewards.files[0]}:" in message
    assert ("completion 2 of 3" in message) == ("'b'" in body)


def test_the_place_of_a_reward_that_hangs_is_its_line(tmp_path):
    text = "import time\ndef f(completion):\n    wait()\n    return 0\ndef wait():\n    time.sleep(60)\n"
    assert "mine.py:6" in failure(load(tmp_path, text, "f", timeout=0.5))


def test_a_pattern_that_backtracks_without_end_is_stopped():
    """Python's regular expressions keep its lock: no other thread could stop this one."""
    rewards = Rewards(["format"], [1.0], ROOT, pattern=r"(\w+ ?)+\.", timeout=0.5)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'format' took longer than 0.5 s"):
        rewards(["p"], ["a" * 60], ["g"], [True])
    assert time.monotonic() - start < 10


def test_a_reward_that_catches_the_time_limit_without_end_ends_the_process(tmp_path):
    loop = """
        import time
        def f(completion):
            while True:
                try: time.sleep(60)
                except: pass
    """
    file = write(tmp_path, loop)
    text = f"""
        from pathlib import Path
        from training.objectives import rewards
        rewards.GRACE = 0.5
        rewards.Rewards(["mine:f"], [1.0], Path({str(tmp_path)!r}), timeout=0.2)(["p"], ["c"], ["g"], [True])
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == errors.FAILED and f'File "{file}", line 5 in f' in done.stderr, done.stderr


def test_the_alarm_that_repeats_rings_in_no_code_but_the_rewards(tmp_path, monkeypatch):
    def slow(*arguments, original=signal.setitimer):
        time.sleep(0.5 if arguments[1:] == (0,) else 0)  # the end of the time limit comes late
        return original(*arguments)

    monkeypatch.setattr(signal, "setitimer", slow)
    rewards = load(tmp_path, "def f(completion): return 1", "f", timeout=0.2)
    assert call(rewards)[0] == [1, 1, 1]


def test_ctrl_c_ends_a_reward_and_is_no_fault_of_it(tmp_path):
    rewards = load(tmp_path, "import signal\ndef f(completion): signal.raise_signal(signal.SIGINT)", "f")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            call(rewards)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_timer_of_the_process_outlives_the_time_limit():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        call(Rewards(["ended"], [1.0], ROOT))
        time.sleep(1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [True]


def test_shipped_rewards_run_outside_the_main_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(call(Rewards(["ended"], [1.0], ROOT))))
    thread.start()
    thread.join()
    assert found == [([1, 0, 1], {"ended": [1, 0, 1]})]


def test_a_reward_that_hangs_outside_the_main_thread_is_left_at_the_time_limit(tmp_path):
    rewards, found = load(tmp_path, "import time\ndef f(completion): time.sleep(60)", "f", timeout=0.2), []
    thread = threading.Thread(target=lambda: found.append(failure(rewards)))
    thread.start()
    thread.join(10)
    assert "took longer than 0.2 s" in found[0] and "mine.py:2" in found[0]


def test_a_process_ends_while_a_reward_hangs(tmp_path):
    write(tmp_path, "import time\ndef f(completion): time.sleep(600)\n")
    text = f"""
        import sys
        from pathlib import Path
        from common.errors import run
        from training.objectives.rewards import Rewards
        rewards = Rewards(["mine:f"], [1.0], Path({str(tmp_path)!r}), timeout=0.2)
        code = run(lambda: rewards(["p"], ["c"], ["g"], [True]))
        sys.exit(code + 10 * ("torch" in sys.modules))
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == errors.FAILED and "took longer than 0.2 s" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 2
