"""One peer of frameworks.py, in an environment without Loupe. Each is written as its users write it.

hf-fp32, hf-autocast, hf-bf16   transformers + PEFT in a plain loop: a padded batch, logits at all positions,
                                labels of -100 at prompt and padding; in float32, with float32 weights under
                                bf16 autocast, and with bf16 weights under bf16 autocast (where PEFT keeps its
                                adapters in float32)
hf-patched                      hf-bf16 with the forward pass patched by hand: the head runs at supervised
                                positions only
trl, trl-padding-free           TRL's SFTTrainer with its defaults, and with padding_free = True and
                                max_length = None
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

    return LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM"
    )


def rows_of(args) -> list[dict]:
    """The rows of the first step and of the timed ones, in order."""
    rows = json.loads((args.folder / "tokens.json").read_text())
    return [
        row for i in [0] + [args.round] * args.steps for row in rows[i * args.batch : (i + 1) * args.batch]
    ]


def padded(rows: list[dict], device: str) -> dict:
    """A rectangle: ids and mask filled with 0, labels with -100."""
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
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    wide = args.name in ("hf-fp32", "hf-autocast")
    model = AutoModelForCausalLM.from_pretrained(
        args.folder / "model", dtype=torch.float32 if wide else torch.bfloat16
    ).to(args.device)
    model = get_peft_model(model, lora()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)
    loss_of = (
        supervised_loss
        if args.name == "hf-patched"
        else lambda model, batch: model(**batch, use_cache=False).loss
    )
    rows = rows_of(args)
    for i in range(0, len(rows), args.batch):
        batch = padded(rows[i : i + args.batch], args.device)
        with torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.name != "hf-fp32"):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap(loss.item())


def supervised_loss(model, batch: dict):
    """The mean cross-entropy at the supervised positions, with logits of those only."""
    import torch

    causal = model.get_base_model()
    hidden = causal.model(
        batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[chosen]).float(), targets[chosen])


def trl(args, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Laps(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.lap()

    free = {"padding_free": True, "max_length": None} if args.name == "trl-padding-free" else {}
    # Not a default: the recipe's settings, the rows in their order, the loss of each step, and no files.
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
        trainer = SFTTrainer(
            str(args.folder / "model"),
            args=config,
            train_dataset=Dataset.from_list(rows_of(args)),
            peft_config=lora(),
            callbacks=[Laps()],
        )
        trainer.train()
        clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    args = arguments()
    clock = Clock(args)
    (trl if args.name.startswith("trl") else plain_loop)(args, clock)
    finish(clock.result())


if __name__ == "__main__":
    main()
