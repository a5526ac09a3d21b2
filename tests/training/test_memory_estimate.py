"""training/memory_estimate.py: train.py --plan GIB, and --plan for bases that are too large to be probed."""

import json
import shutil

import pytest
import torch

import train
from common.device import Precision
from data.packing import pack
from lora.inject import inject
from model.gemma3 import Gemma3ForCausalLM
from model.hub import TINY
from tests.makers import documents, tiny_config
from tests.training.test_memory import mebibytes, sets
from training import build, memory, memory_estimate
from training.config import load_config
from training.dataset import read
from training.memory_estimate import MemoryTracker, estimate, tensors_peak
from training.objectives.sft import SupervisedFineTuning

# https://huggingface.co/google/gemma-3-27b-pt/blob/main/config.json: the text model
GEMMA_27B = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def test_an_example_by_hand():
    with MemoryTracker() as tracker:
        a = torch.empty(10, device="meta")
        view, b = a[2:], a + 1
        assert (tracker.live, tracker.peak) == (80, 80)
        del a
        assert tracker.live == 80  # the view holds it
        del view
        assert (tracker.live, tracker.peak) == (40, 80)
        b.add_(1)
        torch.empty(20, device="meta")
    assert (tracker.live, tracker.peak) == (40, 120)
    assert b.is_meta


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_values_takes_as_much_as_a_real_one(monkeypatch, checkpointing):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    batch, peaks = pack(documents(12, shortest=10, longest=16)), []
    monkeypatch.setattr("model.loss.CHUNK_BYTES", {"cpu": 2**14, "cuda": 2**14})
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = Gemma3ForCausalLM(tiny_config(**sizes))
        inject(model, r=4, lora_alpha=8, target_modules="all-linear", seed=0)
        model.model.gradient_checkpointing = checkpointing
        model = model.bfloat16().train()
        peaks.append(tensors_peak(model, SupervisedFineTuning(), batch.to(device), device))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


@pytest.fixture
def base_27b(place):
    """The shape of Gemma 3 27B, with the embedded base's tokenizer and no weights."""
    folder = place / "27b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GEMMA_27B))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def estimated(capsys, base, *settings: str, gib: str = "") -> tuple[str, dict[str, int]]:
    """What --plan says, and the figures of its lines in MiB."""
    settings = ("model.quantize=q4_k", "model.dtype=auto", "train.precision=auto", *settings)
    words = sets(f"model.name={base}", "train.batch_size=1", *settings)
    assert train.main(["--config", "tiny.toml", *words, "--plan", *([gib] if gib else [])]) == 0
    said = capsys.readouterr().out
    return said, {line: mebibytes(said, line) for line in ("base weights", "in all", "free")}


def test_the_plan_of_a_27b_says_what_it_takes_on_a_gpu_of_24_gib_and_on_this_machine(
    place, base_27b, capsys, monkeypatch
):
    monkeypatch.setattr("ggml.blocks.SLICE", 2**25)  # fewer and larger pieces, so that the test is shorter
    matrices = {"q_proj": 4096 * 5376, "k_proj": 2048 * 5376, "v_proj": 2048 * 5376, "o_proj": 5376 * 4096}
    matrices |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 5376 * 21504)
    # As in llama.cpp's Q4_K_S: Q4_K, Q5_K for some layers' v_proj and down_proj, Q6_K for the embedding.
    bits = 4.5 * 62 * sum(matrices.values()) + 4 * matrices["v_proj"] + 7 * matrices["down_proj"]
    bits += 6.5625 * 262208 * 5376
    said, there = estimated(capsys, base_27b, gib="24")
    assert "on a GPU of 24 GiB" in said and "in bf16" in said and "it fits" in said
    assert there["base weights"] == pytest.approx(bits / 8 / 2**20, rel=1e-3) and there["free"] == 24 * 1024
    for module in (memory, memory_estimate):
        monkeypatch.setattr(module, "free", lambda device: 8 * 2**30)
    said, here = estimated(capsys, base_27b, "train.gradient_checkpointing=true")
    assert "on cpu:" in said and "it does not fit, not even one row" in said
    assert here["in all"] > there["base weights"] and here["free"] == 8 * 1024


def test_a_size_of_no_gpu_is_refused(place, capsys):
    for gib in ("0", "-1", "nan", "much"):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--config", "tiny.toml", "--plan", gib])
        assert stopped.value.code == 2 and f"invalid gibibytes value: {gib!r}" in capsys.readouterr().err


def test_the_largest_batch_is_found_between_one_row_and_the_runs_own(place, capsys, monkeypatch):
    monkeypatch.setattr(memory_estimate, "OTHERS", 0)
    settings, cfg = sets("train.batch_size=8"), load_config("tiny.toml", ["train.batch_size=8"])
    base, data = read(cfg, build.make_objective(cfg), place / "base")
    (_, one), (_, eight) = estimate(cfg, base, data, Precision("fp32", torch.device("cpu"))).sizes
    gib = f"{memory.MARGIN * (one + (eight - one) * 3.5 / 7) / 2**30:.8f}"  # between four and five rows
    assert train.main(["--config", "tiny.toml", *settings, "--plan", gib]) == 0
    said = capsys.readouterr().out
    assert "train.batch_size = 4 (now 8)" in said and "gradient_accumulation_steps = 4 (now 2)" in said
