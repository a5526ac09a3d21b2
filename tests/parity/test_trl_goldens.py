"""Losses, gradients and metrics of TRL's DPO and GRPO are those of the formulas, with our model.

trl_goldens.json has TRL's numbers (make_trl_goldens.py). They are float32; here everything is float64, one
row and one token at a time.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from data.packing import pack
from data.render import IGNORE_INDEX, Document
from generation.generate import Completion
from model.config import Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from tests.makers import bounds
from tests.parity.make_trl_goldens import CONFIG, fill, gradient
from training import config
from training.objectives.dpo import DirectPreferenceOptimization
from training.objectives.grpo import GroupRelativePolicyOptimization, group_advantages

GOLDENS = json.loads(Path(__file__).with_name("trl_goldens.json").read_text(encoding="utf-8"))
DPO, GRPO = GOLDENS["dpo"], GOLDENS["grpo"]
CLOSE = {"rel": 2e-5, "abs": 2e-5}


def tiny(policy: bool = True) -> Gemma3ForCausalLM:
    assert GOLDENS["config"] == CONFIG, "trl_goldens.json is older than make_trl_goldens.py"
    sizes = {name: value for name, value in CONFIG.items() if name != "rope_parameters"}  # our defaults
    model = Gemma3ForCausalLM(Gemma3Config(**sizes)).double()
    fill(model.named_parameters(), policy)
    return model


def log_probs(model, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Returns log softmax(logits / temperature) (n,) of an answer's n tokens after their prompt."""
    tokens = torch.tensor(prompt + answer[:-1])
    hidden = model(tokens, torch.arange(len(tokens)), bounds([len(tokens)]), reference=True)
    logits = model.logits(hidden[len(prompt) - 1 :])
    return (logits / temperature).log_softmax(1)[torch.arange(len(answer)), torch.tensor(answer)]


def approx(expected, **changes):
    """Returns the expected floats, in a list or a dict, as a value that is equal to close ones."""
    return pytest.approx(expected, **(CLOSE | changes))


def check_gradient(model, expected: dict) -> None:
    found = gradient(model)
    assert found.pop("norm") == approx(expected["norm"])
    for name, parts in found.items():
        for part, value in parts.items():
            assert value == approx(expected[name][part], abs=2e-5 * expected[name]["abs_sum"]), (name, part)


