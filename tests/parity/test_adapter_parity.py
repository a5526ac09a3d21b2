"""Adapters cross to PEFT and back on Gemma 3 itself, and evaluate.py's loss is transformers' on the same
rows.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers import Gemma3ForCausalLM as Reference

import evaluate
from data.packing import pack
from data.render import IGNORE_INDEX, Document
from lora.inject import inject
from lora.merge import merge
from lora.peft_io import load_adapter, save_adapter
from model.weights import load_model
from tests.folders import CHAT, ROWS, TARGETS, logits, make_adapter, shake, write_rows
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

TOKENS = torch.randint(200, 6000, (48,), generator=torch.Generator().manual_seed(5))  # six windows of 8
OURS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.5.self_attn.q_proj": 6, "down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"type": "dora"},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
}
THEIRS = {
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.5.self_attn.q_proj": 6, "down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"use_dora": True},
    "dora with rslora and patterns": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"gate_proj": 5},
    },
    "all linear": {"target_modules": "all-linear"},
}


def reference(base: str) -> Reference:
    return Reference.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def their_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def assert_adapted(adapted: torch.Tensor, base: str) -> None:
    """The adapter does enough to be seen: otherwise the other comparisons would hold without it."""
    assert (adapted - logits(load_model(base, torch.float32), TOKENS)).abs().max() > 0.01


def trained_here(base: str, **settings):
    """A model with adapters after three steps on random tokens."""
    model = load_model(base, torch.float32)
    # After seed 1 one position's activations nearly cancel, and float32's rounding alone moves its logits by
    # 1.6e-5.
    inject(model, **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "seed": 4} | settings)
    ids = TOKENS.flip(0).tolist()
    batch = pack([Document(ids, [*ids[1:], IGNORE_INDEX], "random")])
    (optimizer,) = make_optimizers(model, "adamw", 5e-3, 0.0)
    for _ in range(3):
        SupervisedFineTuning().loss(model, batch)[0].backward()
        optimizer.step()
        model.zero_grad()
    return model.eval()


def test_the_base_gives_the_logits_of_transformers(base):
    assert_same(logits(load_model(base, torch.float32), TOKENS), their_logits(reference(base)))


@pytest.mark.parametrize("variant", OURS)
def test_an_adapter_trained_here_gives_the_same_logits_in_peft(tmp_path, base, variant):
    model = trained_here(base, **OURS[variant])
    mine = logits(model, TOKENS)
    assert_adapted(mine, base)
    save_adapter(model, tmp_path, base_model_name=base)
    assert_same(mine, their_logits(PeftModel.from_pretrained(reference(base), tmp_path)))


@pytest.mark.parametrize("variant", THEIRS)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(tmp_path, base, variant):
    torch.manual_seed(0)  # PEFT draws lora_A from the global generator
    model = get_peft_model(
        reference(base),
        LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | THEIRS[variant]
        ),
    )
    shake(model, 0.03)
    model.eval().save_pretrained(tmp_path)
    ours = load_model(base, torch.float32)
    load_adapter(ours, tmp_path)
    mine = logits(ours, TOKENS)
    assert_adapted(mine, base)
    assert_same(mine, their_logits(model))


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_merged_model_equals_adapter_model(base, variant, dtype, close):
    """In float64 too, where a formula that is wrong by little has no rounding to hide in."""
    model = trained_here(base, **OURS[variant]).to(dtype)
    unmerged = logits(model, TOKENS)
    merge(model)
    torch.testing.assert_close(unmerged, logits(model, TOKENS), rtol=0, atol=close)


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_an_untrained_adapter_equals_the_base_to_the_last_bit(base, type):
    model = load_model(base, torch.float32)
    expected = logits(model, TOKENS)
    inject(model, type=type, r=4, lora_alpha=8, target_modules=TARGETS, seed=1)
    assert torch.equal(logits(model, TOKENS), expected)


def messages_of(row: dict) -> list[dict]:
    return row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]


def reference_row(tokenizer, messages: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (1, T) ids by transformers' chat template, and labels on responses and their <end_of_turn>."""
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    labels, end_of_turn = [-100] * len(ids), tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(
                tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            )
            end = ids.index(end_of_turn, start) + 1
            labels[start:end] = ids[start:end]
    return torch.tensor([ids]), torch.tensor([labels])


def reference_loss(base: str, adapter: str | None, rows: list[dict]) -> tuple[float, int]:
    """transformers' loss: the mean over all supervised tokens of all rows, and how many these are."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), reference(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    total = count = 0
    for row in rows:
        ids, labels = reference_row(tokenizer, messages_of(row))
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += n * model(ids, labels=labels).loss.item()  # the mean over the row's n
        count += n
    return total / count, count


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_the_loss_of_evaluate_is_the_token_mean_of_transformers(tmp_path, base, capsys, kind):
    rows = [*ROWS, CHAT]
    adapter = make_adapter(tmp_path / "adapter", base, type=kind) if kind else None
    argv = [
        "--model",
        base,
        "--data",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--json",
        "--loss-only",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert evaluate.main(argv + (["--adapter", adapter] if adapter else [])) == 0
    mine = json.loads(capsys.readouterr().out)
    loss, count = reference_loss(base, adapter, rows)
    assert (mine["tokens"], mine["loss"]) == (count, pytest.approx(loss, abs=1e-4))
    if adapter:
        assert abs(loss - reference_loss(base, None, rows)[0]) > 1e-3
