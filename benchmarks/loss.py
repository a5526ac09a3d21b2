"""Times the cross-entropy over a large vocabulary, computed in four ways.

    python benchmarks/loss.py [--positions 720] [--vocabulary 262144] [--hidden 640] [--rounds 5]

Prints the seconds for the loss and dL/dhidden under a frozen head: model.loss (chunks of vocabulary entries);
log_softmax of chunks of positions; PyTorch's fused attention with the head as keys and values; and the two
matrix products alone. The ways take turns; each figure is the median of `--rounds`.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("positions", 720), ("vocabulary", 262_144), ("hidden", 640), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(args.positions, args.hidden, dtype=torch.bfloat16)
    weight = (0.05 * torch.randn(args.vocabulary, args.hidden)).bfloat16()
    targets = torch.randint(args.vocabulary, (args.positions,))
    job = torch, hidden, weight, targets
    ways = {
        "model.loss": partial(by_entries, *job),
        "positions, 256 MB": partial(by_positions, *job, 2**28),
        "positions, 64 MB": partial(by_positions, *job, 2**26),
        "fused attention": partial(by_attention, *job),
        "the products alone": lambda: (hidden @ weight.t()) @ weight,
    }
    seconds = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(
        f"{args.positions} positions, {args.vocabulary:,} vocabulary entries, hidden size {args.hidden}, ",
        end="",
    )
    print(f"bfloat16, {torch.get_num_threads()} threads; seconds")
    for name, times in seconds.items():
        print(f"{name:24}{statistics.median(times):>8.3f}")


def by_entries(torch, hidden, weight, targets):
    from model.loss import token_log_probs

    h = hidden.clone().requires_grad_()
    (-token_log_probs(h, weight, targets)[0]).sum().backward()
    return h.grad


def by_positions(torch, hidden, weight, targets, chunk_bytes: int):
    size, grad = chunk_bytes // (4 * len(weight)), torch.empty_like(hidden)
    for s in range(0, len(hidden), size):
        d = (hidden[s : s + size] @ weight.t()).float().log_softmax(-1).exp_()
        d[range(len(d)), targets[s : s + size]] -= 1
        torch.mm(d.bfloat16(), weight, out=grad[s : s + size])
    return grad


def by_attention(torch, hidden, weight, targets):
    q, k = hidden[None, None], weight[None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, k, scale=1.0)[0, 0] - weight[targets]


if __name__ == "__main__":
    main()
