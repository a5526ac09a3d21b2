"""ggml/quantize.py: bytes and choice of types equal llama.cpp's, dequantized weights the gguf package's."""

import tracemalloc
from collections import Counter

import gguf
import numpy as np
import pytest
import torch

import ggml.quantize
from ggml.blocks import FALLBACK, TYPES, dequantize, row_bytes, type_of
from ggml.quantize import FILE_TYPES, quantize, tensor_type
from tests.ggml.ggml import ROWS, back, ggml_quantize, rows_of

READ_ONLY = ["q4_1", "q2_k", "q3_k"]  # llama.cpp writes these types, and Loupe does not.
WRITTEN = [name for name in TYPES if name not in READ_ONLY]
OTHERS = "iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s iq4_nl iq4_xs tq1_0 tq2_0 mxfp4".split()
BLOCK_TYPES = [name for name, quant in TYPES.items() if quant.block_size > 1]
WIDTHS = {"f32": np.float32, "f16": np.float16}  # gguf's dequantize takes these as numbers, not bytes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_equal_llama_cpps_on_rows_of_every_kind(name, kind):
    rows = rows_of(kind, 150)
    assert (quantize(rows, name) == ggml_quantize(rows, TYPES[name].ggml_id)).all()


@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (70, 768), (2, 2**17 + 256), (600, 1024)])
@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_equal_llama_cpps_for_every_shape(name, shape):
    rows = normal(*shape) * 0.05
    assert (quantize(rows, name) == ggml_quantize(rows, TYPES[name].ggml_id)).all()


@pytest.mark.parametrize("n_cols", [32, 96, 640, 1152])
@pytest.mark.parametrize(
    "name", [name for name, quant in TYPES.items() if quant.block_size <= 32 and name in WRITTEN]
)
def test_bytes_equal_llama_cpps_on_rows_that_are_no_multiple_of_256(name, n_cols):
    rows = normal(201, n_cols) * np.exp(3 * normal(201, n_cols, seed=1))
    assert (quantize(rows, name) == ggml_quantize(rows, TYPES[name].ggml_id)).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", WRITTEN)
def test_weights_that_come_back_equal_the_gguf_packages_bit_for_bit(name, kind):
    data = quantize(rows_of(kind, 20, seed=1), name)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(
            data.view(WIDTHS.get(name, np.uint8)), gguf.GGMLQuantizationType(TYPES[name].ggml_id)
        )
    ours = back(data, name)
    assert ours.shape == (20, 256) and ours.dtype == np.float32
    assert (ours.view(np.uint32) == theirs.astype(np.float32).view(np.uint32)).all()


