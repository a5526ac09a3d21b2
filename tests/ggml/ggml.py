"""llama.cpp's own quantizer, from the library in the xllamacpp wheel, and rows that are hard to quantize."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch

from ggml.blocks import dequantize


@functools.cache
def library() -> ctypes.CDLL:
    """Opened by its path: importing xllamacpp would start its backends."""
    folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
    lib = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    lib.ggml_row_size.restype = lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return lib


def ggml_quantize(rows: np.ndarray, ggml_id: int) -> np.ndarray:
    """(n_rows, n_cols) float32 -> (n_rows, row_bytes) uint8 without an importance matrix."""
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_cols = rows.shape
    out = np.zeros((n_rows, library().ggml_row_size(ggml_id, n_cols)), np.uint8)
    written = library().ggml_quantize_chunk(
        ggml_id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, None
    )
    assert written == out.nbytes
    return out


def near_constant(rng, n, steps) -> np.ndarray:
    """Rows that are constant but for a few steps of float32: the K types' systems of equations are almost
    singular.
    """
    base = (rng.standard_normal((n, 1)) * 3).astype(np.float32)
    return (base.view(np.int32) + rng.integers(-steps, steps + 1, (n, 256), np.int32)).view(np.float32)


def one_outlier(rng, n) -> np.ndarray:
    x = rng.standard_normal((n, 256)) * 1e-3
    x[np.arange(n), rng.integers(0, 256, n)] = 50 * rng.standard_normal(n)
    return x


def random_bits(rng, n) -> np.ndarray:
    """Every kind of float32 below 1e38 that there is."""
    x = rng.integers(0, 2**32, (n, 256), np.uint32).view(np.float32)
    return np.where(np.isfinite(x) & (np.abs(x) < 1e38), x, 0)


ROWS = {  # name: (rng, n) -> (n, 256)
    "normal": lambda rng, n: rng.standard_normal((n, 256)) * 0.02,
    "positive": lambda rng, n: np.abs(rng.standard_normal((n, 256))),
    "negative": lambda rng, n: -np.abs(rng.standard_normal((n, 256))) - 0.5,
    "constant": lambda rng, n: np.repeat(rng.standard_normal((n, 1)), 256, axis=1),
    "near constant": lambda rng, n: near_constant(rng, n, 2),
    "nearly near constant": lambda rng, n: near_constant(rng, n, 1000),
    "zero": lambda rng, n: np.zeros((n, 256)),
    "zeros of both signs": lambda rng, n: np.where(rng.random((n, 256)) < 0.5, -0.0, 0.0),
    "huge": lambda rng, n: rng.standard_normal((n, 256)) * 1e30,
    "large": lambda rng, n: rng.standard_normal((n, 256)) * 1e6,
    "small": lambda rng, n: rng.standard_normal((n, 256)) * 1e-7,
    "tiny": lambda rng, n: rng.standard_normal((n, 256)) * 1e-30,
    "subnormal": lambda rng, n: rng.standard_normal((n, 256)) * 1e-40,
    "at the edge of subnormal": lambda rng, n: rng.standard_normal((n, 256)) * 1e-37,
    "one outlier": one_outlier,
    "groups of many sizes": lambda rng, n: (
        rng.standard_normal((n, 256)) * np.exp(4 * rng.standard_normal((n, 8))).repeat(32, axis=1)
    ),
    "groups of wild sizes": lambda rng, n: (
        rng.standard_normal((n, 256)) * np.exp(20 * rng.standard_normal((n, 16))).repeat(16, axis=1)
    ),
    "heavy tails": lambda rng, n: rng.standard_normal((n, 256)) * np.exp(3 * rng.standard_normal((n, 256))),
    "far from zero": lambda rng, n: (
        rng.standard_normal((n, 256)) * 1e-3 + rng.standard_normal((n, 8)).repeat(32, axis=1)
    ),
    "halves": lambda rng, n: rng.integers(-127, 128, (n, 256)) / 2,
    "few values": lambda rng, n: rng.integers(-3, 4, (n, 256)),
    "random bits": random_bits,
}


def rows_of(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """(n, 256) float32 rows of one of the kinds in ROWS."""
    return ROWS[kind](np.random.default_rng(seed), n).astype(np.float32)


def assert_reference_equals_fast(slow, fast, block_size: int, kind: str, n: int) -> None:
    blocks = rows_of(kind, n).reshape(-1, block_size)[:n]
    with np.errstate(all="ignore"):
        assert [slow(block) for block in blocks] == [block.tobytes() for block in fast(blocks)]


def back(data: np.ndarray, name: str) -> np.ndarray:
    """The weights of blocks, as ggml.blocks.dequantize gives them."""
    return dequantize(torch.from_numpy(data), name).numpy()
