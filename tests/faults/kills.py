"""Chains of SIGKILLs on a run: each chain must end in the bytes of the run that nobody killed.

python -m tests.faults.kills 100     kills at random steps, evaluations, disk calls of saves, and exports
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.files import sha256
from report.metrics_log import read_metrics
from tests.faults.children import COUNT_ONLY, LAST, Ended, Server
from tests.makers import write_run

ARGUMENTS = ["--config", "tiny.toml", "--set", "train.epochs=2", "--set", "train.eval_every=3"]  # 8 steps
VARYING = ("seconds", "tokens_per_second", "peak_memory")
# The base has a tokenizer of characters, which a GGUF file cannot hold as it is.
EXPORTS = {"peft": [], "safetensors": [], "gguf": ["--quant", "f16", "--no-verify"]}
# Kills itself in the given training or evaluation loss.
COUNTED = """
import os, signal
from training.objectives.sft import SupervisedFineTuning
loss, calls = SupervisedFineTuning.loss, []
def counted(self, model, batch):
    calls.extend([None] * (model.training == {training}))
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, model, batch)
SupervisedFineTuning.loss = counted
"""
TRAIN = "import train; result = train.main({words!r})"
EXPORT = "import export; result = export.main({words!r})"


def result(run: Path) -> tuple:
    """Returns what no kill may change: the adapter's SHA-256 and the records of steps and evaluations."""
    steps, evals = read_metrics(run / "metrics.jsonl")
    records = [{k: v for k, v in r.items() if k not in VARYING} for r in [*steps, *evals]]
    return sha256(run / "adapter" / "adapter_model.safetensors"), records


def files(path: Path) -> dict[str, str]:
    """Returns {name: SHA-256} of an export, which is a file or a folder."""
    return {p.name: sha256(p) for p in (sorted(path.iterdir()) if path.is_dir() else [path])}


@dataclass
class Kills:
    """A folder with a base, data and an uninterrupted run, and what the kills have done so far."""

    server: Server
    folder: Path
    rng: random.Random
    done: Counter = field(default_factory=Counter)  # kind -> kills
    lost: list[float] = field(default_factory=list)  # seconds since the newest checkpoint, or the start

    def prepare(self) -> "Kills":
        write_run(self.folder)
        whole = self.train("whole", [], disk=(str(self.folder / "runs" / "whole"), *COUNT_ONLY))
        assert whole.code == 0, whole.said
        self.calls, self.whole = whole.calls, result(self.folder / "runs" / "whole")
        self.exports = {}
        for kind in EXPORTS:
            done = self.export(kind, self.folder / f"whole-{kind}", COUNT_ONLY)
            assert done.code == 0, done.said
            self.exports[kind] = (done.calls, files(self.folder / f"whole-{kind}"))
        return self

    def train(self, name: str, more: list[str], before: str = "", disk: tuple | None = None) -> Ended:
        words = [*ARGUMENTS, "--set", f"run.dir=runs/{name}", *more]
        return self.server.run(before + TRAIN.format(words=words), self.folder, disk)

    def export(self, kind: str, out: Path, calls: tuple) -> Ended:
        words = [
            "--run",
            str(self.folder / "runs" / "whole"),
            "--to",
            kind,
            "--out",
            str(out),
            *EXPORTS[kind],
        ]
        # The folder of temporary names too: "out/.whole.gguf.part" begins with "out/".
        return self.server.run(EXPORT.format(words=words), self.folder, (str(out.parent), *calls))

    def chain(self, name: str, kills: int) -> None:
        """Kills a new run up to `kills` times, each time in its continuation, and lets it end."""
        run, trail = self.folder / "runs" / name, []
        for _ in range(kills):
            kind, disk, before = self.rng.choice(["step", "evaluation", "disk"]), None, ""
            if kind == "disk":
                disk = (str(run), self.rng.randint(1, self.calls), LAST, 0)
            else:
                at = self.rng.randint(1, 12 if kind == "step" else 8)
                before = COUNTED.format(training=kind == "step", at=at)
            ended = self.train(name, self.resume(run), before, disk)
            trail.append((kind, disk, before[-300:-200], ended.code, ended.said[-2000:]))
            if ended.code == 0:
                break
            assert ended.code == -9, trail
            self.done[kind] += 1
            saved = [p.stat().st_mtime for p in (run / "checkpoints").glob("step-*")]
            self.lost.append(ended.ended - max([ended.began, *saved]))
        ended = self.train(name, self.resume(run))
        assert ended.code == 0 and result(run) == self.whole, (trail, ended.said)
        left = [str(p) for p in run.rglob(".*") if p.name != ".lock"]
        assert not left, (left, trail)
        shutil.rmtree(run)

    def resume(self, run: Path) -> list[str]:
        return ["--resume"] if (run / "config.toml").exists() else []

    def kill_export(self, kind: str) -> None:
        """Kills an export at one of its disk calls: no file under its name, and the next one is whole."""
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        calls, whole = self.exports[kind]
        out = folder / f"whole-{kind}"
        ended = self.export(kind, out, (at := self.rng.randint(1, calls), LAST, 0))
        if ended.code == -9:
            self.done["export"] += 1
            self.lost.append(ended.ended - ended.began)
            # After the rename the export is whole; the last calls are those that remove its lock.
            assert not out.exists() or files(out) == whole, (kind, at, calls)
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            ended = self.export(kind, out, COUNT_ONLY)
        assert ended.code == 0 and files(out) == whole, (kind, at, ended.said)
        assert [p.name for p in folder.iterdir()] == [out.name]
        shutil.rmtree(folder)

    def all(self, count: int) -> None:
        """Does at least `count` kills, a fifth of them on exports."""
        number = 0
        while self.done.total() < count:
            number += 1
            self.chain(f"chain{number}", self.rng.randint(3, 6))
            while self.done["export"] < count // 5 and self.done["export"] * 4 < self.done.total():
                self.kill_export(self.rng.choice(list(EXPORTS)))

    def summary(self) -> str:
        kinds = ", ".join(f"{n} in {kind}" for kind, n in sorted(self.done.items()))
        mean = sum(self.lost) / max(len(self.lost), 1)
        return (
            f"{self.done.total()} kills ({kinds}); seconds lost per kill: {mean:.2f} in the mean, "
            f"{max(self.lost, default=0):.2f} at most"
        )


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name, Server(Path(name)) as server:
        kills = Kills(server, Path(name) / "runs", random.Random(19)).prepare()
        kills.all(count)
        print(kills.summary())


if __name__ == "__main__":
    main(int(sys.argv[1]))
