"""The rewards of GRPO: loads reward functions, those of tasks/rewards.py and the user's, and calls them.

The names of a reward function's parameters say what it receives and how often it is called:

    prompt, completion, gold, ended       once for each completion; it returns a number
    prompts, completions, golds, ended    once with lists; it returns a list of numbers, one a completion

It may leave parameters of its kind out. `gold` is the row's expected response. `ended` is whether the
completion ended with a stop token, and not at the limit of its length.
"""

import faulthandler
import importlib.util
import inspect
import math
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from common.errors import UserCodeError, closest, listed
from data.rows import Sample
from tasks import rewards as shipped
from tasks.choose import choose_task, name_of

ONE = ("prompt", "completion", "gold", "ended")
MANY = ("prompts", "completions", "golds", "ended")
EXAMPLE = "write for example `def length(completion, gold): return min(len(completion) / len(gold), 1.0)`"
_USERS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
GRACE = 5.0  # seconds after the time limit in which a reward that catches _TimeUp must end
_SHOWN = 40  # characters of a completion in an error message


class RewardError(UserCodeError):
    """A reward function failed. The message is one line."""


class _Reward(NamedTuple):
    name: str
    function: Callable[..., Any]
    positional: tuple[str, ...]  # parameters that cannot be passed by name
    named: tuple[str, ...]
    many: bool  # takes lists
    file: Path | None  # the user's file; None for a shipped reward


