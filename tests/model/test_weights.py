"""model/weights.py: transformers' files are read to the same bits and the reverse; broken ones are named."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import SHOWN
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.weights import (
    HASH_WHOLE,
    INDEX,
    SINGLE,
    Checkpoint,
    _hash_sample,
    hash_model,
    load_model,
    save_model,
)
from tests.folders import ROOT, TINY_VISION

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 128,
}
EMBEDDING = "model.embed_tokens.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
SHARDS = [10**9, 20_000]  # bytes of a shard: one file, and several


def our_config(**changes) -> Gemma3Config:
    layers = changes.get("num_hidden_layers", TEXT["num_hidden_layers"])
    kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    return Gemma3Config(**(TEXT | {"layer_types": kinds} | changes))


def our_model(seed: int = 0, **changes) -> Gemma3ForCausalLM:
    model = Gemma3ForCausalLM(our_config(**changes))
    model.reset_parameters(seed, std=0.5)
    return model


@pytest.fixture
def tensors(tmp_path) -> dict:
    """The tensors of the model that is saved in tmp_path, for a test to change and to save over it."""
    save_model(our_model(), tmp_path, torch.float32)
    return {name: t.clone() for name, t in load_file(tmp_path / SINGLE).items()}  # load_file maps the file


def parameters_of(model) -> dict:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(ours, expected: dict):
    torch.testing.assert_close(parameters_of(ours), expected, atol=0, rtol=0)


# reading what transformers writes


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_text_checkpoint_loads_to_equal_tensors_whole_or_sharded(tmp_path, shard):
    from transformers import Gemma3ForCausalLM as Reference
    from transformers import Gemma3TextConfig

    reference = Reference(Gemma3TextConfig(**TEXT))
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard == "20KB")
    assert_same_weights(load_model(tmp_path, torch.float32), parameters_of(reference))


def test_a_multimodal_checkpoint_loads_its_text_part_and_leaves_the_vision_out(tmp_path):
    from transformers import Gemma3Config as ReferenceConfig
    from transformers import Gemma3ForConditionalGeneration

    configs = {"text_config": TEXT, "vision_config": TINY_VISION, "mm_tokens_per_image": 1}
    reference = Gemma3ForConditionalGeneration(ReferenceConfig(**configs))
    reference.save_pretrained(tmp_path)
    stored = " ".join(load_file(tmp_path / SINGLE))
    assert "vision_tower" in stored and "multi_modal_projector" in stored
    expected = {f"model.{name}": p.detach() for name, p in reference.model.language_model.named_parameters()}
    assert_same_weights(load_model(tmp_path, torch.float32), expected)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_every_prefix_that_was_ever_published_means_the_same_tensor(tmp_path, tensors, prefix):
    renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    for name in ("vision_tower.embeddings.weight", "multi_modal_projector.mm_input_projection_weight"):
        renamed[name] = torch.ones(2)
    save_file(renamed, tmp_path / SINGLE)
    assert_same_weights(load_model(tmp_path, torch.float32), tensors)


HEADS = ["lm_head.weight", "language_model.lm_head.weight"]


@pytest.mark.fault("untied head")
@pytest.mark.parametrize("name", HEADS)
def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path, tensors, name):
    save_file(tensors | {name: tensors[EMBEDDING].clone()}, tmp_path / SINGLE)
    assert_same_weights(load_model(tmp_path, torch.float32), tensors)


@pytest.mark.fault("untied head")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_differs_from_the_embedding_under_a_tied_config_is_refused_until_it_is_untied(
    tmp_path, tensors, name, monkeypatch
):
    monkeypatch.setattr("model.weights.SLICE", 7 * 32)  # The last of several slices has the difference.
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 1
    save_file(tensors | {name: head}, tmp_path / SINGLE)
    message = f"tied: {name} differs from {EMBEDDING}, but config.json has tie_word_embeddings true: set it"
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(load_model(tmp_path, torch.float32).head_weight, head)


def test_an_untied_head_is_loaded_and_required(tmp_path):
    model = our_model(tie_word_embeddings=False)
    save_model(model, tmp_path, torch.float32)
    assert torch.equal(load_model(tmp_path, torch.float32).lm_head.weight, model.lm_head.weight)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \(96, 32\)"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast_to_the_dtype_asked_for_by_rounding(tmp_path, tensors, dtype):
    assert_same_weights(load_model(tmp_path, dtype), {name: t.to(dtype) for name, t in tensors.items()})


@pytest.mark.usefixtures("tensors")
def test_loaded_weights_begin_at_cache_lines_and_share_no_byte(tmp_path):
    weights = load_model(tmp_path, torch.bfloat16).parameters()
    places = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in weights)
    assert all(start % 64 == 0 for start, _ in places)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def test_loaded_weights_outlive_the_file_that_they_came_from(tmp_path, tensors):
    """The file is overwritten in place: weights that map it would change."""
    model = load_model(tmp_path, torch.float32)
    with open(tmp_path / SINGLE, "r+b") as f:
        f.write(bytes((tmp_path / SINGLE).stat().st_size))
    assert_same_weights(model, tensors)


# errors


def refused(folder: Path, *parts: str) -> str:
    """Checks that the error of loading has these parts, and returns it."""
    with pytest.raises(ValueError) as caught:
        load_model(folder, torch.float32)
    assert all(part in str(caught.value) for part in parts), caught.value
    return str(caught.value)


def test_every_missing_unexpected_and_misshapen_tensor_is_in_one_error(tmp_path, tensors):
    del tensors["model.layers.3.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 64)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, tmp_path / SINGLE)
    refused(
        tmp_path,
        str(tmp_path),
        "missing: model.layers.3.mlp.up_proj.weight (48, 32)",
        "missing: model.norm.weight (32,)",
        "unexpected: model.layers.9.mlp.up_proj.weight (48, 32)",
        "misshapen: model.layers.0.self_attn.q_proj.weight is (32, 64), but config.json makes it (64, 32)",
    )


def test_at_most_20_tensors_are_shown_and_the_rest_counted(tmp_path, tensors):
    save_file({EMBEDDING: tensors[EMBEDDING]}, tmp_path / SINGLE)
    message = refused(tmp_path, f"and {len(tensors) - 1 - 20} more")
    assert message.count("missing:") == SHOWN == 20


def test_embedding_rows_that_differ_from_vocab_size_are_part_of_the_same_error(tmp_path, tensors):
    tensors[EMBEDDING] = torch.zeros(100, 32)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / SINGLE)
    misshapen = "misshapen: model.embed_tokens.weight has 100 rows, but config.json's vocab_size is 96"
    refused(tmp_path, misshapen, "missing: model.norm.weight")


def test_a_tensor_stored_twice_under_two_prefixes_is_refused(tmp_path, tensors):
    save_file(tensors | {"language_model.model.norm.weight": torch.zeros(32)}, tmp_path / SINGLE)
    refused(tmp_path, "twice: model.norm.weight", "language_model.model.norm.weight")


def test_a_quantized_tensor_is_refused_by_its_dtype(tmp_path, tensors):
    save_file(tensors | {UP_PROJ: torch.zeros(48, 32, dtype=torch.uint8)}, tmp_path / SINGLE)
    refused(tmp_path, f"quantized: {UP_PROJ} is stored as U8")


@pytest.mark.fault("pickle")
@pytest.mark.usefixtures("tensors")
@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_unopened_and_the_conversion_named(tmp_path, pickle):
    (tmp_path / SINGLE).unlink()
    (tmp_path / pickle).write_bytes(b"never read")
    refused(tmp_path, pickle, "can run any code", "save_pretrained")


@pytest.mark.usefixtures("tensors")
def test_a_folder_without_weights_says_what_a_model_folder_holds(tmp_path):
    (tmp_path / SINGLE).unlink()
    refused(tmp_path, str(tmp_path), SINGLE, INDEX)


def test_a_gguf_file_beside_safetensors_is_another_model_and_one_alone_is_to_be_named(tmp_path, tensors):
    (tmp_path / "model.gguf").write_bytes(b"never read")
    assert_same_weights(load_model(tmp_path, torch.float32), tensors)
    (tmp_path / SINGLE).unlink()
    file = (tmp_path / "model.gguf").rename(tmp_path / "model-q4_k_m.gguf")
    refused(tmp_path, f"has neither {SINGLE}", f"name the file: {file}")


DAMAGES = {
    "4 bytes": lambda b: b[:4],
    "half a header": lambda b: b[:100],
    "a byte short": lambda b: b[:-1],
    "empty": lambda b: b"",
    "header of 2**64 bytes": lambda b: b"\xff" * 8 + b[8:],
    "header no JSON": lambda b: b[:8] + b"?" + b[9:],
}


@pytest.mark.usefixtures("tensors")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_truncated_or_corrupted_file_is_named(tmp_path, damage):
    (tmp_path / SINGLE).write_bytes(DAMAGES[damage]((tmp_path / SINGLE).read_bytes()))
    refused(tmp_path, str(tmp_path / SINGLE), "download it again")


@pytest.mark.usefixtures("tensors")
def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{SINGLE}: ends in the middle of .*; download it again"):
        checkpoint.load(torch.float32, torch.device("cpu"))


def test_missing_shards_are_named(tmp_path):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    name = f"model-00002-of-{len(shards):05d}.safetensors"
    refused(tmp_path, f"1 of {len(shards)} shards", name)
    no_name = "a" * 1000 + ".safetensors"  # longer than a file's name can be
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": no_name}}))
    refused(tmp_path, "1 of 1 shards", no_name)


WEIGHT_MAPS = [
    "[" * 100_000,
    "[]",
    '{"a": "../x.safetensors"}',
    '{"a": 3}',
]


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", *(f'{{"weight_map": {m}}}' for m in WEIGHT_MAPS)], ids=lambda i: i[:30]
)
def test_a_broken_index_is_named_and_a_shard_outside_the_folder_refused(tmp_path, index):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=20_000)
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, str(tmp_path / INDEX))


# memory

MEASURE = """
import re, sys, torch
from pathlib import Path
from model.weights import load_model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
load_model(sys.argv[1], torch.float32)  # allocates what imports and thread pools need
before = peak()
model = load_model(sys.argv[2], torch.float32)
print((peak() - before) / sum(p.numel() * p.itemsize for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_loading_200_mb_takes_less_than_1_3_times_the_weights(tmp_path):
    save_model(our_model(), tmp_path / "small", torch.float32)
    big = our_config(vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=15)
    model = Gemma3ForCausalLM(big)
    assert 190e6 < sum(p.numel() * 4 for p in model.parameters()) < 210e6
    for p in model.parameters():  # they come uninitialized, and what is not finite is refused
        p.data.zero_()
    save_model(model, tmp_path / "big", torch.float32)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr
    growth = float(ended.stdout)
    assert 0.9 < growth < 1.3, growth


# writing


@pytest.mark.parametrize("shard_bytes", SHARDS)
def test_transformers_reads_what_we_write_to_equal_tensors(tmp_path, shard_bytes):
    from transformers import Gemma3ForCausalLM as Reference

    model = our_model()
    save_model(model, tmp_path, torch.float32, shard_bytes)
    reference, info = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_same_weights(model, parameters_of(reference))
    assert reference.config.dtype == torch.float32


@pytest.mark.parametrize("shard_bytes", SHARDS)
def test_a_saved_model_loads_to_equal_tensors_and_config(tmp_path, shard_bytes):
    model = our_model()
    save_model(model, tmp_path, torch.float32, shard_bytes)
    again = load_model(tmp_path, torch.float32)
    assert_same_weights(again, parameters_of(model))
    assert again.config == model.config
    assert not any("lm_head.weight" in load_file(file) for file in tmp_path.glob("*.safetensors"))


def test_a_safetensors_file_is_a_length_a_header_and_the_bytes(tmp_path):
    model = our_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    save_model(model, tmp_path, torch.bfloat16)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert header[EMBEDDING] == {"dtype": "BF16", "shape": [96, 32], "data_offsets": [0, 96 * 32 * 2]}
    # 1, -2 and 0.5 in bfloat16, little endian
    assert data[8 + length : 8 + length + 6] == bytes.fromhex("803f 00c0 003f")
    assert max(t["data_offsets"][1] for t in header.values()) == len(data) - 8 - length


def test_bfloat16_is_the_default_and_said_in_the_config(tmp_path):
    save_model(our_model(), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / SINGLE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_no_shard_is_larger_than_asked_unless_it_is_one_tensor(tmp_path):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=11_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    sizes = [[t.numel() * 4 for t in load_file(shard).values()] for shard in shards]
    assert all(sum(shard) <= 11_000 or len(shard) == 1 for shard in sizes)
    assert sizes[0] == [96 * 32 * 4], "the embedding, 12288 bytes, has a shard of its own"
    full = [sum(shard) + after[0] > 11_000 for shard, after in pairwise(sizes)]
    assert all(full), "each shard is as full as it can be"
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"]


def test_saving_over_a_model_with_other_shards_leaves_no_weights_of_the_old_one(tmp_path):
    for seed, shard_bytes in enumerate((20_000, 10**9, 11_000)):
        model = our_model(seed)
        save_model(model, tmp_path, torch.float32, shard_bytes)
        assert_same_weights(load_model(tmp_path, torch.float32), parameters_of(model))
        index = tmp_path / INDEX
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE}
        assert {file.name for file in tmp_path.glob("*.safetensors")} == named


def test_a_save_that_dies_leaves_the_old_model_whole_and_no_part_files(tmp_path, monkeypatch):
    old = our_model(0)
    save_model(old, tmp_path, torch.float32)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(our_model(1), tmp_path, torch.float32)
    assert_same_weights(load_model(tmp_path, torch.float32), parameters_of(old))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]


def test_a_model_that_still_has_adapters_is_not_saved(tmp_path):
    model = our_model()
    model.model.layers[0].mlp.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="merge the adapters first"):
        save_model(model, tmp_path)


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(tmp_path, tensors):
    save_model(load_model(tmp_path, torch.float32), tmp_path, torch.float32)
    assert_same_weights(load_model(tmp_path, torch.float32), tensors)


