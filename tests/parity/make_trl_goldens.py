"""Writes trl_goldens.json: losses, gradients and metrics of TRL's DPO and GRPO trainers on a tiny Gemma 3.

TRL needs an environment of its own. Run from the repository's root:

    python -m venv trl
    trl/bin/pip install -c constraints.txt torch==2.13.0 transformers==5.23.0 trl==1.16.0
    trl/bin/python tests/parity/make_trl_goldens.py

The numbers come from the methods of TRL's trainers: their preparation of rows, collator, log-probabilities,
advantages and compute_loss. This script gives them weights and inputs only. Everything is float32, as TRL
computes the head and the softmax in float32 whatever the model's dtype is.

A test repeats the weights with `fill`, which needs no transformers. B completions of at most L tokens.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch

OUT = Path(__file__).with_name("trl_goldens.json")
VOCAB, PAD, EOS, BOS, UNK = 96, 0, 1, 2, 3
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,  # longer than every row
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
POLICY, OTHER = 1, 2  # seeds
WATCHED = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
PAIRS = [
    {"prompt": [2, 11, 12, 13, 14], "chosen": [21, 22, 23, 1], "rejected": [24, 25, 1]},
    {"prompt": [2, 31], "chosen": [33, 1], "rejected": [34, 35, 36, 37, 38, 39, 1]},
    {"prompt": [2, 41, 42, 43, 44, 45, 46, 47], "chosen": [51, 52, 53, 54, 55, 1], "rejected": [1]},
    {"prompt": [2, 61, 62, 63], "chosen": [71, 72, 73, 74, 75, 1], "rejected": [71, 72, 76, 74, 75, 1]},
]
BETAS = (0.1, 0.5)
PROMPTS = [[2, 81, 82, 83, 84, 85], [2, 86, 87]]  # each with NUM_GENERATIONS completions
COMPLETIONS = [
    [15, 16, 17, 1],
    [15, 18, 19, 20, 26, 27, 28, 1],
    [29, 1],
    [30, 31, 32, 33, 34, 35, 36, 37],  # reaches MAX_COMPLETION_LENGTH without <eos>
    [1],
    [38, 39, 40, 41, 42, 1],
]
NUM_GENERATIONS, MAX_COMPLETION_LENGTH, EPSILON = 3, 8, 0.2
ADVANTAGES = [1.25, -0.5, -0.75, 0.5, 0.0, -1.0]
# log p - log p_old of the tokens in turn: ratios of about 0.67, 1, 1.28, 0.9, 1.6, 0.74 and 1.11
LOG_RATIOS = (-0.4, 0.0, 0.25, -0.1, 0.45, -0.3, 0.1)
REWARDS = {
    "all different": [1.0, 0.25, 0.5, 0.0, 0.125, 1.0],
    # a std of about 1e-4, as large as what is added to it; these means are exact in float32
    "nearly equal": [0.5, 0.5 + 3 / 2**14, 0.5, 0.75, 0.75, 0.75 - 3 / 2**14],
    "one group of zero std": [0.3, 0.3, 0.3, 1.0, 0.0, 0.0],
}
METRICS = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def fill(named: Iterable[tuple[str, torch.nn.Parameter]], policy: bool = True) -> None:
    """Sets parameters to the weights of the policy or of the reference.

    The parameters are taken in the order of their names. Each is drawn as integers k from -512 to 512 by a
    generator of its own, which is seeded with 1000 * seed + its index. The policy's weights are
    k_POLICY / 1024, the reference's (15 k_POLICY + k_OTHER) / 16384: close to the policy, as in training.
    All are exact in float32.
    """
    for index, (_, p) in enumerate(sorted(named, key=lambda pair: pair[0])):
        drawn = []
        for seed in (POLICY, OTHER):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            drawn.append(torch.randint(-512, 513, p.shape, generator=generator))
        values = 16 * drawn[0] if policy else 15 * drawn[0] + drawn[1]
        with torch.no_grad():
            p.copy_(values / 16384)


def tiny_model(policy: bool):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG)).to(torch.float32)
    model.set_attn_implementation("eager")
    fill(model.named_parameters(), policy)
    return model


def word_tokenizer():
    """Returns a tokenizer of the words t00 to t95, so that rows of words have known token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({words([i]): i for i in range(VOCAB)}, unk_token=words([UNK])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": words([PAD]), "eos_token": words([EOS]), "bos_token": words([BOS])}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(ids: list[int]) -> str:
    return " ".join(f"t{i:02}" for i in ids)


def settings(folder: str) -> dict:
    """Returns the arguments that both trainers get."""
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
    return {"output_dir": folder, "logging_steps": 1, "save_strategy": "no", **plain}


def gradient(model) -> dict:
    """Returns the gradient's norm and a few numbers of the gradients of WATCHED, and clears it."""
    parameters = dict(model.named_parameters())
    squares = sum(p.grad.double().square().sum() for p in parameters.values() if p.grad is not None)
    found = {"norm": squares.sqrt().item()}
    for name in WATCHED:
        g = parameters[name].grad.double()
        rows = g.abs().sum(1).topk(5).indices.sort().values
        found[name] = {
            "sum": g.sum().item(),
            "abs_sum": g.abs().sum().item(),
            "first": g.flatten()[:5].tolist(),
            "rows": rows.tolist(),  # the five rows with the largest sums of absolute values
            "row_sums": g[rows].sum(1).tolist(),
        }
    model.zero_grad()
    return found


def dpo_trainer(folder: str):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": words(p["prompt"])} for p in PAIRS]
    for row, pair in zip(rows, PAIRS, strict=True):
        row |= {answer: " " + words(pair[answer]) for answer in ("chosen", "rejected")}
    args = DPOConfig(**settings(folder), beta=BETAS[0], per_device_train_batch_size=len(PAIRS))
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": word_tokenizer()}
    trainer = DPOTrainer(tiny_model(True), ref_model=tiny_model(False), args=args, **data)
    trainer.model.train()
    prepared = [{k: row[f"{k}_ids"] for k in PAIRS[0]} for row in trainer.train_dataset]
    assert prepared == PAIRS, "TRL's preparation of the rows changed the token ids"
    return trainer


def dpo(folder: str) -> dict:
    trainer = dpo_trainer(folder)
    rows, model = list(trainer.train_dataset), trainer.model
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        policy = trainer.compute_ref_log_probs(model, batch)
        reference = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    cases, wanted = [], lambda name: name.startswith(("rewards/", "logps/"))
    for beta in BETAS:
        trainer.beta = beta
        # The loss and the metrics of one pair are those of a batch of this pair.
        losses, metrics = [], []
        for row in rows:
            losses.append(trainer.compute_loss(model, trainer.data_collator([row])).item())
            metrics.append(taken(trainer, wanted))
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        means = taken(trainer, wanted)
        per_pair = {name: [m[name] for m in metrics] for name in means}
        result = {"loss": loss.item(), "losses": losses, "metrics": means, "metrics_of_pairs": per_pair}
        cases.append({"beta": beta} | result | {"gradient": gradient(model)})
    names = ("chosen", "rejected")
    logps = {
        "policy_logps": {name: x.tolist() for name, x in zip(names, policy, strict=True)},
        "reference_logps": {name: x.tolist() for name, x in zip(names, reference, strict=True)},
    }
    return {"pairs": PAIRS, **logps, "cases": cases}


def taken(trainer, wanted) -> dict:
    """Returns and clears the metrics that compute_loss kept, each the mean of its values."""
    kept = trainer._metrics["train"]
    found = {name: sum(values) / len(values) for name, values in kept.items() if wanted(name)}
    kept.clear()
    return found


def grpo_trainer(folder: str, temperature: float, scale_rewards: str = "group", truncated: bool = False):
    """Returns a trainer whose rollout is the given completions and whose reward is a column of the rows."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def rollout(prompts, trainer):
        ids = [PROMPTS[i // NUM_GENERATIONS] for i in range(len(prompts))]
        # No log-probabilities of a sampler: the trainer's loss does not read them without vLLM.
        return {"prompt_ids": ids, "completion_ids": COMPLETIONS, "logprobs": None}

    def reward(completions, value, **_):
        return value

    args = GRPOConfig(
        **settings(folder),
        num_generations=NUM_GENERATIONS,
        max_completion_length=MAX_COMPLETION_LENGTH,
        per_device_train_batch_size=len(COMPLETIONS),
        epsilon=EPSILON,
        temperature=temperature,
        scale_rewards=scale_rewards,
        mask_truncated_completions=truncated,
    )
    rows = Dataset.from_list([{"prompt": words(ids)} for ids in PROMPTS])
    kinds = {"train_dataset": rows, "processing_class": word_tokenizer(), "rollout_func": rollout}
    trainer = GRPOTrainer(tiny_model(True), reward_funcs=reward, args=args, **kinds)
    trainer.model.train()
    return trainer


def generated(trainer, rewards: list[float]) -> dict:
    """Returns TRL's batch of the given completions with these rewards."""
    rows = [
        {"prompt": words(PROMPTS[i // NUM_GENERATIONS]), "value": value} for i, value in enumerate(rewards)
    ]
    return trainer._generate_and_score_completions(rows)


def advantages(folder: str) -> list[dict]:
    """Returns TRL's advantages of REWARDS for each way of scaling."""
    cases = []
    for scale in ("group", "none"):
        trainer = grpo_trainer(folder, 1.0, scale)
        for name, rewards in REWARDS.items():
            batch = generated(trainer, rewards)
            metrics = taken(trainer, lambda name: name in ("reward", "reward_std", "frac_reward_zero_std"))
            case = {"name": name, "scale_rewards": scale, "rewards": rewards, "metrics": metrics}
            cases.append(case | {"advantages": batch["advantages"].tolist()})
    return cases


def log_probs(trainer, model, batch: dict) -> torch.Tensor:
    """Returns TRL's log-probabilities (B, L) of the completions' tokens; 0 at the padding."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        count = batch["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, count)[0]


def ragged(values: torch.Tensor) -> list[list[float]]:
    """Returns (B, L) without the padding."""
    return [row[: len(ids)].tolist() for row, ids in zip(values, COMPLETIONS, strict=True)]


def grpo_case(trainer, batch: dict, loss_type: str, beta: float, corrected: bool, micro_batches: int) -> dict:
    """Returns TRL's losses of the micro-batches of one step, the gradient of their sum, and the metrics.

    `corrected` is TRL's use_bias_correction_kl, its default: the KL estimate of a token is multiplied by the
    token's ratio, in the loss and in the metric.
    """
    trainer.loss_type, trainer.beta, trainer.args.use_bias_correction_kl = loss_type, beta, corrected
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.args.steps_per_generation = micro_batches
    size, losses = len(COMPLETIONS) // micro_batches, []
    for i in range(micro_batches):
        part = {k: v if v.ndim == 0 else v[i * size : (i + 1) * size] for k, v in batch.items()}
        loss = trainer.compute_loss(trainer.model, part)
        loss.backward()
        losses.append(loss.item())
    setting = {"loss_type": loss_type, "beta": beta, "use_bias_correction_kl": corrected}
    setting |= {"mask_truncated_completions": trainer.mask_truncated_completions}
    found = {"losses": losses, "loss": sum(losses), "metrics": taken(trainer, METRICS.__contains__)}
    setting |= {"temperature": trainer.temperature, "micro_batches": micro_batches}
    # dapo divides by it; it counts the tokens of the whole step, without masked completions.
    setting |= {"num_items_in_batch": batch["num_items_in_batch"].item()}
    return setting | found | {"gradient": gradient(trainer.model)}


def grpo_batch(trainer) -> dict:
    """Returns TRL's batch of COMPLETIONS with ADVANTAGES, and old and reference log-probabilities."""
    from trl.trainer.utils import add_fused_lm_head

    batch = generated(trainer, REWARDS["all different"]) | {"advantages": torch.tensor(ADVANTAGES)}
    trainer._metrics["train"].clear()
    policy, reference = log_probs(trainer, trainer.model, batch), tiny_model(False)
    add_fused_lm_head(reference, temperature=trainer.temperature)
    offsets = torch.tensor(LOG_RATIOS)[torch.arange(policy.numel()) % len(LOG_RATIOS)]
    old = policy - offsets.view_as(policy)
    reference = log_probs(trainer, reference, batch)
    return batch | {"old_per_token_logps": old, "ref_per_token_logps": reference, "policy": policy}


def grpo(folder: str) -> dict:
    """Returns the inputs and the cases; only the plain ones are also split into two micro-batches."""
    logps, cases = {}, []
    for temperature, truncated in ((1.0, False), (1.0, True), (0.7, False)):
        trainer = grpo_trainer(folder, temperature, truncated=truncated)
        batch = grpo_batch(trainer)
        names = {"policy": "policy", "old": "old_per_token_logps", "reference": "ref_per_token_logps"}
        if not truncated:  # The trainer then masks a completion, and its log-probabilities are 0.
            logps[str(temperature)] = {name: ragged(batch[key]) for name, key in names.items()}
        kinds = ("dapo", "dr_grpo", "grpo") if temperature == 1 else ("dapo",)
        splits = (1, 2) if (temperature, truncated) == (1.0, False) else (1,)
        for kind, (beta, corrected) in product(kinds, ((0.0, False), (0.04, False), (0.04, True))):
            cases += [grpo_case(trainer, batch, kind, beta, corrected, count) for count in splits]
    return {
        "prompts": PROMPTS,
        "num_generations": NUM_GENERATIONS,
        "completions": COMPLETIONS,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "epsilon": EPSILON,
        "advantages": ADVANTAGES,
        "logps": logps,
        "cases": cases,
        "advantages_of_rewards": advantages(folder),
    }


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import transformers
    import trl

    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    with tempfile.TemporaryDirectory() as folder:
        goldens = {"versions": versions, "config": CONFIG, "dpo": dpo(folder), "grpo": grpo(folder)}
    OUT.write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