def test_any_bytes_are_read_as_the_gguf_package_reads_them():
    for name in BLOCK_TYPES:
        data = np.random.default_rng(2).integers(0, 256, (40, 2 * TYPES[name].block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(TYPES[name].ggml_id))
        np.testing.assert_array_equal(back(data, name), theirs)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", READ_ONLY)
def test_blocks_that_llama_cpp_wrote_are_read_as_the_gguf_package_reads_them(name, kind):
    data = ggml_quantize(rows_of(kind, 20, seed=1), TYPES[name].ggml_id)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(TYPES[name].ggml_id))
    np.testing.assert_array_equal(back(data, name).view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", OTHERS)
def test_types_without_a_formula_here_are_read_through_the_gguf_package(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    quant = type_of(kind)
    assert quant == (name, kind, *gguf.GGML_QUANT_SIZES[kind])
    data = np.random.default_rng(3).integers(0, 256, (5, row_bytes(name, 512)), np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = back(data, name), gguf.quants.dequantize(data, kind)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (5, 512) and type_of(4711) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_gpu_reads_the_same_weights(name):
    data = torch.from_numpy(
        np.random.default_rng(4).integers(0, 256, (40, 2 * TYPES[name].block_bytes), np.uint8)
    )
    torch.testing.assert_close(
        dequantize(data.cuda(), name).cpu(), dequantize(data, name), rtol=0, atol=0, equal_nan=True
    )


def test_ids_sizes_and_file_types_are_the_gguf_packages():
    for name, quant in TYPES.items():
        theirs = gguf.GGMLQuantizationType[name.upper()]
        assert (quant.name, quant.ggml_id, (quant.block_size, quant.block_bytes)) == (
            name,
            theirs,
            gguf.GGML_QUANT_SIZES[theirs],
        )
    for name, number in FILE_TYPES.items():
        suffix = {"q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}.get(name, name.upper())
        assert number == gguf.LlamaFileType["ALL_F32" if name == "f32" else f"MOSTLY_{suffix}"], name
    assert row_bytes("q4_k", 512) == 288 and row_bytes("q8_0", 640) == 680 and row_bytes("f32", 3) == 12


def test_more_bits_lose_less():
    rows = normal(64, 1024)
    errors = {name: float(np.square(back(quantize(rows, name), name) - rows).mean()) for name in WRITTEN}
    order = ["q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "bf16", "f16", "f32"]
    assert sorted(order, key=errors.get, reverse=True) == order
    assert errors["f32"] == 0


@pytest.mark.parametrize("name", WRITTEN)
def test_a_row_alone_has_the_bytes_that_it_has_among_others(name, monkeypatch):
    rows = normal(9, 512)
    together = quantize(rows, name)
    monkeypatch.setattr(ggml.quantize, "SLICE", 1024)
    assert (quantize(rows, name) == together).all()
    assert (np.concatenate([quantize(rows[i : i + 1], name) for i in range(9)]) == together).all()
    assert (quantize(np.asfortranarray(rows), name) == together).all()
    assert (back(together, name) == np.concatenate([back(together[i : i + 1], name) for i in range(9)])).all()


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q8_0"])
def test_memory_beside_input_and_output_does_not_grow_with_the_tensor(name):
    rows = np.zeros((2**11, 2**10), np.float32)
    tracemalloc.start()
    try:
        data = quantize(rows, name)
        assert tracemalloc.get_traced_memory()[1] - data.nbytes < 2**23  # the rows are 2**23 bytes
    finally:
        tracemalloc.stop()


# errors


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name in WRITTEN])
def test_a_row_that_is_no_multiple_of_the_block_is_refused_with_the_type_to_take(name):
    size, remedy = TYPES[name].block_size, FALLBACK.get(name, "f16")
    with pytest.raises(
        ValueError, match=f"{name}: .* {size + 16} weights .* multiple of {size}; take {remedy}"
    ):
        quantize(np.zeros((2, size + 16), np.float32), name)
    with pytest.raises(ValueError, match=f"{name}: a row of {TYPES[name].block_bytes + 1} bytes"):
        back(np.zeros((2, TYPES[name].block_bytes + 1), np.uint8), name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_that_is_not_finite_is_refused_with_its_row(name, value):
    rows = np.zeros((2000, 256), np.float32)
    rows[1234, 100] = value
    with pytest.raises(ValueError, match=f"{name}: row 1234 holds an infinity or NaN"):
        quantize(rows, name)


# the type of a tensor


def gemma3(n_layers: int, hidden: int, q_out: int, ff: int) -> dict[str, int]:
    """Returns {tensor in the GGUF file: weights in a row}, with the norms."""
    layer = {
        "attn_q": hidden,
        "attn_k": hidden,
        "attn_v": hidden,
        "attn_output": q_out,
        "ffn_gate": hidden,
        "ffn_up": hidden,
        "ffn_down": ff,
        "attn_q_norm": 256,
        "attn_k_norm": 256,
        "attn_norm": hidden,
        "post_attention_norm": hidden,
        "ffn_norm": hidden,
        "post_ffw_norm": hidden,
    }
    names = {f"blk.{i}.{name}.weight": n_cols for i in range(n_layers) for name, n_cols in layer.items()}
    return {"token_embd.weight": hidden, "output_norm.weight": hidden} | names


SIZES = {
    "270M": gemma3(18, 640, 1024, 2048),
    "1B": gemma3(26, 1152, 1024, 6912),
    "27B": gemma3(62, 5376, 4096, 21504),
    "small": gemma3(7, 64, 64, 96),
}
LAYERS = {"270M": 18, "1B": 26, "27B": 62, "small": 7}
# How many tensors of each type llama_model_quantize (llama.cpp v0.5.0, the npm package
# @node-llama-cpp/linux-x64) made of files with as many layers, and with rows that are multiples of 256, or of
# 32 only, where these are; beside the norms, which stayed F32.
COUNTED = [
    ("270M", "q4_k_m", {"q8_0": 10, "q5_0": 81, "q4_k": 27, "q6_k": 9}),
    ("270M", "q5_k_m", {"q8_0": 10, "q5_1": 81, "q5_k": 27, "q6_k": 9}),
    ("270M", "q4_k", {"q8_0": 1, "q5_0": 86, "q4_k": 34, "q5_1": 4, "q5_k": 2}),
    ("270M", "q5_k", {"q8_0": 1, "q5_1": 90, "q5_k": 36}),
    ("270M", "q6_k", {"q8_0": 91, "q6_k": 36}),
    ("270M", "q4_0", {"q8_0": 1, "q4_0": 126}),
    ("270M", "q5_0", {"q8_0": 1, "q5_0": 126}),
    ("270M", "q5_1", {"q8_0": 1, "q5_1": 126}),
    ("270M", "q8_0", {"q8_0": 127}),
    ("270M", "bf16", {"bf16": 127}),
    ("1B", "q4_k_m", {"q8_0": 14, "q5_0": 117, "q4_k": 39, "q6_k": 13}),
    ("1B", "q5_k_m", {"q8_0": 14, "q5_1": 117, "q5_k": 39, "q6_k": 13}),
    ("1B", "q4_k", {"q8_0": 1, "q5_0": 126, "q4_k": 49, "q5_1": 4, "q5_k": 3}),
    ("27B", "q4_k_m", {"q6_k": 61, "q4_k": 374}),
    ("27B", "q5_k_m", {"q6_k": 61, "q5_k": 374}),
    ("27B", "q4_k", {"q6_k": 1, "q4_k": 423, "q5_k": 11}),
    ("27B", "q5_k", {"q6_k": 1, "q5_k": 434}),
    ("27B", "q4_0", {"q6_k": 1, "q4_0": 434}),
    ("27B", "q5_1", {"q6_k": 1, "q5_1": 434}),
    ("small", "q4_k_m", {"q8_0": 7, "q5_0": 43}),
    ("small", "q5_k_m", {"q8_0": 7, "q5_1": 43}),
    ("small", "q4_k", {"q8_0": 1, "q5_0": 45, "q5_1": 4}),
    ("small", "q6_k", {"q8_0": 50}),
]


@pytest.mark.parametrize(("size", "mix", "expected"), COUNTED)
def test_a_file_has_as_many_tensors_of_each_type_as_llama_cpps(size, mix, expected):
    types = Counter(
        tensor_type(mix, name, LAYERS[size], n_cols)
        for name, n_cols in SIZES[size].items()
        if not name.endswith("_norm.weight")
    )
    assert types == expected


def test_q4_k_m_at_the_270m_shape_takes_these_types():
    types = {name: tensor_type("q4_k_m", name, 18, n_cols) for name, n_cols in SIZES["270M"].items()}
    assert (
        types["token_embd.weight"] == "q8_0"
        and types["output_norm.weight"] == "f32"
        and types["blk.3.attn_q_norm.weight"] == "f32"
    )
    assert {
        types[f"blk.{i}.{name}.weight"]
        for i in range(18)
        for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up")
    } == {"q5_0"}
    more = {0, 1, 4, 7, 10, 13, 15, 16, 17}
    for i in range(18):
        assert types[f"blk.{i}.attn_output.weight"] == "q4_k"
        assert types[f"blk.{i}.ffn_down.weight"] == ("q6_k" if i in more else "q4_k")
        assert types[f"blk.{i}.attn_v.weight"] == ("q8_0" if i in more else "q5_0")


def test_q4_k_as_q4_k_s_gives_the_first_values_and_downs_one_bit_more():
    types = {name: tensor_type("q4_k", name, 62, n_cols) for name, n_cols in SIZES["27B"].items()}
    assert [i for i in range(62) if types[f"blk.{i}.attn_v.weight"] == "q5_k"] == [0, 1, 2, 3]
    assert [i for i in range(62) if types[f"blk.{i}.ffn_down.weight"] == "q5_k"] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("mix", "output", "embedding"),
    [("q4_k_m", "q6_k", "q4_k"), ("q5_k", "q6_k", "q5_k"), ("q4_0", "q6_k", "q4_0"), ("q8_0",) * 3],
)
def test_the_output_matrix_of_an_untied_model_has_more_bits_and_its_embedding_has_not(mix, output, embedding):
    assert [tensor_type(mix, f"{name}.weight", 18, 256, tied=False) for name in ("output", "token_embd")] == [
        output,
        embedding,
    ]
    assert tensor_type(mix, "token_embd.weight", 18, 256) == output


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mix", FILE_TYPES)
def test_every_tensor_of_every_size_takes_a_type_that_its_rows_fit(mix, size):
    for name, n_cols in SIZES[size].items():
        row_bytes(tensor_type(mix, name, LAYERS[size], n_cols), n_cols)
        assert (
            name.endswith("_norm.weight") == (tensor_type(mix, name, LAYERS[size], n_cols) == "f32")
            or mix == "f32"
        )


@pytest.mark.parametrize("mix", [mix for mix in FILE_TYPES if mix.startswith("q")])
def test_rows_that_are_no_multiple_of_32_take_f16(mix):
    assert {
        tensor_type(mix, name, 2, 48)
        for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_up.weight")
    } == {"f16"}


def test_an_unknown_mix_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="--quant q4_1: no such type; take one of f32, f16, .*q4_k_m"):
        tensor_type("q4_1", "token_embd.weight", 18, 640)
