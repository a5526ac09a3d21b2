"""Runs train.py once for each combination of values, and compares the runs.

python train.py --config FILE --sweep train.learning_rate=1e-4,3e-4 --sweep adapter.r=8,32

Each run is a process of its own, so that it begins with free memory, and one that fails does not end the
others. The state of a sweep is the folders of its runs: the same command again skips the finished ones.
"""

import hashlib
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import DONE, FAILED, STOPPED, listed, stop_signals
from common.progress import say, warn
from report.compare import as_text, compare
from report.compare_page import write_comparison
from training.config import FREE, Config, load_config

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
LONGEST_VALUE = 40  # characters of a value in the name of a folder
# Resolved by a run from "auto", so that its config.toml may have another value.
RESOLVED = {"train.compile", "train.precision"}


@dataclass(frozen=True)
class Member:
    """One run of a sweep: the name of its folder, its --set options, and its config."""

    name: str
    overrides: list[str]
    cfg: Config

    @property
    def path(self) -> Path:
        return Path(self.cfg.run.dir)

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    @property
    def begun(self) -> bool:
        return (self.path / "config.toml").is_file()


def sweep(config: str, overrides: Sequence[str], options: Sequence[str], command: str) -> int:
    """Trains a run for each combination of the options' values; returns the exit code.

    Args:
        config: the config file.
        overrides: the --set options.
        options: the --sweep options, "section.key=value,value".
        command: the shell text of this command, which also continues it.

    Raises ValueError, before the first run starts, that lists what is wrong with any of the configs.
    """
    members = plan(config, overrides, options)
    folder, failed = members[0].path.parent, []
    for n, member in enumerate(members, start=1):
        at = f"run {n} of {len(members)}: {member.name}"
        if member.finished:
            say(f"{at} is finished")
            continue
        say(f"{at}{', continued' if member.begun else ''}")
        code = _train(config, member)
        if code == STOPPED:
            say(f"\nthe sweep stopped in run {n} of {len(members)}; continue with:\n    {command}")
            return STOPPED
        if code != DONE:
            failed.append(f"{member.name}: exit code {code}")
    finished = [member.path for member in members if member.finished]
    if len(finished) > 1:
        _compare(finished, folder / "compare.html")
    if failed:
        remedy = f"Their messages are above; to try again:\n    {command}"
        print(f"error: {listed('these runs failed:', failed, remedy)}", file=sys.stderr)
    return FAILED if failed else DONE


def _compare(finished: list[Path], page: Path) -> None:
    """Prints the comparison of the runs and writes its page; warns if they share no validation row."""
    try:
        comparison = compare(finished)
    except ValueError as e:
        warn(str(e))
        return
    write_comparison(page, comparison)
    say(f"\n{as_text(comparison)}\n\ncomparison: {page}")


def plan(config: str, overrides: Sequence[str], options: Sequence[str]) -> list[Member]:
    """Returns the runs of a sweep, in the order of the product of the values.

    Raises ValueError that lists every wrong option and config, files, adapters and rewards that are not
    there, and runs in the way of the sweep's.
    """
    from training.build import problems as problems_of  # imports torch, for which --help does not wait

    problems, axes = list[str](), list[tuple[str, list[str]]]()
    for option in options:
        try:
            axes.append(parse(option))
        except ValueError as e:
            problems.append(str(e))
    keys = [key for key, _ in axes]
    twice = [key for key in keys if keys.count(key) > 1]
    problems += [f"--sweep {key} is given twice; write all values once" for key in twice]
    members: list[Member] = []
    for values in itertools.product(*(values for _, values in axes)):
        pairs = list(zip(keys, values, strict=True))
        own, name = [f"{key}={value}" for key, value in pairs], name_of(pairs)
        try:
            cfg = load_config(config, [*overrides, *own])
        except ValueError as e:
            lines = [_of_sweep(line, keys) for line in str(e).splitlines()]
            problems += [line for line in lines if line not in problems]
            continue
        folder = str(Path(cfg.run.dir) / name)
        own += [f"run.name={name}", f"run.dir={folder}"]
        cfg = replace(cfg, run=replace(cfg.run, name=name, dir=folder))
        members.append(Member(name, [*overrides, *own], cfg))
    found = [problem for m in members if not m.finished for problem in problems_of(m.cfg)]
    problems += dict.fromkeys(line.strip() for problem in found for line in problem.splitlines())
    if len(axes) == len(options):
        problems += _in_the_way(members) + _twice(members)
    if problems:
        raise ValueError(listed("the sweep cannot start:", list(dict.fromkeys(problems))))
    return members


