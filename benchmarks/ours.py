"""Loupe's process in frameworks.py, and the ceiling of its step: the matrix products alone.

Trains as train.py does, through training/trainer.py and training/loop.py. "loupe" is the recipe; with "fp32"
              in the name it multiplies in
float32, with "compiled" train.compile is true.
"""

import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.clock import Clock, arguments, finish  # noqa: E402


class Trainer:
    """A run of train.py, up to its loop, and one step of the loop at a time."""

    def __init__(self, folder: Path, overrides: list[str]):
        from training import trainer
        from training.config import load_config
        from training.optim import make_optimizers

        self.scratch = (
            tempfile.TemporaryDirectory()
        )  # of the run's own: two at a time could not hold one folder
        cfg = load_config(folder / "loupe.toml", [f"run.dir={self.scratch.name}", *overrides])
        self.run = trainer.load(trainer.open_run(cfg, resume=False))
        self.cfg, self.data = self.run.cfg, self.run.data
        self.model, self.objective = self.run.base.model, self.run.objective
        self.optimizers = make_optimizers(
            self.model, self.cfg.train.optimizer, self.cfg.train.learning_rate, self.cfg.train.weight_decay
        )

    def batches(self, documents: list, count: int) -> list:
        """The first micro-batches of the documents, as the loop gets them."""
        from training import build

        return list(islice(build.build_loader(self.cfg, documents).batches(0), count))

    def step(self, batch) -> float:
        """One optimiser step; its loss."""
        from training import loop

        record = loop.train_step(
            self.model,
            self.objective,
            [batch],
            self.optimizers,
            self.run.precision,
            self.cfg.train.learning_rate,
            self.cfg.train.max_grad_norm,
        )
        self.model.zero_grad(set_to_none=True)
        return record["loss"]


def record_products(step) -> list[tuple]:
    """Returns (shape, stride, dtype, device) of both operands of each matrix product in step(), forward and
    backward.

    Products inside a fused attention kernel are not seen.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, calls = torch.ops.aten, []
    products = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}

    class Recorder(TorchDispatchMode):
        supports_higher_order_operators = True  # flex_attention is one

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if getattr(func, "overloadpacket", None) in products:
                a, b = args[-2:]  # addmm's and baddbmm's first is what the product is added to
                calls.append(tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in (a, b)))
            return func(*args, **(kwargs or {}))

    with (
        torch.compiler.set_stance("force_eager"),
        Recorder(),
    ):  # inside a compiled layer nobody sees the products
        step()
    return calls


def flops(calls: list[tuple]) -> int:
    """2 n k m for (n, k) times (k, m), as often as there are matrices."""
    total = 0
    for (a, *_), (b, *_) in calls:
        size = 2 * b[-1]
        for n in a:
            size *= n
        total += size
    return total


def products_alone(calls: list[tuple]):
    """Returns a function that times the products alone, back to back in their order, in seconds.

    The operands have the recorded shapes, strides and dtypes. Products of one kind share their operands and
    their result, so nothing is allocated and small weights stay in the cache: an upper bound of the speed.
    """
    import torch

    def operand(shape, stride, dtype, device):
        reach = 1 + sum(
            (n - 1) * s for n, s in zip(shape, stride, strict=True)
        )  # numbers from the first to the last
        return torch.randn(reach, dtype=dtype, device=device).as_strided(shape, stride)

    made = {}
    for call in set(calls):
        a, b = (operand(*x) for x in call)
        made[call] = (
            (torch.mm if a.ndim == 2 else torch.bmm),
            a,
            b,
            torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device=a.device),
        )

    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            product, a, b, out = made[call]
            product(a, b, out=out)
        if calls[0][0][3].type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()  # the first time compiles kernels
    return run


def main() -> None:
    args = arguments()
    clock = Clock(args)
    precision, compiled = "fp32" if "fp32" in args.name else "bf16", str("compiled" in args.name).lower()
    settings = {"precision": precision, "compile": compiled, "device": args.device, "batch_size": args.batch}
    trainer = Trainer(args.folder, [*(f"train.{key}={value}" for key, value in settings.items()), *args.set])
    batches = trainer.batches(trainer.data.documents, args.round + 1)
    clock.lap(trainer.step(batches[0]))
    for _ in range(args.steps):
        clock.lap(trainer.step(batches[args.round]))
    result = clock.result()  # the peak is the training's
    calls = record_products(lambda: trainer.step(batches[args.round]))
    products, shares = products_alone(calls), []
    for _ in range(args.steps):  # in turn: a machine that is slower for some seconds is so for both
        start = time.perf_counter()
        trainer.step(batches[args.round])
        step = time.perf_counter() - start
        shares.append(products() / step)
    finish(
        result
        | {"ceiling": statistics.median(shares) * statistics.median(result["seconds"]), "flops": flops(calls)}
    )


if __name__ == "__main__":
    main()
