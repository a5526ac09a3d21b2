"""model/weights.py: what transformers writes is read to the same bits, what we write it reads, and every
broken checkpoint says what is broken.
"""

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
    copy_tokenizer,
    hash_model,
    load_model,
    save_model,
)

ROOT = Path(__file__).parents[2]
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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EMBEDDING = "model.embed_tokens.weight"


def hf_text_model(**changes):
    from transformers import Gemma3ForCausalLM as Reference
    from transformers import Gemma3TextConfig

    torch.manual_seed(0)
    return Reference(Gemma3TextConfig(**(TEXT | changes)))


def hf_multimodal_model():
    from transformers import Gemma3Config as ReferenceConfig
    from transformers import Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        ReferenceConfig(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1)
    )


def our_config(**changes) -> Gemma3Config:
    layers = changes.get("num_hidden_layers", TEXT["num_hidden_layers"])
    kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    return Gemma3Config(**(TEXT | {"layer_types": kinds} | changes))


def our_model(seed: int = 0, **changes) -> Gemma3ForCausalLM:
    model = Gemma3ForCausalLM(our_config(**changes))
    model.reset_parameters(seed, std=0.5)
    return model


def saved(folder: Path) -> tuple[Path, dict]:
    """A folder of ours, and its tensors for a test to spoil."""
    save_model(our_model(), folder, torch.float32)
    return folder, {
        name: t.clone() for name, t in load_file(folder / SINGLE).items()
    }  # load_file's are views of the file


def assert_same_weights(ours, expected: dict):
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, p in parameters.items():
        assert torch.equal(p, expected[name]), name


def parameters_of(model) -> dict:
    return {name: p.detach() for name, p in model.named_parameters()}


# reading what transformers writes


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_text_checkpoint_loads_to_equal_tensors_whole_or_sharded(tmp_path, shard):
    reference = hf_text_model()
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard == "20KB")
    assert_same_weights(load_model(tmp_path, torch.float32), parameters_of(reference))


def test_a_multimodal_checkpoint_loads_its_text_part_and_leaves_the_vision_out(tmp_path):
    reference = hf_multimodal_model()
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE)
    assert any("vision_tower" in name for name in stored) and any(
        "multi_modal_projector" in name for name in stored
    )
    expected = {f"model.{name}": p.detach() for name, p in reference.model.language_model.named_parameters()}
    assert_same_weights(load_model(tmp_path, torch.float32), expected)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_every_prefix_that_was_ever_published_means_the_same_tensor(tmp_path, prefix):
    folder, tensors = saved(tmp_path)
    renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    renamed |= {
        "vision_tower.embeddings.weight": torch.ones(2),
        "multi_modal_projector.mm_input_projection_weight": torch.ones(2),
    }
    save_file(renamed, folder / SINGLE)
    assert_same_weights(load_model(folder, torch.float32), tensors)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path, name):
    folder, tensors = saved(tmp_path)
    save_file(tensors | {name: torch.zeros(96, 32)}, folder / SINGLE)
    assert_same_weights(load_model(folder, torch.float32), tensors)


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
def test_weights_are_cast_to_the_dtype_asked_for_by_rounding(tmp_path, dtype):
    folder, tensors = saved(tmp_path)
    assert_same_weights(load_model(folder, dtype), {name: t.to(dtype) for name, t in tensors.items()})


def test_loaded_weights_begin_at_cache_lines_and_share_no_byte(tmp_path):
    save_model(our_model(), tmp_path, torch.float32)
    places = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size())
        for p in load_model(tmp_path, torch.bfloat16).parameters()
    )
    assert all(start % 64 == 0 for start, _ in places)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def test_loaded_weights_outlive_the_file_that_they_came_from(tmp_path):
    folder, tensors = saved(tmp_path)
    model = load_model(folder, torch.float32)
    with open(
        folder / SINGLE, "r+b"
    ) as f:  # in place; a view of the file would change, and crash the process had the file been cut
        f.write(bytes((folder / SINGLE).stat().st_size))
    assert_same_weights(model, tensors)


# errors


