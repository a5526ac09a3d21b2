"""Loupe's process in frameworks.py; it also times the matrix products of a step alone, the step's ceiling.

Trains as train.py does, through training/trainer.py and training/loop.py. "loupe" is lab_like.py's config.
"fp32" in the name sets train.precision to fp32, "compiled" sets train.compile to true, and a block type is
model.quantize.
"""

import math
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.clock import Clock, arguments, finish  # noqa: E402
from benchmarks.frameworks import QUANTIZED  # noqa: E402


class Trainer:
    """A run of train.py up to its loop, and its optimizer steps one at a time."""

    def __init__(self, folder: Path, overrides: list[str]):
        from training import trainer
        from training.config import load_config
        from training.optim import make_optimizers

        # Each run has a folder of its own, because a run locks its folder.
        self.scratch = tempfile.TemporaryDirectory()
        cfg = load_config(folder / "loupe.toml", [f"run.dir={self.scratch.name}", *overrides])
        self.run = trainer.load(trainer.open_run(cfg, resume=False))
        self.cfg, self.data = self.run.cfg, self.run.data
        self.model, self.objective = self.run.base.model, self.run.objective
        train = self.cfg.train
        settings = train.optimizer, train.learning_rate, train.weight_decay
        self.optimizers = make_optimizers(self.model, *settings)

    def batches(self, documents: list, count: int) -> list:
        """Returns the first micro-batches of the documents, as the loop gets them."""
        from training import build

        return list(islice(build.build_loader(self.cfg, documents).batches(0), count))

    def step(self, batch) -> float:
        """Takes one optimizer step and returns its loss."""
        from training import loop

        settings = self.run.precision, self.cfg.train.learning_rate, self.cfg.train.max_grad_norm
        record = loop.train_step(self.model, self.objective, [batch], self.optimizers, *settings)
        self.model.zero_grad(set_to_none=True)
        return record["loss"]


def record_products(step) -> list[tuple]:
    """Returns (shape, stride, dtype, device) of both operands of each matrix product that step() computes.

    It does not see the products inside a fused attention kernel.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, calls = torch.ops.aten, []
    products = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}

    class Recorder(TorchDispatchMode):
        supports_higher_order_operators = True  # flex_attention is one.

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if getattr(func, "overloadpacket", None) in products:
                a, b = args[-2:]  # The first argument of addmm and baddbmm is the term that is added.
                calls.append(tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in (a, b)))
            return func(*args, **(kwargs or {}))

    # A dispatch mode does not see the products inside a compiled layer, so the step runs eagerly.
    with torch.compiler.set_stance("force_eager"), Recorder():
        step()
    return calls


def flops(calls: list[tuple]) -> int:
    """Returns the sum of 2 n k m over all products of (..., n, k) and (..., k, m)."""
    return sum(2 * math.prod(a) * b[-1] for (a, *_), (b, *_) in calls)


def products_alone(calls: list[tuple]):
    """Returns a function that runs the products back to back in their order and returns the seconds.

    The operands have the recorded shapes, strides and dtypes. Equal products share operands and result, so
    nothing is allocated and small weights stay in the cache: the result is an upper bound of the speed.
    """
    import torch

    def operand(shape, stride, dtype, device):
        storage = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return torch.randn(storage, dtype=dtype, device=device).as_strided(shape, stride)

    made = {}
    for call in set(calls):
        a, b = (operand(*x) for x in call)
        out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device=a.device)
        made[call] = (torch.mm if a.ndim == 2 else torch.bmm), a, b, out

    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            product, a, b, out = made[call]
            product(a, b, out=out)
        if calls[0][0][3].type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()  # The first run compiles kernels.
    return run


def main() -> None:
    args = arguments()
    clock = Clock(args)
    precision, compiled = "fp32" if "fp32" in args.name else "bf16", str("compiled" in args.name).lower()
    settings = {"precision": precision, "compile": compiled, "device": args.device, "batch_size": args.batch}
    words = [f"train.{key}={value}" for key, value in settings.items()]
    words += [f"model.quantize={type}" for type in QUANTIZED if type in args.name]
    trainer = Trainer(args.folder, [*words, *args.set])
    batches = trainer.batches(trainer.data.documents, args.round + 1)
    clock.lap(trainer.step(batches[0]))
    for _ in range(args.steps):
        clock.lap(trainer.step(batches[args.round]))
    result = clock.result()  # Taken here, so that the peak memory is that of training alone.
    calls = record_products(lambda: trainer.step(batches[args.round]))
    products, shares = products_alone(calls), []
    # Steps and products take turns, so that a machine that slows down for some seconds slows both.
    for _ in range(args.steps):
        start = time.perf_counter()
        trainer.step(batches[args.round])
        step = time.perf_counter() - start
        shares.append(products() / step)
    ceiling = statistics.median(shares) * statistics.median(result["seconds"])
    finish(result | {"ceiling": ceiling, "flops": flops(calls)})


if __name__ == "__main__":
    main()
