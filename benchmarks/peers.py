"""Runs one peer of frameworks.py, in an environment without Loupe, as the peer's documentation uses it.

hf-fp32, hf-autocast, hf-bf16   transformers + PEFT in a plain loop: a padded batch, logits at all positions,
                                labels of -100 at prompt and padding. float32; float32 weights under bf16
                                autocast; bf16 weights under bf16 autocast (PEFT keeps adapters in float32)
hf-nf4, hf-fp32-nf4             the same on a base in bitsandbytes' NF4 with double quantization, computed in
                                bf16 and in float32; without the gradient checkpointing that PEFT proposes
hf-patched                      hf-bf16 with its forward pass patched: the head runs at supervised positions
trl, trl-padding-free           TRL's SFTTrainer with its defaults; with padding_free and no max_length
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.clock import Clock, arguments, finish
from benchmarks.lab_like import RANK

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora():
    from peft import LoraConfig

    rank = {"r": RANK, "lora_alpha": RANK}
    return LoraConfig(**rank, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM")


def rows_of(args) -> list[dict]:
    """Returns the rows of the first step and of the timed ones, in order."""
    rows = json.loads((args.folder / "tokens.json").read_text())
    batches = [0] + [args.round] * args.steps
    return [row for i in batches for row in rows[i * args.batch : (i + 1) * args.batch]]


def padded(rows: list[dict], device: str) -> dict:
    """Returns a padded batch: the rows' ids and mask padded with 0, the labels with -100."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def fill(lists, value):
        return torch.tensor([values + [value] * (width - len(values)) for values in lists], device=device)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": fill(ids, 0),
        "attention_mask": fill([[1] * len(x) for x in ids], 0),
        "labels": fill([row["labels"] for row in rows], -100),
    }


def plain_loop(args, clock: Clock) -> None:
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    is_float32 = "fp32" in args.name
    dtype = torch.float32 if is_float32 or args.name == "hf-autocast" else torch.bfloat16
    quantization = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **quantization)
    how = {"quantization_config": nf4, "device_map": args.device} if "nf4" in args.name else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=dtype, **how).to(args.device)
    if "nf4" in args.name:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, lora()).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-5, fused=True)
    loss_of = supervised_loss if args.name == "hf-patched" else mean_loss
    rows = rows_of(args)
    for i in range(0, len(rows), args.batch):
        batch = padded(rows[i : i + args.batch], args.device)
        with torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=not is_float32):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap(loss.item())


def mean_loss(model, batch: dict):
    """Returns the model's own loss, with logits at all positions."""
    return model(**batch, use_cache=False).loss


def supervised_loss(model, batch: dict):
    """Returns the mean cross-entropy at the supervised positions, with logits at those only."""
    import torch

    causal = model.get_base_model()
    out = causal.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    logits = causal.lm_head(out.last_hidden_state[:, :-1][supervised]).float()
    return torch.nn.functional.cross_entropy(logits, targets[supervised])


def trl(args, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Laps(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.lap()

    free = {"padding_free": True, "max_length": None} if args.name == "trl-padding-free" else {}
    # These differ from TRL's defaults: batch size, lr, steps, rows in order, a log entry a step, no files.
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            scratch,
            per_device_train_batch_size=args.batch,
            learning_rate=5e-5,
            max_steps=1 + args.steps,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.device == "cpu",
            **free,
        )
        data = {"args": config, "train_dataset": Dataset.from_list(rows_of(args))}
        trainer = SFTTrainer(str(args.folder / "model"), **data, peft_config=lora(), callbacks=[Laps()])
        trainer.train()
        clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    args = arguments()
    clock = Clock(args)
    (trl if args.name.startswith("trl") else plain_loop)(args, clock)
    finish(clock.result())


if __name__ == "__main__":
    main()