def errors_of(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(folder, torch.float32)
    return str(caught.value)


def test_every_missing_unexpected_and_misshapen_tensor_is_in_one_error(tmp_path):
    folder, tensors = saved(tmp_path)
    del tensors["model.layers.3.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 64)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, folder / SINGLE)
    message = errors_of(folder)
    assert str(folder) in message
    assert (
        "missing: model.layers.3.mlp.up_proj.weight (48, 32)" in message
        and "missing: model.norm.weight (32,)" in message
    )
    assert "unexpected: model.layers.9.mlp.up_proj.weight (48, 32)" in message
    assert (
        "misshapen: model.layers.0.self_attn.q_proj.weight is (32, 64), but config.json makes it (64, 32)"
        in message
    )


def test_at_most_20_tensors_are_shown_and_the_rest_counted(tmp_path):
    folder, tensors = saved(tmp_path)
    save_file({EMBEDDING: tensors[EMBEDDING]}, folder / SINGLE)
    message = errors_of(folder)
    assert message.count("missing:") == SHOWN == 20
    assert f"and {len(tensors) - 1 - 20} more" in message


def test_embedding_rows_that_differ_from_vocab_size_are_part_of_the_same_error(tmp_path):
    folder, tensors = saved(tmp_path)
    tensors[EMBEDDING] = torch.zeros(100, 32)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / SINGLE)
    message = errors_of(folder)
    assert "misshapen: model.embed_tokens.weight has 100 rows, but config.json's vocab_size is 96" in message
    assert "missing: model.norm.weight" in message


def test_a_tensor_stored_twice_under_two_prefixes_is_refused(tmp_path):
    folder, tensors = saved(tmp_path)
    save_file(tensors | {"language_model.model.norm.weight": torch.zeros(32)}, folder / SINGLE)
    message = errors_of(folder)
    assert "twice: model.norm.weight" in message and "language_model.model.norm.weight" in message


def test_a_quantized_tensor_is_refused_by_its_dtype(tmp_path):
    folder, tensors = saved(tmp_path)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.uint8)
    save_file(tensors, folder / SINGLE)
    assert "quantized: model.layers.0.mlp.up_proj.weight is stored as U8" in errors_of(folder)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_unopened_and_the_conversion_named(tmp_path, pickle):
    folder, _ = saved(tmp_path)
    (folder / SINGLE).unlink()
    (folder / pickle).write_bytes(b"never read")
    message = errors_of(folder)
    assert pickle in message and "can run any code" in message and "save_pretrained" in message


def test_a_folder_without_weights_says_what_a_model_folder_holds(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / SINGLE).unlink()
    message = errors_of(folder)
    assert str(folder) in message and SINGLE in message and INDEX in message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[:4],
        lambda b: b[:100],
        lambda b: b[:-1],
        lambda b: b"",
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b[:8] + b"?" + b[9:],
    ],
    ids=["4 bytes", "half a header", "a byte short", "empty", "header of 2**64 bytes", "header no JSON"],
)
def test_a_truncated_or_corrupted_file_is_named(tmp_path, spoil):
    folder, _ = saved(tmp_path)
    (folder / SINGLE).write_bytes(spoil((folder / SINGLE).read_bytes()))
    message = errors_of(folder)
    assert str(folder / SINGLE) in message and "download it again" in message


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    save_model(our_model(), tmp_path, torch.float32)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{SINGLE}: ends in the middle of .*; download it again"):
        checkpoint.load(torch.float32, torch.device("cpu"))


def test_missing_shards_are_named(tmp_path):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    told = errors_of(tmp_path)
    assert f"1 of {len(shards)} shards" in told and f"model-00002-of-{len(shards):05d}.safetensors" in told


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 3}}',
    ],
)
def test_a_broken_index_is_named_and_a_shard_outside_the_folder_refused(tmp_path, index):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=20_000)
    (tmp_path / INDEX).write_text(index)
    assert str(tmp_path / INDEX) in errors_of(tmp_path)


# memory

