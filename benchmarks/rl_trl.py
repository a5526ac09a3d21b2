"""Runs TRL's DPOTrainer or GRPOTrainer for rl_peers.py, in an environment without Loupe.

trl-dpo               the reference, the model without its adapter, is computed in each step
trl-dpo-precomputed   the reference is computed before the first step
trl-grpo              completions by transformers' generate

These settings differ from TRL's defaults: float32 instead of bf16 autocast, no gradient checkpointing, batch
size, learning rate, steps, rows in order, no files.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.clock import Clock, arguments, finish
from benchmarks.peers import MODULES
from benchmarks.rl_peers import BETA, COMPLETION_TOKENS, GENERATIONS, LEARNING_RATE, RANK, length


def lora():
    from peft import LoraConfig

    rank = {"r": RANK, "lora_alpha": RANK}
    return LoraConfig(**rank, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM")


def settings(args, output_dir: str, batch: int) -> dict:
    """Returns the arguments that both trainers get."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": batch,
        "max_steps": 1 + args.steps,
        "learning_rate": LEARNING_RATE,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": args.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def dpo_trainer(args, rows: list[dict], output_dir: str, callbacks: list):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    data = [{key: message(role, row[key]) for key, role in roles.items()} for row in rows]
    config = DPOConfig(
        **settings(args, output_dir, args.batch),
        beta=BETA,
        precompute_ref_log_probs=args.name == "trl-dpo-precomputed",
        train_sampling_strategy="sequential",
    )
    parts = {"args": config, "train_dataset": Dataset.from_list(data), "callbacks": callbacks}
    return DPOTrainer(str(args.folder / "model"), **parts, peft_config=lora())


def grpo_trainer(args, rows: list[dict], output_dir: str, callbacks: list):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [length(completion[-1]["content"]) for completion in completions]

    config = GRPOConfig(
        **settings(args, output_dir, args.batch * GENERATIONS),
        num_generations=GENERATIONS,
        max_completion_length=COMPLETION_TOKENS,
        beta=0.0,
        shuffle_dataset=False,
    )
    data = Dataset.from_list([{"prompt": message("user", row["prompt"])} for row in rows])
    parts = {"args": config, "train_dataset": data, "callbacks": callbacks}
    return GRPOTrainer(str(args.folder / "model"), reward_funcs=reward, **parts, peft_config=lora())


def main() -> None:
    args = arguments()
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.lap()

    lines = (args.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    make = grpo_trainer if args.name == "trl-grpo" else dpo_trainer
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make(args, [json.loads(line) for line in lines], scratch, [Laps()])
        clock = Clock(args)
        trainer.train()
        history = trainer.state.log_history
    clock.losses = [entry["loss"] for entry in history if "loss" in entry]
    finish(clock.result())


if __name__ == "__main__":
    main()