def prompt_of(i: int) -> list[int]:
    return GRPO["prompts"][i // GRPO["num_generations"]]


@pytest.mark.parametrize("policy", [True, False])
def test_log_probs_of_our_model_are_those_of_trls_trainers(policy):
    model, name = tiny(policy), "policy" if policy else "reference"
    with torch.no_grad():
        for answer in ("chosen", "rejected"):
            sums = [log_probs(model, pair["prompt"], pair[answer]).sum().item() for pair in DPO["pairs"]]
            assert sums == approx(DPO[f"{name}_logps"][answer])
        for temperature, expected in GRPO["logps"].items():
            for i, completion in enumerate(GRPO["completions"]):
                values = log_probs(model, prompt_of(i), completion, float(temperature)).tolist()
                assert values == approx(expected[name][i])


@pytest.mark.parametrize("case", DPO["cases"], ids=lambda case: f"beta={case['beta']}")
def test_trls_dpo_is_the_formula(case):
    model, losses, measured = tiny(), [], []
    for i, pair in enumerate(DPO["pairs"]):
        chosen, rejected = (
            log_probs(model, pair["prompt"], pair[name]).sum() for name in ("chosen", "rejected")
        )
        better = case["beta"] * (chosen - DPO["reference_logps"]["chosen"][i])
        worse = case["beta"] * (rejected - DPO["reference_logps"]["rejected"][i])
        losses.append(-torch.nn.functional.logsigmoid(better - worse))
        row = {"rewards/chosen": better, "rewards/rejected": worse, "rewards/margins": better - worse}
        row |= {"rewards/accuracies": better > worse, "logps/chosen": chosen, "logps/rejected": rejected}
        measured.append({name: value.item() for name, value in row.items()})
    loss = sum(losses) / len(losses)
    loss.backward()
    assert [x.item() for x in losses] == approx(case["losses"])
    assert loss.item() == approx(case["loss"])
    for name, values in case["metrics_of_pairs"].items():
        mine = [row[name] for row in measured]
        assert mine == approx(values) and sum(mine) / len(mine) == approx(case["metrics"][name]), name
    check_gradient(model, case["gradient"])


def grpo_tokens(model, case: dict):
    """Returns (the losses, the facts of the tokens) of each completion; a masked one has empty lists."""
    known, low, high = GRPO["logps"][str(case["temperature"])], 1 - GRPO["epsilon"], 1 + GRPO["epsilon"]
    losses, facts = [], []
    for i, completion in enumerate(GRPO["completions"]):
        advantage, of_row, facts_of_row = GRPO["advantages"][i], [], []
        masked = case["mask_truncated_completions"] and completion[-1] != CONFIG["eos_token_id"]
        tokens = [] if masked else log_probs(model, prompt_of(i), completion, case["temperature"])
        for t, lp in enumerate(tokens):
            ratio, d = (lp - known["old"][i][t]).exp(), known["reference"][i][t] - lp
            clipped = min(max(ratio, low), high)
            kl = (d.exp() - d - 1) * (ratio if case["use_bias_correction_kl"] else 1)
            of_row.append(-min(ratio * advantage, clipped * advantage) + case["beta"] * kl)
            facts_of_row.append((kl.item(), ratio < low and advantage < 0, ratio > high and advantage > 0))
        losses.append(of_row)
        facts.append(facts_of_row)
    return losses, facts


def reduced(losses: list[list], loss_type: str) -> list:
    """Returns what each completion adds to the loss of the step."""
    rows = len(losses)
    divisors = {
        "dapo": [sum(len(row) for row in losses)] * rows,
        "dr_grpo": [rows * GRPO["max_completion_length"]] * rows,
        "grpo": [rows * max(len(row), 1) for row in losses],
    }[loss_type]
    return [sum(row) / divisor for row, divisor in zip(losses, divisors, strict=True)]


def name_of(case: dict) -> str:
    return " ".join(f"{value}" for name, value in case.items() if name in list(case)[:6])


@pytest.mark.parametrize("case", GRPO["cases"], ids=name_of)
def test_trls_grpo_is_the_formula(case):
    model, count = tiny(), case["micro_batches"]
    losses, facts = grpo_tokens(model, case)
    parts = reduced(losses, case["loss_type"])
    sum(parts).backward()
    assert sum(len(row) for row in losses) == case["num_items_in_batch"]
    size, micro_batches = len(parts) // count, range(count)
    values = [part.item() if isinstance(part, torch.Tensor) else part for part in parts]
    of_micro_batches = [sum(values[i * size : (i + 1) * size]) for i in micro_batches]
    assert of_micro_batches == approx(case["losses"]) and sum(values) == approx(case["loss"])
    check_gradient(model, case["gradient"])
    means = []
    for i in micro_batches:
        tokens = [fact for row in facts[i * size : (i + 1) * size] for fact in row]
        kl, low, high = (sum(column) / len(tokens) for column in zip(*tokens, strict=True))
        means.append({"kl": kl, "low_mean": low, "high_mean": high, "region_mean": low + high})
    for name, expected in case["metrics"].items():
        mine = sum(mean[name.removeprefix("clip_ratio/")] for mean in means) / count
        assert mine == approx(expected, abs=1e-4), name


@pytest.mark.parametrize(
    "case", GRPO["advantages_of_rewards"], ids=lambda case: f"{case['scale_rewards']}, {case['name']}"
)
def test_trls_advantages_are_the_formula(case):
    rewards, size, expected = case["rewards"], GRPO["num_generations"], []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (size - 1))
        scale = std + 1e-4 if case["scale_rewards"] == "group" else 1
        expected += [(reward - mean) / scale for reward in group]
    assert case["advantages"] == approx(expected)


# --- our objectives


def document(prompt: list[int], answer: list[int], id: str) -> Document:
    labels = [IGNORE_INDEX] * (len(prompt) - 1) + answer
    return Document([*prompt, *answer[:-1]], labels, id)