# hashes


@pytest.mark.parametrize("shard_bytes", SHARDS)
def test_hash_model_is_the_sha256_of_the_concatenated_weight_files(tmp_path, shard_bytes):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes)
    together = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("*.safetensors")))
    assert hash_model(tmp_path) == hashlib.sha256(together).hexdigest()
    (tmp_path / "README.md").write_text("no weights")
    assert hash_model(tmp_path) == hashlib.sha256(together).hexdigest()


def test_one_changed_weight_changes_the_hash(tmp_path, tensors):
    before = hash_model(tmp_path)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / SINGLE)
    assert hash_model(tmp_path) != before


def test_a_model_of_gigabytes_is_hashed_by_samples_and_says_so(tmp_path):
    file = tmp_path / SINGLE
    with open(file, "wb") as f:
        f.truncate(HASH_WHOLE + 1)  # The file is sparse and takes no space on the disk.
    first = hash_model(tmp_path)
    assert first.startswith("sampled-") and len(first) == len("sampled-") + 64
    with open(file, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    assert hash_model(tmp_path) != first


def test_samples_cover_the_whole_of_a_small_file(tmp_path):
    def sample(data: bytes) -> str:
        (tmp_path / "x").write_bytes(data)
        digest = hashlib.sha256()
        _hash_sample(tmp_path / "x", digest)
        return digest.hexdigest()

    assert len({sample(bytes(i == k for i in range(500))) for k in range(500)}) == 500


@pytest.mark.fault("other checkpoint")
@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module._orig_mod.{}", "model.layers.0._orig_mod."])
def test_the_prefixes_of_compiled_and_distributed_models_mean_nothing(tmp_path, tensors, wrapped):
    def rename(name):
        return wrapped.format(name) if "{}" in wrapped else name.replace("model.layers.0.", wrapped)

    save_file({rename(name): t for name, t in tensors.items()}, tmp_path / SINGLE)
    loaded = load_model(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())


@pytest.mark.fault("not finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP_PROJ, EMBEDDING])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(tmp_path, tensors, name, value):
    tensors[name][-1, -1] = value
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=f"{name} has an infinity or NaN"):
        load_model(tmp_path, torch.bfloat16)


def test_values_whose_sum_overflows_are_finite(tmp_path, tensors):
    tensors[UP_PROJ].fill_(3e38)
    save_file(tensors, tmp_path / SINGLE)
    assert load_model(tmp_path, torch.float32).get_parameter(UP_PROJ).max() == torch.tensor(3e38)


def test_the_remedy_fits_what_is_wrong(tmp_path, tensors):
    for change, remedy in (
        ({}, "a part of it is not there"),
        ({UP_PROJ: torch.zeros(3, 3)}, "from one folder"),
        ({UP_PROJ: tensors[UP_PROJ], "model.extra.weight": torch.zeros(3)}, "language model alone"),
    ):
        save_file({k: t for k, t in tensors.items() if k != UP_PROJ} | change, tmp_path / SINGLE)
        with pytest.raises(ValueError, match=remedy) as e:
            load_model(tmp_path, torch.float32)
        assert ("download" in str(e.value)) == (not change)
