"""Adapters made here work in PEFT and the reverse, and evaluate.py's loss equals transformers'."""

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
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
RANKS, ALPHAS = {"layers.5.self_attn.q_proj": 6, "down_proj": 2}, {"v_proj": 3}
OURS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "dora": {"type": "dora"},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
}
RSDORA = {"use_dora": True, "use_rslora": True}
THEIRS = {
    "rslora with patterns": {"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "dora": {"use_dora": True},
    "dora with rslora and patterns": RSDORA
    | {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"gate_proj": 5}},
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
    """The adapter changes the logits; if it did not, the other comparisons would hold without it."""
    assert (adapted - logits(load_model(base, torch.float32), TOKENS)).abs().max() > 0.01


def trained_here(base: str, **settings):
    """A model with adapters after three steps on random tokens."""
    model = load_model(base, torch.float32)
    # With seed 1 one position's activations nearly cancel, and rounding moves its logits by 1.6e-5.
    inject(model, **(SETTINGS | {"seed": 4} | settings))
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
    model = get_peft_model(reference(base), LoraConfig(task_type="CAUSAL_LM", **(SETTINGS | THEIRS[variant])))
    shake(model, 0.03)
    model.eval().save_pretrained(tmp_path)
    ours = load_model(base, torch.float32)
    load_adapter(ours, tmp_path)
    mine = logits(ours, TOKENS)
    assert_adapted(mine, base)
    assert_same(mine, their_logits(model))


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_model_equals_adapter_model(base, variant, dtype, close):
    """In float64 rounding does not hide a small mistake in a formula."""
    model = trained_here(base, **OURS[variant]).to(dtype)
    unmerged = logits(model, TOKENS)
    merge(model)
    torch.testing.assert_close(unmerged, logits(model, TOKENS), rtol=0, atol=close)


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_an_untrained_adapter_equals_the_base_to_the_last_bit(base, type):
    model = load_model(base, torch.float32)
    expected = logits(model, TOKENS)
    inject(model, type=type, **SETTINGS, seed=1)
    assert torch.equal(logits(model, TOKENS), expected)


def messages_of(row: dict) -> list[dict]:
    pairs = [("user", "prompt"), ("assistant", "response")]
    return row.get("messages") or [{"role": role, "content": row[key]} for role, key in pairs]


def reference_row(tokenizer, messages: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, T) ids by transformers' chat template, and labels for each response and its <end_of_turn>."""

    def ids_of(messages, **how) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=True, **how)["input_ids"]

    ids = ids_of(messages)
    labels, end_of_turn = [IGNORE_INDEX] * len(ids), tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(ids_of(messages[:i], add_generation_prompt=True))
            end = ids.index(end_of_turn, start) + 1
            labels[start:end] = ids[start:end]
    return torch.tensor([ids]), torch.tensor([labels])


def reference_loss(base: str, adapter: str | None, rows: list[dict]) -> tuple[float, int]:
    """Returns transformers' mean loss over the supervised tokens of all rows, and their number."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), reference(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    total = count = 0
    for row in rows:
        ids, labels = reference_row(tokenizer, messages_of(row))
        n = int((labels != IGNORE_INDEX).sum())
        with torch.no_grad():
            total += n * model(ids, labels=labels).loss.item()  # The loss is a mean over the n tokens.
        count += n
    return total / count, count


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_the_loss_of_evaluate_is_the_token_mean_of_transformers(tmp_path, base, capsys, kind):
    rows = [*ROWS, CHAT]
    adapter = make_adapter(tmp_path / "adapter", base, type=kind) if kind else None
    words = ["--model", base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--json", "--loss-only"]
    words += ["--device", "cpu", "--dtype", "float32", *(["--adapter", adapter] if adapter else [])]
    assert evaluate.main(words) == 0
    mine = json.loads(capsys.readouterr().out)
    loss, count = reference_loss(base, adapter, rows)
    assert (mine["tokens"], mine["loss"]) == (count, pytest.approx(loss, abs=1e-4))
    if adapter:
        assert abs(loss - reference_loss(base, None, rows)[0]) > 1e-3
