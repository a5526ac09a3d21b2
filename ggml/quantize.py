"""GGML's number types: float32 weights to the bytes that a GGUF file holds, and back; and which tensor takes
which type.

A row of weights is cut into blocks, each stored alone: ggml/blocks.py has the types of 32 weights a block,
ggml/kquants.py and ggml/q6_k.py those of 256; they say a block's layout and how its scales are found. The
bytes equal llama.cpp's own (ggml_quantize_chunk without an importance matrix) and the choice of types its
llama_model_quantize (src/llama-quant.cpp), so that a file written here equals one that was quantised there.
"""

from typing import NamedTuple

import numpy as np

from ggml.blocks import (
    fast_q5_1,
    fast_q8_0,
    fast_q45_0,
    reference_q5_1,
    reference_q8_0,
    reference_q45_0,
    weights_q8_0,
    weights_q45,
)
from ggml.kquants import fast_q45_k, reference_q45_k, weights_q45_k
from ggml.q6_k import fast_q6_k, reference_q6_k, weights_q6_k

SLICE = (
    2**17
)  # weights that are quantised at a time: the arrays between then take some MiB, whatever the tensor's size


class QuantType(NamedTuple):
    """A type of number: its name, its id in a GGUF file, and that `block_size` weights take `block_bytes`
    bytes.
    """

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int


TYPES = {
    row[0]: QuantType(*row)
    for row in [
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("bf16", 30, 1, 2),
    ]
}
# What a file of each --quant says of itself in general.file_type; llama.cpp calls q4_k and q5_k Q4_K_S and
# Q5_K_S.
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k": 14,
    "q4_k_m": 15,
    "q5_k": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "bf16": 32,
}
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # for rows that are no whole number of 256-blocks


def row_bytes(name: str, n_cols: int) -> int:
    """Bytes of one row of `n_cols` weights; raises ValueError if they are no whole number of blocks."""
    quant = TYPES[name]
    if n_cols % quant.block_size:
        raise ValueError(
            f"{name}: a row of {n_cols} weights is no multiple of {quant.block_size}; take "
            f"{FALLBACK.get(name, 'f16')} for this tensor"
        )
    return n_cols // quant.block_size * quant.block_bytes


def quantize(rows: np.ndarray, name: str) -> np.ndarray:
    """(n_rows, n_cols) float32 -> (n_rows, row_bytes) uint8, a slice of rows at a time.

    Raises ValueError if n_cols is no multiple of the type's block size, or if a weight is not finite.
    """
    n_rows, n_cols = rows.shape
    out = np.empty((n_rows, row_bytes(name, n_cols)), np.uint8)
    height = max(1, SLICE // max(1, n_cols))
    with np.errstate(all="ignore"):  # 1 / 0 and the like are expected, and dealt with where they arise
        for i in range(0, n_rows, height):
            piece = np.ascontiguousarray(rows[i : i + height], np.float32)
            if not np.isfinite(piece).all():
                row = i + int(np.argmin(np.isfinite(piece).all(axis=1)))
                raise ValueError(
                    f"{name}: row {row} holds an infinity or NaN, which cannot be quantised; export a run "
                    f"whose weights are finite"
                )
            blocks = piece.reshape(-1, TYPES[name].block_size)
            out[i : i + height] = _quantize_blocks(blocks, name).reshape(len(piece), -1)
    return out


def _quantize_blocks(x: np.ndarray, name: str) -> np.ndarray:
    """(n, block_size) float32 -> (n, block_bytes) uint8."""
    if name == "f32":
        return x.astype("<f4", copy=False).view(np.uint8)
    if name == "f16":
        return x.astype("<f2").view(np.uint8)
    if name == "bf16":
        bits = x.view(np.uint32)
        # The upper 16 bits of a float32, rounded: adding just below a half carries, or a half where the last
        # bit kept is odd (halves to even).
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)
    if name == "q8_0":
        return fast_q8_0(x)
    if name == "q5_1":
        return fast_q5_1(x)
    if name in ("q4_0", "q5_0"):
        return fast_q45_0(x, name)
    return fast_q6_k(x) if name == "q6_k" else fast_q45_k(x, name)


