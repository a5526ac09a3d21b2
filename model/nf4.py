"""NF4 with double quantization, the data type of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

A block of 64 weights is absmax, the largest absolute value in it, and for each weight 4 bits: the nearest of
16 values in [-1, 1], the quantiles of a normal distribution. The absmax of 256 blocks in a row of the file
share a float32 scale and have 8 bits each, after their mean over the whole matrix was taken away. So a weight
takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

    block   33 bytes: the absmax's 8 bits, then 32 bytes of two weights each, the first in the high half
    scales  (groups + 1, 4) uint8: a float32 scale for each 256 blocks, and last the mean of the absmax

    weight = VALUES[4 bits] * absmax,   absmax = dynamic_values()[8 bits] * scale + mean

The paper calls the absmax's type "8-bit floats". It is the dynamic type of bitsandbytes here (Dettmers 2015,
arXiv 1511.04561), whose create_dynamic_map gives the same 256 values.
"""

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F

from ggml.blocks import SLICE

BLOCK, BLOCK_BYTES, GROUP = 64, 33, 256
# bitsandbytes/functional.py, get_4bit_type("nf4")
VALUES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
VALUES += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
VALUES += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
VALUES += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
TINY = 1e-38  # A block of zeros is divided by this.


def dynamic_values() -> torch.Tensor:
    """Returns the 256 values of the dynamic 8-bit type in ascending order, float32.

    They are 0, 1, and for each exponent e of -6 to 0, 10^e times the middles of 2^(6 + e) equal parts of
    [0.1, 1], with both signs.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two weights of each byte, (256, 2), and the 256 values of an absmax."""
    values, byte = torch.tensor(VALUES), torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1).to(device), dynamic_values().to(device)


def _nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns for each x the index of the nearest of the ascending values, uint8; halves go down."""
    values = values.to(x.device)
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def quantize_nf4(pieces: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a matrix, given in pieces of whole rows; returns its blocks and its scales.

    Args:
        pieces: (rows, columns) each, of a multiple of 64 columns, on any device.

    Returns:
        blocks (all rows, columns / 64 * 33) uint8, and scales (groups + 1, 4) uint8.

    Raises:
        ValueError: a weight is not finite.
    """
    nibbles, tops, columns = [], [], 0
    for piece in pieces:
        columns, x = piece.shape[1], piece.float().reshape(-1, BLOCK)  # (n, 64)
        top = x.abs().amax(1)
        if not top.isfinite().all():
            raise ValueError("nf4: holds an infinity or NaN, which cannot be quantized; use finite weights")
        codes = _nearest(x * (1 / top.clamp(min=TINY))[:, None], torch.tensor(VALUES))
        nibbles.append(codes[:, ::2] << 4 | codes[:, 1::2])
        tops.append(top)
    absmax = torch.cat(tops)
    mean = absmax.mean()
    centered = F.pad(absmax - mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)  # (groups, 256)
    scale = centered.abs().amax(1)
    codes = _nearest(centered * (1 / scale.clamp(min=TINY))[:, None], dynamic_values()).view(-1, 1)
    blocks = torch.cat((codes[: len(absmax)], torch.cat(nibbles)), 1)  # (n, 33)
    scales = torch.cat((scale, mean[None])).view(torch.uint8).view(-1, 4)
    return blocks.view(-1, columns // BLOCK * BLOCK_BYTES), scales


def dequantize_nf4(
    blocks: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | slice, dtype: torch.dtype
) -> torch.Tensor:
    """Returns some rows of a matrix that quantize_nf4 made, computed in float32 and cast to `dtype`."""
    n_blocks, device = blocks.shape[1] // BLOCK_BYTES, blocks.device  # of a row
    pairs, dynamic = _tables(device)
    numbers, blocks = torch.arange(len(blocks), device=device)[rows], blocks[rows]
    *_, mean = scale = scales.view(torch.float32)[:, 0]
    out = torch.empty((len(blocks), n_blocks * BLOCK), dtype=dtype, device=device)
    height = max(1, SLICE // out.shape[1])
    for i in range(0, len(blocks), height):
        piece, number = blocks[i : i + height].reshape(-1, BLOCK_BYTES), numbers[i : i + height]  # (n, 33)
        group = (number[:, None] * n_blocks + torch.arange(n_blocks, device=device)).flatten() // GROUP
        absmax = dynamic[piece[:, 0].int()] * scale[group] + mean  # (n,)
        weights = F.embedding(piece[:, 1:].int(), pairs).view(-1, BLOCK) * absmax[:, None]
        out[i : i + height] = weights.view(-1, out.shape[1])
    return out