def _of_sweep(line: str, keys: Sequence[str]) -> str:
    """Returns a message of load_config that names the option with which the key was given."""
    return line.replace("--set", "--sweep", 1) if any(key in line for key in keys) else line


def parse(option: str) -> tuple[str, list[str]]:
    """Returns the key and the values of "section.key=value,value", split at commas outside [] and quotes."""
    key, equals, text = option.partition("=")
    key, values = key.strip(), [value.strip() for value in split(text)]
    if not equals or not all(values):
        example = "--sweep train.learning_rate=1e-4,3e-4"
        raise ValueError(f"--sweep {option}: write it as section.key=value,value, for example {example}")
    if key in ("run.name", "run.dir"):
        raise ValueError(
            f"--sweep {option}: {key} cannot be swept: each run is named after its values and lies in "
            "run.dir; set that with --set run.dir=FOLDER"
        )
    return key, values


def split(text: str) -> list[str]:
    """Splits a text at its commas, but not inside brackets or quotes."""
    parts, depth, quote, escaped = [""], 0, "", False
    for c in text:
        if quote:
            quote = "" if c == quote and not escaped else quote
            escaped = c == "\\" and not escaped and quote == '"'
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "[{") - (c in "]}")
        if c == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def name_of(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns a folder's name that shows the values: "learning_rate=1e-4_r=8".

    Characters that are not safe in a file name become "-"; a value that is changed or cut by this gets some
    digits of its hash, so that two values have two names.
    """
    keys = [key.rpartition(".")[2] for key, _ in pairs]
    parts = []
    for (key, value), short in zip(pairs, keys, strict=True):
        bare = value.strip("\"'")
        safe = re.sub(r"[^A-Za-z0-9.+-]+", "-", bare).strip("-.")[:LONGEST_VALUE] or "value"
        if safe != bare:
            safe += "-" + hashlib.sha256(value.encode()).hexdigest()[:6]
        parts.append(f"{short if keys.count(short) == 1 else key}={safe}")
    return "_".join(parts)


def _in_the_way(members: list[Member]) -> list[str]:
    """Returns messages about runs in the sweep's folder, or in a run's folder, that are not of this sweep."""
    found = [problem for member in members if (problem := _changed(member))]
    for folder in dict.fromkeys(member.path.parent for member in members):
        if (folder / "config.toml").exists():
            found.append(
                f"{folder}: a run is here, and the sweep would put its runs inside its folder; set another "
                f"with --set run.dir={folder}-sweep"
            )
    return found


def _changed(member: Member) -> str:
    """Returns a message if the member's folder holds a run with another config."""
    if not member.begun:
        return ""
    try:
        then = load_config(member.path / "config.toml")
    except ValueError as e:
        return str(e)
    free = FREE | RESOLVED
    if member.cfg.adapter.init_from:  # its adapter decides these
        free |= {f"adapter.{key}" for key in vars(then.adapter) if key != "init_from"}
    changed = [
        f"{section}.{key}: {old} -> {value}"
        for section, part in asdict(member.cfg).items()
        for key, value in part.items()
        if (old := getattr(getattr(then, section), key)) != value and f"{section}.{key}" not in free
    ]
    remedy = "put it back, remove the folder, or set another run.dir"
    return f"{member.path} was made with another config ({', '.join(changed)}); {remedy}" if changed else ""


def _twice(members: list[Member]) -> list[str]:
    """Returns a message for each two runs that are equal, because a value is written in two ways."""
    seen: dict[str, str] = {}
    found = []
    for member in members:
        sections = asdict(member.cfg)
        sections["run"] = sections["run"] | {"name": "", "dir": ""}
        first = seen.setdefault(repr(sections), member.name)
        if first != member.name or sum(m.name == member.name for m in members) > 1:
            found.append(f"{member.name} is the same run as {first}; write each value once")
    return found


def _train(config: str, member: Member) -> int:
    """Runs train.py in a process of its own and returns its exit code; passes stop signals on to it."""
    words = [word for override in member.overrides for word in ("--set", override)]
    command = [
        sys.executable,
        str(SCRIPT),
        "--config",
        config,
        *words,
        *(["--resume"] if member.begun else []),
    ]
    # In its own group the child does not get the terminal's SIGINT, which would reach it twice.
    child = subprocess.Popen(command, process_group=0)
    stopped = []

    def forward(number: int, _: object) -> None:
        stopped.append(number)
        child.send_signal(number)

    before = {s: signal.signal(s, forward) for s in stop_signals()}
    try:
        code = child.wait()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    return STOPPED if stopped else code