def reference_quantize_block(values: np.ndarray, name: str) -> bytes:
    """One block of (block_size,) float32 weights to bytes by the form of the algorithm that explains it; for
    tests and for reading.
    """
    values = np.asarray(values, np.float32)
    assert values.shape == (TYPES[name].block_size,), (values.shape, name)
    with np.errstate(all="ignore"):
        if name == "q8_0":
            return reference_q8_0(values)
        if name == "q5_1":
            return reference_q5_1(values)
        if name in ("q4_0", "q5_0"):
            return reference_q45_0(values, name)
        return reference_q6_k(values) if name == "q6_k" else reference_q45_k(values, name)


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """(n_rows, row_bytes) uint8 -> (n_rows, n_cols) float32: the weights that a reader of the file computes
    with.

    Raises ValueError if row_bytes is no whole number of the type's blocks.
    """
    quant, (n_rows, n_bytes) = TYPES[name], data.shape
    if n_bytes % quant.block_bytes:
        raise ValueError(
            f"{name}: a row of {n_bytes} bytes is no multiple of {quant.block_bytes}; the data is of another "
            f"type, or cut off"
        )
    out = np.empty((n_rows, n_bytes // quant.block_bytes * quant.block_size), np.float32)
    height = max(1, SLICE // max(1, out.shape[1]))
    with np.errstate(
        all="ignore"
    ):  # a scale past float16's range is stored as infinity, and infinity times 0 is a NaN
        for i in range(0, n_rows, height):
            blocks = np.ascontiguousarray(data[i : i + height]).reshape(-1, quant.block_bytes)
            out[i : i + height] = _dequantize_blocks(blocks, name).reshape(-1, out.shape[1])
    return out


def _dequantize_blocks(blocks: np.ndarray, name: str) -> np.ndarray:
    """(n, block_bytes) uint8 -> (n, block_size) float32."""
    if name == "f32":
        return blocks.view("<f4")
    if name == "f16":
        return blocks.view("<f2").astype(np.float32)
    if name == "bf16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if name == "q8_0":
        return weights_q8_0(blocks)
    if name in ("q4_0", "q5_0", "q5_1"):
        return weights_q45(blocks, name)
    return weights_q6_k(blocks) if name == "q6_k" else weights_q45_k(blocks, name)


def tensor_type(mix: str, tensor_name: str, n_layers: int, n_cols: int, tied: bool = True) -> str:
    """The type that a GGUF tensor with rows of `n_cols` weights takes in a file of --quant `mix`, in a model
    of `n_layers`.

    As llama_model_quantize chooses (src/llama-quant.cpp, llama_tensor_get_type_impl and
    tensor_type_fallback), q4_k and q5_k as its Q4_K_S and Q5_K_S:
    - norms stay f32, and every matrix of an f32, f16 or bf16 file has that type;
    - the output matrix, where an error costs most, takes q8_0 in q8_0, else q6_k: token_embd.weight in a tied
    model, output.weight in another;
    - attn_v and ffn_down take q6_k in q4_k_m and q5_k_m, in the first and the last eighth of the layers and
    in every third between;
    - in q4_k the first four attn_v and the first eighth of the ffn_down take q5_k;
    - the rest takes the type that the mix is named after. Where rows are no multiple of 256, FALLBACK's type
    is taken instead; where they are no multiple of 32, f16. Raises ValueError for an unknown mix.
    """
    if mix not in FILE_TYPES:
        raise ValueError(f"--quant {mix}: no such type; take one of {', '.join(FILE_TYPES)}")
    if tensor_name.endswith("_norm.weight"):
        return "f32"
    chosen = mix.removesuffix("_m")
    if TYPES[chosen].block_size == 1:
        return chosen
    if tensor_name == ("token_embd.weight" if tied else "output.weight"):
        chosen = "q8_0" if chosen == "q8_0" else "q6_k"
    elif tensor_name.endswith((".attn_v.weight", ".ffn_down.weight")):
        chosen = _more_bits(chosen, mix, tensor_name, n_layers)
    if n_cols % TYPES[chosen].block_size:
        chosen = FALLBACK.get(chosen, "f16")
    return chosen if n_cols % TYPES[chosen].block_size == 0 else "f16"


def _more_bits(chosen: str, mix: str, tensor_name: str, n_layers: int) -> str:
    """The type of an attn_v or ffn_down matrix: the ones whose error shows most in what the model says."""
    layer, eighth = int(tensor_name.split(".")[1]), n_layers // 8
    if mix.endswith("_m") and (layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2):
        return "q6_k"
    if mix == "q4_k" and layer < (4 if "attn_v" in tensor_name else eighth):
        return "q5_k"
    return chosen
