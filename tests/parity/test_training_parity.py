"""Twenty steps equal those of a plain transformers and PEFT loop on the same base, adapter and rows."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM as Reference

from lora.inject import inject
from lora.peft_io import save_adapter
from model.weights import load_model
from tests.makers import documents, write_model
from tests.parity.loops import CLIP, STEPS, our_loop, their_loop

BATCH, ACCUMULATE = 3, 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_twenty_steps_are_those_of_transformers_and_peft(tmp_path, kind):
    base, docs = write_model(tmp_path / "base"), documents(4 * BATCH * ACCUMULATE, seed=11)
    assert max(len(d.input_ids) for d in docs) > 16  # longer than the window
    ours = load_model(base, torch.float32)
    inject(ours, type=kind, r=4, lora_alpha=8, target_modules="all-linear", seed=1)
    save_adapter(ours, tmp_path / "start", base_model_name=str(base))
    reference = Reference.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    theirs, their_adapter = their_loop(reference, tmp_path / "start", docs, BATCH, ACCUMULATE)
    mine = our_loop(ours, docs, BATCH, ACCUMULATE)
    assert len(mine) == STEPS and mine[-1][0] < mine[0][0] - 0.2  # it learns
    assert any(norm > CLIP for _, norm in mine)  # some gradients are clipped
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], abs=1e-3)
    assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-2)
    save_adapter(ours, tmp_path / "end", base_model_name=str(base))
    for name, tensor in load_file(tmp_path / "end" / "adapter_model.safetensors").items():
        assert (tensor - their_adapter[name]).abs().max() < 2e-3, name
