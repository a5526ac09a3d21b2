"""Opens damaged copies of a GGUF file as bases, in a process that may take 1 GB more than it has.

python -m tests.model.fuzz_gguf FILE FOLDER COUNT
"""

import random
import resource
import struct
import sys
from collections import Counter
from pathlib import Path

import torch

from ggml.container import GGUFFile
from model.gguf_folder import gguf_folder
from model.tokenizer import Tokenizer
from model.weights import load_model

NUMBERS = [0, 1, 2, 3, 2**7, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
GIGABYTE = 2**30


def damaged(raw: bytes, header: int, rng: random.Random) -> bytes:
    """Returns a copy with one to four faults within its first `header` bytes."""
    new = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(header), rng.choice((1, 1, 2, 4, 8, 64))
        fault = rng.randrange(7)
        if fault == 0:
            new[at] ^= 1 << rng.randrange(8)
        elif fault == 1:
            new[at : at + size] = rng.randbytes(size)
        elif fault == 2:
            new[at:at] = rng.randbytes(size)
        elif fault == 3:
            del new[at : at + size]
        elif fault == 4:
            new[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif fault == 5:
            new[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif rng.random() < 0.3:
            del new[rng.randrange(len(new)) :]
        header = min(header, len(new))
        if not header:
            break
    return bytes(new)


def main(file: str, folder: str, count: str) -> None:
    """Prints how many copies loaded and how many were refused; fails on any error but a ValueError."""
    raw, header = Path(file).read_bytes(), GGUFFile(file).data_start
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng, seen, path = random.Random(0), Counter[str](), Path(folder) / "x.gguf"
    for i in range(int(count)):
        path.write_bytes(damaged(raw, header, rng))
        try:
            base = gguf_folder(path)
            Tokenizer(base)
            load_model(base, torch.float32, quantize="keep")
            seen["loaded"] += 1
        except ValueError as e:
            assert str(e).count("\n") == 0 and "x.gguf" in str(e), e
            seen["refused"] += 1
        except BaseException:
            print(f"copy {i}: {path}", file=sys.stderr)
            raise
    print(*(f"{count} {what}" for what, count in sorted(seen.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
