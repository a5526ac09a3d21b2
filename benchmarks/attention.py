"""Times attention on a CPU, forward and backward: PyTorch's fused kernel against masked_attention.

    python benchmarks/attention.py [--tokens 2560] [--rounds 10]

Prints milliseconds for one stream of documents, for several document lengths. The two implementations take
turns; each figure is the best of `--rounds`. model.attention.MAX_PLAIN_KEYS comes from these figures.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    import torch

    from model import attention

    print(f"{args.tokens} tokens, 4 query heads on one key head, head_dim 64; ms, forward and backward")
    print(f"{'type':10}{'tokens a document':>20}{'fused':>10}{'plain':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        for length in (80, 160, 320, 640, 1280):
            times = measure(torch, attention, dtype, length, args)
            print(f"{str(dtype)[6:]:10}{length:>20}{times[False]:>10.1f}{times[True]:>10.1f}")


def measure(torch, attention, dtype, length: int, args) -> dict[bool, float]:
    """Returns {whether masked_attention computed it: the best time in milliseconds}."""
    q = torch.randn(args.tokens, 4, 64, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(args.tokens, 1, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    best = {}
    for _ in range(args.rounds):
        for plain in (False, True):
            attention.plain_is_faster = lambda q, keys, plain=plain: plain
            start = time.perf_counter()
            attention.document_attention(q, k, v, [length] * (args.tokens // length), 0.125).sum().backward()
            best[plain] = min(best.get(plain, 1e9), 1e3 * (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