MEASURE = """
import re, sys, torch
from pathlib import Path
from model.gemma3 import Gemma3ForCausalLM
from model.weights import load_model
import safetensors
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
load_model(sys.argv[1], torch.float32)  # pays for the imports and thread pools
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
    save_model(model, tmp_path / "big", torch.float32)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    growth = float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < growth < 1.3, growth


# writing


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_we_write_to_equal_tensors(tmp_path, shard_bytes):
    from transformers import Gemma3ForCausalLM as Reference

    model = our_model()
    save_model(model, tmp_path, torch.float32, shard_bytes)
    reference, info = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_same_weights(model, parameters_of(reference))
    assert reference.config.dtype == torch.float32


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_saved_model_loads_to_equal_tensors_and_config(tmp_path, shard_bytes):
    model = our_model()
    save_model(model, tmp_path, torch.float32, shard_bytes)
    again = load_model(tmp_path, torch.float32)
    assert_same_weights(again, parameters_of(model))
    assert again.config == model.config
    assert "lm_head.weight" not in {
        name for file in tmp_path.glob("*.safetensors") for name in load_file(file)
    }


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
    assert data[8 + length : 8 + length + 6] == bytes.fromhex(
        "803f 00c0 003f"
    )  # 1, -2, 0.5 in bfloat16, little endian
    assert max(t["data_offsets"][1] for t in header.values()) == len(data) - 8 - length


def test_bfloat16_is_the_default_and_said_in_the_config(tmp_path):
    save_model(our_model(), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / SINGLE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_no_shard_is_larger_than_asked_unless_it_is_one_tensor(tmp_path):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes=11_000)
    index = json.loads((tmp_path / INDEX).read_text())
    sizes = [
        [t.numel() * 4 for t in load_file(file).values()] for file in sorted(tmp_path.glob("*.safetensors"))
    ]
    assert all(sum(shard) <= 11_000 or len(shard) == 1 for shard in sizes)
    assert sizes[0] == [96 * 32 * 4], "the embedding, 12288 bytes, stands alone"
    assert all(sum(shard) + after[0] > 11_000 for shard, after in pairwise(sizes)), (
        "each shard is as full as it can be"
    )
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"]


def test_saving_over_a_model_with_other_shards_leaves_no_weights_of_the_old_one(tmp_path):
    for seed, shard_bytes in enumerate((20_000, 10**9, 11_000)):
        model = our_model(seed)
        save_model(model, tmp_path, torch.float32, shard_bytes)
        assert_same_weights(load_model(tmp_path, torch.float32), parameters_of(model))
        named = (
            set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
            if (tmp_path / INDEX).exists()
            else {SINGLE}
        )
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


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(tmp_path):
    folder, tensors = saved(tmp_path)
    save_model(load_model(folder, torch.float32), folder, torch.float32)
    assert_same_weights(load_model(folder, torch.float32), tensors)


def test_copy_tokenizer_copies_what_is_there_and_nothing_else(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir(), dst.mkdir()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "config.json",
        "README.md",
        SINGLE,
    ):
        (src / name).write_text(name)
    copy_tokenizer(src, dst)
    copy_tokenizer(src, src)  # onto itself: nothing to do, nothing lost
    assert {p.name: p.read_text() for p in dst.iterdir()} == {
        n: n for n in ("tokenizer.json", "generation_config.json", "chat_template.jinja")
    }
    assert (src / "tokenizer.json").read_text() == "tokenizer.json"


# hashes


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_hash_model_is_the_sha256_of_the_weight_files_one_behind_the_other(tmp_path, shard_bytes):
    save_model(our_model(), tmp_path, torch.float32, shard_bytes)
    together = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("*.safetensors")))
    assert hash_model(tmp_path) == hashlib.sha256(together).hexdigest()
    (tmp_path / "README.md").write_text("no weights")
    assert hash_model(tmp_path) == hashlib.sha256(together).hexdigest()


def test_one_changed_weight_changes_the_hash(tmp_path):
    folder, tensors = saved(tmp_path)
    before = hash_model(folder)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / SINGLE)
    assert hash_model(folder) != before


def test_a_model_of_gigabytes_is_hashed_by_samples_and_says_so(tmp_path):
    file = tmp_path / SINGLE
    with open(file, "wb") as f:
        f.truncate(HASH_WHOLE + 1)  # a hole: takes no room on the disk
    first = hash_model(tmp_path)
    assert first.startswith("sampled-") and len(first) == len("sampled-") + 64
    with open(file, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    assert hash_model(tmp_path) != first


def test_samples_cover_a_small_file_whole(tmp_path):
    def sample(data: bytes) -> str:
        (tmp_path / "x").write_bytes(data)
        digest = hashlib.sha256()
        _hash_sample(tmp_path / "x", digest)
        return digest.hexdigest()

    assert len({sample(bytes(i == k for i in range(500))) for k in range(500)}) == 500
