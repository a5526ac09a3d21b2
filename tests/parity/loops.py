"""Twenty training steps, by our loop and by a plain loop of transformers and PEFT."""

import torch
from peft import PeftModel
from transformers import get_linear_schedule_with_warmup

from common.device import Precision
from data.loader import Loader
from data.render import IGNORE_INDEX
from training import loop
from training.config import Train
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

STEPS, LR, DECAY, CLIP = 20, 5e-3, 0.01, 0.5


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


def their_loop(model, adapter, docs, batch, accumulate, lr=LR):
    """Returns (loss, norm of the gradient) of each step, and the trained tensors by their names in files."""
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    out, per_step = [], batch * accumulate
    for step in range(STEPS):
        at = step * per_step % len(docs)
        micro_batches = [padded(docs[at + i * batch : at + (i + 1) * batch]) for i in range(accumulate)]
        supervised = sum((b["labels"] != IGNORE_INDEX).sum() for b in micro_batches)
        total = 0.0
        for inputs in micro_batches:
            # The loss is the sum over the tokens of this batch, divided by the tokens of the step.
            loss = model(**inputs, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        out.append((total, norm.item()))
    return out, {file_name(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def our_loop(model, docs, batch, accumulate, lr=LR):
    """Returns (loss, norm of the gradient) of each step."""
    loader, records = Loader(docs, batch, seed=0, shuffle=False), []
    settings = Train(gradient_accumulation_steps=accumulate, learning_rate=lr, max_grad_norm=CLIP)
    schedule = loop.Schedule(STEPS, len(loader), settings)
    hooks = loop.Hooks(records.append, lambda step: None, lambda: None, lambda: None)
    optimizers, precision = make_optimizers(model, "adamw", lr, DECAY), Precision("fp32", torch.device("cpu"))
    sft, state = SupervisedFineTuning(), loop.State()
    loop.fit(model, sft, loader, optimizers, precision, schedule, state, hooks)
    return [(r["loss"], r["grad_norm"]) for r in records]
