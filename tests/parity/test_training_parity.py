"""Twenty steps equal those of a plain transformers and PEFT loop on the same base, adapter and rows."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM as Reference
from transformers import get_linear_schedule_with_warmup

from common.device import Precision
from data.loader import Loader
from data.render import IGNORE_INDEX
from lora.inject import inject
from lora.peft_io import save_adapter
from model.weights import load_model
from tests.makers import documents, write_model
from training import loop
from training.config import Train
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

STEPS, BATCH, ACCUMULATE, LR, DECAY, CLIP = 20, 3, 2, 5e-3, 0.01, 0.5


def padded(docs):
    """(B, T) ids padded with <pad> (0), their mask, and Hugging Face's labels, which are not shifted."""
    shape = len(docs), max(len(d.input_ids) for d in docs)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    for row, d in enumerate(docs):
        n = len(d.input_ids)
        ids[row, :n], mask[row, :n] = torch.tensor(d.input_ids), 1
        labels[row, 1:n] = torch.tensor(d.labels[:-1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def file_name(name):
    """Returns the name of PEFT's parameter in PEFT's files."""
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def their_loop(base, adapter, docs):
    """Returns (loss, norm of the gradient) of each step, and the trained tensors by their names in files."""
    model = Reference.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    out, per_step = [], BATCH * ACCUMULATE
    for step in range(STEPS):
        at = step * per_step % len(docs)
        micro_batches = [padded(docs[at + i * BATCH : at + (i + 1) * BATCH]) for i in range(ACCUMULATE)]
        supervised = sum((b["labels"] != IGNORE_INDEX).sum() for b in micro_batches)
        total = 0.0
        for batch in micro_batches:
            # The loss is the sum over the tokens of this batch, divided by the tokens of the step.
            loss = model(**batch, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        out.append((total, norm.item()))
    return out, {file_name(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def our_loop(model, docs):
    """Returns (loss, norm of the gradient) of each step."""
    loader, records = Loader(docs, BATCH, seed=0, shuffle=False), []
    settings = Train(gradient_accumulation_steps=ACCUMULATE, learning_rate=LR, max_grad_norm=CLIP)
    schedule = loop.Schedule(STEPS, len(loader), settings)
    hooks = loop.Hooks(records.append, lambda step: None, lambda: None, lambda: None)
    optimizers, precision = make_optimizers(model, "adamw", LR, DECAY), Precision("fp32", torch.device("cpu"))
    sft, state = SupervisedFineTuning(), loop.State()
    loop.fit(model, sft, loader, optimizers, precision, schedule, state, hooks)
    return [(r["loss"], r["grad_norm"]) for r in records]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_twenty_steps_are_those_of_transformers_and_peft(tmp_path, kind):
    base, docs = write_model(tmp_path / "base"), documents(4 * BATCH * ACCUMULATE, seed=11)
    assert max(len(d.input_ids) for d in docs) > 16  # longer than the window
    ours = load_model(base, torch.float32)
    inject(ours, type=kind, r=4, lora_alpha=8, target_modules="all-linear", seed=1)
    save_adapter(ours, tmp_path / "start", base_model_name=str(base))
    theirs, their_adapter = their_loop(base, tmp_path / "start", docs)
    mine = our_loop(ours, docs)
    assert len(mine) == STEPS and mine[-1][0] < mine[0][0] - 0.2  # it learns
    assert any(norm > CLIP for _, norm in mine)  # some gradients are clipped
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], abs=1e-3)
    assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-2)
    save_adapter(ours, tmp_path / "end", base_model_name=str(base))
    for name, tensor in load_file(tmp_path / "end" / "adapter_model.safetensors").items():
        assert (tensor - their_adapter[name]).abs().max() < 2e-3, name