@pytest.mark.parametrize("case", DPO["cases"], ids=lambda case: f"beta={case['beta']}")
def test_our_dpo_gives_trls_losses_metrics_and_gradients(case):
    model, objective = tiny(), DirectPreferenceOptimization(case["beta"])
    pairs = list(enumerate(DPO["pairs"]))
    docs = [document(p["prompt"], p[k], str(i)) for i, p in pairs for k in ("chosen", "rejected")]
    known = DPO["reference_logps"]
    objective.reference = {
        str(i): torch.tensor([known["chosen"][i], known["rejected"][i]]).double() for i, _ in pairs
    }
    loss, weight, metrics = objective.loss(model, pack(docs, share_prefix=True))
    (loss / weight).backward()
    assert (loss / weight).item() == pytest.approx(case["loss"], abs=1e-5)
    for name, (value, count) in metrics.items():
        assert value.item() / count == approx(case["metrics"][name]), name
    check_gradient(model, case["gradient"])


def completion_batches(method, case: dict) -> list:
    """Returns the micro-batches of a case, with TRL's advantages and old and reference log-probabilities."""
    known, size = GRPO["logps"][str(case["temperature"])], len(GRPO["completions"]) // case["micro_batches"]
    batches = []
    for start in range(0, len(GRPO["completions"]), size):
        rows, done = range(start, start + size), []
        for i in rows:
            tokens = GRPO["completions"][i]
            stop = tokens[-1] if tokens[-1] == CONFIG["eos_token_id"] else None
            ids = tokens[:-1] if stop is not None else tokens
            reason = "length" if stop is None else "stop"
            done.append(Completion(ids, reason, stop, known["policy"][i]))
        # Of these, none is the mean: no advantage is 0, and no completion is left out.
        rewards = torch.tensor([0.0, 1.0, 5.0]).repeat(size // GRPO["num_generations"], 1)
        batch = method._batch([prompt_of(i) for i in rows], done, rewards, {}, [str(i) for i in rows])
        order = [int(i) for i in batch.ids]
        masked = [case["mask_truncated_completions"] and done[i - start].stop_id is None for i in order]
        batch.advantages = torch.tensor(
            [0.0 if m else GRPO["advantages"][i] for i, m in zip(order, masked, strict=True)],
            dtype=torch.float64,
        )
        batch.old = torch.tensor([x for i in order for x in known["old"][i]], dtype=torch.float64)
        if case["beta"]:
            batch.reference = torch.tensor([x for i in order for x in known["reference"][i]]).double()
        batches.append(batch)
    return batches


# Loupe's KL term is the plain k3; TRL can multiply it with the ratio.
OURS = [c for c in GRPO["cases"] if not (c["use_bias_correction_kl"] and c["beta"])]


@pytest.mark.parametrize("case", OURS, ids=name_of)
def test_our_grpo_gives_trls_loss_and_gradients_in_each_reduction(case):
    names = ("loss_type", "beta", "temperature", "mask_truncated_completions")
    settings = config.GRPO(
        num_generations=GRPO["num_generations"],
        max_completion_length=GRPO["max_completion_length"],
        **{name: case[name] for name in names},
    )
    model, method = tiny(), GroupRelativePolicyOptimization(settings)
    parts = [method.loss(model, batch) for batch in completion_batches(method, case)]
    loss = sum(part for part, _, _ in parts) / sum(weight for _, weight, _ in parts)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    check_gradient(model, case["gradient"])
    if case["micro_batches"] == 1:  # TRL averages the means of micro-batches
        for name, value in case["metrics"].items():
            if name in parts[0][2]:
                found, count = parts[0][2][name]
                assert found.item() / count == approx(value, abs=1e-4), name


@pytest.mark.parametrize(
    "case", GRPO["advantages_of_rewards"], ids=lambda case: f"{case['scale_rewards']}, {case['name']}"
)
def test_our_advantages_are_trls(case):
    rewards = torch.tensor(case["rewards"], dtype=torch.float64).view(-1, GRPO["num_generations"])
    assert group_advantages(rewards, case["scale_rewards"] == "group").flatten().tolist() == approx(
        case["advantages"]
    )
