"""Quantizes float32 weights to blocks of a GGUF file, and chooses the block type of each tensor.

The bytes equal those of llama.cpp's ggml_quantize_chunk without an importance matrix, and the types equal
those that its llama_model_quantize chooses (src/llama-quant.cpp). The types with 32 weights per block are
here, those with 256 in ggml/kquants.py. ggml/blocks.py describes the layouts of the blocks, and
tests/ggml/reference_quantizers.py has a simple version of each quantizer for a single block.
"""

import numpy as np

from ggml.blocks import FALLBACK, TYPES, row_bytes
from ggml.kquants import fast_q6_k, fast_q45_k

f32, u8 = np.float32, np.uint8
SLICE = 2**17  # This many weights are quantized at a time, so that temporary arrays take some MiB.
HALF = {"q4_0": 8, "q5_0": 16}  # The level of the weight 0.
# general.file_type of a file for each --quant; llama.cpp's names of q4_k and q5_k are Q4_K_S and Q5_K_S.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "q5_1": 9}
FILE_TYPES |= {"q4_k": 14, "q4_k_m": 15, "q5_k": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32}


def quantize(rows: np.ndarray, name: str) -> np.ndarray:
    """Quantizes weights (n_rows, n_cols) to the block type `name`; returns (n_rows, bytes of a row) uint8.

    Raises ValueError if n_cols is no multiple of the type's block size, or if a weight is not finite.
    """
    n_rows, n_cols = rows.shape
    out = np.empty((n_rows, row_bytes(name, n_cols)), np.uint8)
    height = max(1, SLICE // max(1, n_cols))
    with np.errstate(all="ignore"):  # 1 / 0 and 0 / 0 occur, and their results are replaced.
        for i in range(0, n_rows, height):
            piece = np.ascontiguousarray(rows[i : i + height], np.float32)
            finite_rows = np.isfinite(piece).all(axis=1)
            if not finite_rows.all():
                where = f"{name}: row {i + int(np.argmin(finite_rows))} holds an infinity or NaN"
                raise ValueError(f"{where}, which cannot be quantized; export a run whose weights are finite")
            blocks = _quantize_blocks(piece.reshape(-1, TYPES[name].block_size), name)
            out[i : i + height] = blocks.reshape(len(piece), -1)
    return out


def _quantize_blocks(x: np.ndarray, name: str) -> np.ndarray:
    """Quantizes x (n, block_size) float32 to blocks (n, block_bytes) uint8 of the type `name`."""
    if name == "f32":
        return x.astype("<f4", copy=False).view(np.uint8)
    if name == "f16":
        return x.astype("<f2").view(np.uint8)
    if name == "bf16":
        # The upper 16 bits, rounded to nearest, halves to even: add 0x7FFF, or 0x8000 if the last kept bit is
        # odd, so that a carry rounds up.
        bits = x.view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)
    if name == "q8_0":
        return fast_q8_0(x)
    if name == "q5_1":
        return fast_q5_1(x)
    if name in HALF:
        return fast_q45_0(x, name)
    return fast_q6_k(x) if name == "q6_k" else fast_q45_k(x, name)


def fast_q8_0(x: np.ndarray) -> np.ndarray:
    """Quantizes x (n, 32) float32 to Q8_0 blocks (n, 34) uint8."""
    d = np.abs(x).max(axis=1, keepdims=True) / f32(127)  # (n, 1)
    v = x * inverse_of(d)
    whole = np.trunc(v)
    # Halves round away from 0. trunc(v + 0.5) would round 0.49999997 up, because the sum is rounded.
    whole += np.trunc(f32(2) * (v - whole))
    return np.concatenate([half_bytes(d), finite(whole).astype(np.int8).view(u8)], axis=1)


def fast_q45_0(x: np.ndarray, name: str) -> np.ndarray:
    """Quantizes x (n, 32) float32 to blocks of Q4_0 (n, 18) or Q5_0 (n, 22), uint8."""
    half = HALF[name]
    # The first of two weights that differ in their sign only.
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = np.where(largest == 0, f32(0), largest) / f32(-half)  # -0 for a block of zeros of either sign
    q = np.minimum(finite(x * inverse_of(d) + f32(half + 0.5)).astype(u8), u8(2 * half - 1))
    return np.concatenate([half_bytes(d), fast_pack(q, name)], axis=1)


def fast_q5_1(x: np.ndarray) -> np.ndarray:
    """Quantizes x (n, 32) float32 to Q5_1 blocks (n, 24) uint8."""
    # The first of 0 and -0, because its sign is stored; x.min() may return either.
    low = np.take_along_axis(x, x.argmin(axis=1)[:, None], axis=1)
    d = np.abs(x.max(axis=1, keepdims=True) - low) / f32(31)  # abs: -0 - 0 is -0
    q = finite((x - low) * inverse_of(d) + f32(0.5)).astype(u8)
    return np.concatenate([half_bytes(d), half_bytes(low), fast_pack(q, "q5_1")], axis=1)


def inverse_of(d: np.ndarray) -> np.ndarray:
    return np.where(d != 0, f32(1) / d, f32(0))


def finite(v: np.ndarray) -> np.ndarray:
    """Returns v with infinities and NaN replaced by 0; they occur if a block's scale d is close to zero."""
    return np.where(np.isfinite(v), v, f32(0))


def half_bytes(d: np.ndarray) -> np.ndarray:
    """Converts d (n, 1) to little-endian float16 and returns the bytes, (n, 2) uint8."""
    return d.astype("<f2").view(u8)


def fast_pack(q: np.ndarray, name: str) -> np.ndarray:
    """Packs levels (n, 32) uint8: their low 4 bits into (n, 16), for Q5 types after the fifth bits (n, 4)."""
    nibbles = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
    if name == "q4_0":
        return nibbles
    return np.concatenate([np.packbits(q >> 4, axis=1, bitorder="little"), nibbles], axis=1)


def tensor_type(mix: str, tensor_name: str, n_layers: int, n_cols: int, tied: bool = True) -> str:
    """Returns the block type of a GGUF tensor with n_cols weights per row, in a file made with --quant `mix`.

    The choice is llama.cpp's (src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback). Its
    names of q4_k and q5_k are Q4_K_S and Q5_K_S.
    - Norms are f32. In an f32, f16 or bf16 file, every matrix has that type.
    - The output matrix, in which an error costs most, is q8_0 in a q8_0 file, and q6_k in the others. It is
      token_embd.weight if `tied`, otherwise output.weight.
    - In q4_k_m and q5_k_m, attn_v and ffn_down are q6_k in the first and the last eighth of the layers, and
      in every third layer between.
    - In q4_k, attn_v is q5_k in the first four layers, and ffn_down in the first eighth of the layers.
    - All other matrices have the type in the mix's name.
    A type whose blocks do not divide n_cols is replaced by its entry in FALLBACK, or else by f16. Raises
    ValueError for an unknown mix.
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
    """Returns the type of an attn_v or ffn_down matrix: `chosen`, or in some layers one with more bits."""
    layer, eighth = int(tensor_name.split(".")[1]), n_layers // 8
    if mix.endswith("_m") and (layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2):
        return "q6_k"
    if mix == "q4_k" and layer < (4 if "attn_v" in tensor_name else eighth):
        return "q5_k"
    return chosen