class Rewards:
    """The weighted sum of several rewards: sum_i weights[i] * rewards[i](completion)."""

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        folder: Path,
        pattern: str = "",
        timeout: float = 60.0,
    ) -> None:
        """Loads the reward functions.

        Args:
            names: a name of tasks.rewards.REWARDS, "format", or "module:function" for a function of the
                user's file `folder`/module.py; "pkg.module:function" is in `folder`/pkg/module.py.
            weights: a factor for each name.
            pattern: the regular expression of the reward "format".
            timeout: the longest time in seconds that a reward may take for the completions of one call.

        Raises:
            ValueError: lists every name that cannot be loaded and every weight that is wrong.
        """
        self.weights, self.timeout = list(weights), timeout
        self._rewards: list[_Reward] = []
        problems, modules = _problems(names, weights, timeout), dict[Path, ModuleType]()
        for name in dict.fromkeys(names):
            try:
                self._rewards.append(_load(name, Path(folder), pattern, modules))
            except ValueError as e:
                problems.append(f"reward {name!r}: {e}")
        if problems:
            raise ValueError(listed(f"{len(problems)} problem(s) with the rewards:", problems))

    @property
    def files(self) -> list[Path]:
        """The user's files that the rewards are in, each once."""
        return list(dict.fromkeys(reward.file for reward in self._rewards if reward.file))

    @property
    def gold_readers(self) -> list[str]:
        """The names of the rewards that take the gold response."""
        return [r.name for r in self._rewards if {"gold", "golds"} & {*r.positional, *r.named}]

    def __call__(
        self, prompts: list[str], completions: list[str], golds: list[str], ended: list[bool]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Returns (the weighted sum of each completion, {name: the reward of each completion}).

        Raises:
            RewardError: a reward raised an error, took longer than `timeout`, or returned anything but finite
                numbers, one for each completion.
        """
        columns: list[Sequence] = [prompts, completions, golds, ended]
        assert len({len(column) for column in columns}) == 1
        values = {r.name: _values(r, columns, self.timeout) if completions else [] for r in self._rewards}
        rows = zip(*values.values(), strict=True)
        return [sum(w * v for w, v in zip(self.weights, row, strict=True)) for row in rows], values


def default_rewards(task: str, samples: Sequence[Sample], timeout: float = 60.0) -> Rewards:
    """Returns the rewards of the task, data.task. Raises ValueError if it has none."""
    name = name_of(choose_task(task, list(samples)))
    if name not in shipped.DEFAULTS:
        raise ValueError(
            f"grpo.rewards is empty, and the task {name!r} has no rewards of its own; name some of "
            f"{', '.join(shipped.REWARDS)}, or your own as 'module:function'"
        )
    weights = shipped.DEFAULTS[name]
    return Rewards(list(weights), list(weights.values()), Path(), timeout=timeout)


def _problems(names: Sequence[str], weights: Sequence[float], timeout: float) -> list[str]:
    found = []
    if not names:
        found.append(f"no reward is named{closest('', _known())}")
    if len(weights) != len(names):
        found.append(f"there are {len(weights)} weights for {len(names)} rewards; give one for each")
    found += [f"reward {name!r}: named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    found += [f"weight {w!r}: not a finite number" for w in weights if not _is_finite(w)]
    if weights and not any(weights):
        found.append("every weight is 0, and nothing could be learnt; give one reward another weight")
    if not (_is_finite(timeout) and timeout > 0):
        found.append(f"the timeout is {timeout!r}; it must be a positive number of seconds")
    return found


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known() -> list[str]:
    return [*shipped.REWARDS, shipped.FORMAT]


# --- loading


def missing_rewards(names: Sequence[str], folder: Path) -> list[str]:
    """Returns a message for each name that is no shipped reward and has no file in `folder`."""
    found = []
    for name in dict.fromkeys(names):
        try:
            _file(name, folder)
        except ValueError as e:
            found.append(f"grpo.rewards: {name!r}: {e}")
    return found


def _file(name: str, folder: Path) -> Path | None:
    """Returns the user's file with the reward, None for a shipped reward; raises ValueError without any."""
    if ":" not in name:
        if name not in _known():
            raise ValueError(
                f"unknown{closest(name, _known())} (write a function of yours as module:function)"
            )
        return None
    if not _USERS_NAME.fullmatch(name) or ".py:" in name:
        raise ValueError(
            f"write 'module:function', where module.py is in {folder}, or 'pkg.module:function' for "
            "pkg/module.py there"
        )
    file = folder.joinpath(*name.partition(":")[0].split(".")).with_suffix(".py").resolve()
    if not file.is_file():
        near = sorted(path.stem for path in file.parent.glob("*.py"))
        raise ValueError(f"no file {file}{closest(file.stem, near) if near else ''}")
    return file


def _load(name: str, folder: Path, pattern: str, modules: dict[Path, ModuleType]) -> _Reward:
    """Returns a reward; raises ValueError with what is wrong with it. Keeps the user's modules in a dict."""
    file, function = _file(name, folder), name.partition(":")[2]
    if file is None:
        return _reward(name, shipped.REWARDS.get(name) or shipped.format_reward(pattern), None)
    if file not in modules:
        modules[file] = _import(file, folder.resolve())
    own = [n for n, value in vars(modules[file]).items() if callable(value) and not n.startswith("_")]
    if not callable(getattr(modules[file], function, None)):
        raise ValueError(f"no function {function!r} in {file}{closest(function, own) if own else ''}")
    return _reward(name, getattr(modules[file], function), file)


def _import(file: Path, folder: Path) -> ModuleType:
    """Runs a file as a module. While it runs, it can import other files of `folder` and of its own folder."""
    spec = importlib.util.spec_from_file_location(f"reward file {file}", file)
    assert spec and spec.loader
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path[:0] = [str(file.parent), str(folder)]
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise ValueError(f"{e.filename}:{e.lineno}: SyntaxError: {e.msg}") from None
    except (Exception, SystemExit) as e:
        at = _place(traceback.extract_tb(e.__traceback__), file)
        raise ValueError(f"{at}: {_described(e)}, while the file was imported") from e
    finally:
        sys.path[:] = before
    return module


def _reward(name: str, function: Callable[..., Any], file: Path | None) -> _Reward:
    """Reads from a function's parameters how to call it; raises ValueError where they do not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"its parameters cannot be read; {EXAMPLE}") from None
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError("an async function; make it a plain one, `def` without async")
    own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = [p for p in own if p.name in (*ONE, *MANY)]
    others = [p.name for p in own if p.default is p.empty and p not in known]
    many = {p.name in MANY for p in known if p.name != "ended"}
    kinds = f"name its parameters out of {', '.join(ONE)}, or out of {', '.join(MANY)}; {EXAMPLE}"
    if others:
        raise ValueError(f"parameter {', '.join(map(repr, others))} is unknown; {kinds}")
    if not known:
        raise ValueError(f"it takes neither a completion nor a list of them; {kinds}")
    if len(many) == 2:
        mixed = ", ".join(p.name for p in known)
        raise ValueError(f"its parameters ({mixed}) mix one completion and lists of them; {kinds}")
    positional = tuple(p.name for p in known if p.kind is p.POSITIONAL_ONLY)
    named = tuple(p.name for p in known if p.kind is not p.POSITIONAL_ONLY)
    return _Reward(name, function, positional, named, many == {True}, file)


# --- calling


class _TimeUp(BaseException):
    """Not an Exception, which a reward function may catch."""


class _Call:
    """One call of a reward for all completions."""

    def __init__(self, reward: _Reward, columns: Sequence[Sequence]) -> None:
        self.reward, self.columns = reward, columns
        self.row: int | None = None  # the completion that the reward is called for
        self.values: list[float] = []

    def __call__(self) -> None:
        """Fills `values`; raises the reward's errors, and RewardError if a value is not finite."""
        if self.reward.many:
            self._check_all(self._call(MANY, [list(column) for column in self.columns]))
            return
        for row, arguments in enumerate(zip(*self.columns, strict=True)):
            self.row = row
            self.values.append(self._number(self._call(ONE, arguments)))

    def _call(self, names: Sequence[str], arguments: Sequence) -> Any:
        given = dict(zip(names, arguments, strict=True))
        return self.reward.function(
            *(given[name] for name in self.reward.positional),
            **{name: given[name] for name in self.reward.named},
        )

    def _check_all(self, result: Any) -> None:
        count = len(self.columns[0])
        if isinstance(result, str | bytes | dict) or not hasattr(type(result), "__iter__"):
            raise self.failure(f"returned {_shown(result)}, not a list of {count} numbers")
        found = list(result)
        if len(found) != count:
            raise self.failure(f"returned {len(found)} values for {count} completions")
        for row, value in enumerate(found):
            self.row = row
            self.values.append(self._number(value))

    def _number(self, value: Any) -> float:
        # Numbers of numpy and tensors with one element have __float__ too.
        if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
            raise self.failure(f"returned {_shown(value)}, not a number")
        try:
            number = float(value)
        except Exception:
            raise self.failure(f"returned {_shown(value)}, not a number") from None
        if not math.isfinite(number):
            raise self.failure(f"returned {number}, not a finite number")
        return number

    def failure(self, did: str, remedy: str = "") -> RewardError:
        """Returns the error: the reward, what it did, for which completion, and the remedy."""
        completions = self.columns[1]
        on = f"its {len(completions)} completions"
        if self.row is not None:
            on = f"completion {self.row + 1} of {len(completions)} ({_shown(completions[self.row])})"
        remedy = remedy or "it must return a finite number for every completion, an empty one too"
        return RewardError(" ".join(f"reward {self.reward.name!r} {did}, for {on}; {remedy}".split()))


def _values(reward: _Reward, columns: Sequence[Sequence], timeout: float) -> list[float]:
    """Returns the reward of each completion, or raises RewardError."""
    call = _Call(reward, columns)
    stack: list[traceback.FrameSummary] = []  # where the reward was at the time limit
    try:
        if threading.current_thread() is threading.main_thread():
            with _alarm(timeout, stack):
                call()
        else:
            _call_in_thread(call, timeout, stack)
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as e:
        if not stack:
            at = _place(list(traceback.extract_tb(e.__traceback__)), reward.file)
            raise call.failure(f"raised {_described(e)} at {at}") from e
    if stack:
        remedy = "make the function faster, or raise the time limit (grpo.reward_timeout)"
        at = _place(stack, reward.file)
        raise call.failure(f"took longer than {timeout:g} s (it was at {at})", remedy)
    return call.values


def _call_in_thread(call: _Call, seconds: float, stack: list[traceback.FrameSummary]) -> None:
    """Calls `call`, and leaves it after `seconds` and fills `stack`, unless it holds Python's lock."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=work, name=f"reward {call.reward.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        stack.extend(traceback.extract_stack(sys._current_frames().get(thread.ident or 0)))
    if errors:
        raise errors.pop()


@contextmanager
def _alarm(seconds: float, stack: list[traceback.FrameSummary]) -> Iterator[None]:
    """After `seconds`, fills `stack` and raises _TimeUp in the _Call of the block, again every 0.1 s.

    Only the main thread can do this. A regular expression that backtracks without end keeps Python's lock, so
    that no other thread could stop it, but it does look for signals. A bare `except:` may catch _TimeUp; if
    the reward goes on for GRACE, the process ends with the stack on stderr.
    """

    def ring(_: int, frame: FrameType | None) -> None:
        if all(f.f_code is not _Call.__call__.__code__ for f, _ in traceback.walk_stack(frame)):
            return  # the call is over
        if not stack:
            stack.extend(traceback.extract_stack(frame))
            faulthandler.dump_traceback_later(GRACE, exit=True, file=2)
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    others = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stack:
            faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


def _place(stack: Sequence[traceback.FrameSummary], file: Path | None) -> str:
    """Returns "file:line" of the innermost frame in `file`, or of the innermost frame at all."""
    own = [frame for frame in stack if frame.filename == str(file)] or list(stack)
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(file)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _shown(value: object) -> str:
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}..."
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if len(text) <= 2 * _SHOWN and text else f"a {type(value).__name__}"
