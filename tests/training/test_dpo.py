"""training/objectives/dpo.py: the loss by hand and by loops, the reference, and which tokens have a label."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from common.device import Precision
from data.packing import pack
from data.render import IGNORE_INDEX
from data.rows import Sample, read_samples
from generation.load import LoadedModel
from lora.inject import disabled
from model.tokenizer import Tokenizer
from tests.makers import tiny_model, write_tokenizer
from training.objectives import dpo
from training.objectives.dpo import DirectPreferenceOptimization, reference_log_probs

PAIRS = [
    {"prompt": "Count to two, please.", "chosen": "one two", "rejected": "one"},
    {"prompt": "Name a large animal of Africa.", "chosen": "an elephant", "rejected": "an ant, or so"},
    {"prompt": "Say no.", "chosen": "no", "rejected": "yes yes yes"},
]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


def samples(tmp_path, rows=PAIRS) -> list[Sample]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_samples(file)[0]


def documents(tmp_path, tokenizer, rows=PAIRS, max_length=200, on_long="error"):
    found = samples(tmp_path, rows)
    return DirectPreferenceOptimization().documents(found, tokenizer, max_length, on_long, 400)


def loaded(model, tokenizer, tmp_path) -> LoadedModel:
    return LoadedModel(model, tokenizer, tmp_path, Precision("fp32", torch.device("cpu")))


def naive_log_prob(model, document) -> torch.Tensor:
    """log p of the labelled tokens of one document, from the logits of the whole document."""
    ids = torch.tensor(document.input_ids)
    hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), reference=True)
    table = model.logits(hidden).log_softmax(-1)
    total = torch.zeros((), dtype=table.dtype)
    for position, label in enumerate(document.labels):
        if label != IGNORE_INDEX:
            total = total + table[position, label]
    return total


def naive_loss(model, docs, reference, beta) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(len(docs) // 2):
        chosen, rejected = (naive_log_prob(model, docs[2 * pair + i]) for i in range(2))
        margin = beta * ((chosen - reference[pair][0]) - (rejected - reference[pair][1]))
        total = total - torch.log(1 / (1 + torch.exp(-margin)))
    return total


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# --- the loss


@pytest.mark.parametrize("share", [True, False], ids=["prompt computed once", "prompt computed twice"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_gradient_equal_nested_loops_in_float64(tmp_path, tokenizer, beta, share):
    docs, _ = documents(tmp_path, tokenizer)
    model, objective = tiny_model(dtype=torch.float64), DirectPreferenceOptimization(beta)
    reference = torch.tensor([[-31.0, -18.5], [-60.0, -66.0], [-14.0, -50.25]], dtype=torch.float64)
    objective.reference = dict(zip([d.id for d in docs[::2]], reference, strict=True))
    loss, pairs, _ = objective.loss(model, pack(docs, share))
    wanted = naive_loss(model, docs, reference, beta)
    assert pairs == 3
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(gradients(model, loss), gradients(model, wanted), rtol=1e-9, atol=1e-12)


def test_at_the_start_the_loss_is_log_2_and_its_slope_half_of_beta(tmp_path, tokenizer):
    docs, _ = documents(tmp_path, tokenizer)
    model, objective = tiny_model(dtype=torch.float64), DirectPreferenceOptimization(0.3)
    values = reference_log_probs(loaded(model, tokenizer, tmp_path), docs)
    objective.reference = dict(zip([d.id for d in docs[::2]], values, strict=True))
    batch = pack(docs, share_prefix=True)
    loss, pairs, metrics = objective.loss(model, batch)
    assert loss.item() / pairs == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["rewards/margins"][0].item() == pytest.approx(0, abs=1e-12)
    assert metrics["rewards/accuracies"][0].item() == 0  # rounding prefers nothing
    slope = torch.zeros(len(docs), dtype=torch.float64)
    slope[::2], slope[1::2] = -0.15, 0.15
    sums = batch.sums(dpo.target_log_probs(model, batch)[0])
    torch.testing.assert_close(gradients(model, loss), gradients(model, (slope * sums).sum()))


@pytest.mark.parametrize(
    "precision, gain, preferred", [("fp32", 0.1, 1), ("bf16", 0.7, 0), ("bf16", 1.5, 1), ("fp16", 0.1, 0)]
)
def test_a_margin_that_rounding_may_make_prefers_nothing(tmp_path, tokenizer, precision, gain, preferred):
    """In bfloat16 the margins of unchanged pairs of the embedded base reach 0.95 nats (mean 0.13)."""
    docs, _ = documents(tmp_path, tokenizer, PAIRS[:1])
    model, objective = tiny_model(), DirectPreferenceOptimization(0.1)
    base = LoadedModel(model, tokenizer, tmp_path, Precision(precision, torch.device("cpu")))
    objective.begin(base, [], docs, start="")
    (values,) = reference_log_probs(loaded(model, tokenizer, tmp_path), docs)
    objective.reference = {docs[0].id: values - torch.tensor([gain, 0.0])}
    assert objective.loss(model, pack(docs))[2]["rewards/accuracies"][0].item() == preferred


def test_metrics_of_a_pair_worked_by_hand(tmp_path, tokenizer):
    """log p gained 2 on the chosen answer and lost 3 on the rejected one: with beta 0.1, r = 0.2 and -0.3."""
    docs, _ = documents(tmp_path, tokenizer, PAIRS[:1])
    model, objective = tiny_model(), DirectPreferenceOptimization(0.1)
    (values,) = reference_log_probs(loaded(model, tokenizer, tmp_path), docs)
    objective.reference = {docs[0].id: values + torch.tensor([-2.0, 3.0])}
    loss, _, metrics = objective.loss(model, pack(docs, share_prefix=True))
    found = {name: float(value) for name, (value, weight) in metrics.items() if weight == 1}
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-5)
    assert found["rewards/chosen"] == pytest.approx(0.2, abs=1e-5)
    assert found["rewards/rejected"] == pytest.approx(-0.3, abs=1e-5)
    assert (found["rewards/margins"], found["rewards/accuracies"]) == (pytest.approx(0.5, abs=1e-5), 1.0)
    assert found["logps/chosen"] == pytest.approx(float(values[0]), abs=1e-4)


def test_pairs_with_one_prompt_keep_their_answers_apart(tmp_path, tokenizer):
    rows = [PAIRS[0], PAIRS[1], PAIRS[0] | {"rejected": "three"}]
    docs, _ = documents(tmp_path, tokenizer, rows)
    model = tiny_model(dtype=torch.float64)
    found = reference_log_probs(loaded(model, tokenizer, tmp_path), docs)
    wanted = torch.stack([naive_log_prob(model, d) for d in docs]).view(-1, 2)
    torch.testing.assert_close(found, wanted.detach())


# --- documents


def test_both_answers_follow_each_other_and_only_the_last_answer_has_labels(tmp_path, tokenizer):
    turns = [("user", "Hello, you."), ("assistant", "Hi there."), ("user", "Bye now.")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    docs, counts = documents(tmp_path, tokenizer, [{"prompt": prompt, "chosen": "Bye.", "rejected": "No."}])
    for document, answer in zip(docs, ("Bye.", "No."), strict=True):
        labels = [label for label in document.labels if label != IGNORE_INDEX]
        assert labels[: len(answer)] == tokenizer.encode(answer)[-len(answer) :]
        assert labels[len(answer)] in tokenizer.stop_ids
        assert document.labels.index(labels[0]) > document.input_ids.index(tokenizer.encode("B")[-1])
    assert docs[0].id == docs[1].id
    assert counts.kept == 1


def test_a_pair_is_left_out_if_one_answer_is_too_long(tmp_path, tokenizer):
    rows = [*PAIRS, {"prompt": "Go.", "chosen": "ok", "rejected": "word " * 60}]
    docs, counts = documents(tmp_path, tokenizer, rows, max_length=150, on_long="drop")
    assert [d.id for d in docs] == [f"pairs.jsonl:{n}" for n in (1, 1, 2, 2, 3, 3)]
    assert (counts.kept, counts.dropped) == (3, 1)
    with pytest.raises(ValueError, match="none of the 1 pairs fits|none of the 2 samples"):
        documents(tmp_path, tokenizer, rows[-1:], max_length=20, on_long="drop")


@pytest.mark.parametrize("turns", [1, 3], ids=["one turn", "three turns"])
def test_a_pair_whose_answer_would_be_cut_is_left_out(tmp_path, tokenizer, turns):
    """Of three turns, an earlier answer would stand in the place of both; of one, the answers begin alike."""
    prompt = [{"role": ("user", "assistant")[i % 2], "content": "word " * 8} for i in range(turns)]
    long = {"prompt": prompt, "chosen": "same " * 30 + "a", "rejected": "same " * 30 + "b"}
    (whole, _), _ = documents(tmp_path, tokenizer, [long], max_length=10**4)
    cut = len(whole.input_ids) - (20 if turns == 1 else 160)
    docs, counts = documents(tmp_path, tokenizer, [long, *PAIRS], max_length=cut, on_long="truncate")
    assert [d.id for d in docs] == [f"pairs.jsonl:{n}" for n in (2, 2, 3, 3, 4, 4)]
    assert (counts.kept, counts.dropped, counts.truncated) == (3, 1, 0)


def test_rows_without_a_rejected_answer_are_named(tokenizer):
    lacking = [Sample("a.jsonl:7", (("user", "q"), ("assistant", "a")))]
    with pytest.raises(ValueError, match=r'"chosen" and "rejected"; these have none:\n.*a.jsonl:7'):
        DirectPreferenceOptimization().documents(lacking, tokenizer, 100, "error", 400)


# --- the reference


def begin(model, tokenizer, tmp_path, docs, start="start") -> DirectPreferenceOptimization:
    objective = DirectPreferenceOptimization()
    objective.begin(loaded(model, tokenizer, tmp_path), [], docs, start)
    return objective


def test_the_reference_is_the_model_at_the_start_with_its_adapter(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dpo, "cache", lambda: tmp_path)
    docs, _ = documents(tmp_path, tokenizer)
    model = tiny_model()  # its adapters change its output, as those of adapter.init_from do
    found = begin(model, tokenizer, tmp_path, docs).reference[docs[0].id]
    torch.testing.assert_close(found[0], naive_log_prob(model, docs[0]).detach())
    with disabled(model):
        assert (found[0] - naive_log_prob(model, docs[0])).abs() > 0.1


def test_the_reference_is_computed_once_and_kept_by_what_it_depends_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dpo, "cache", lambda: tmp_path)
    docs, _ = documents(tmp_path, tokenizer)
    first = begin(tiny_model(), tokenizer, tmp_path, docs)
    kept = list((tmp_path / "references").iterdir())
    calls = []
    monkeypatch.setattr(dpo, "reference_log_probs", lambda *args: calls.append(1) or torch.zeros(3, 2))
    again = begin(tiny_model(1), tokenizer, tmp_path, docs)
    assert not calls
    assert all(torch.equal(again.reference[k], v) for k, v in first.reference.items())
    begin(tiny_model(), tokenizer, tmp_path, docs, start="another adapter")
    begin(tiny_model(), tokenizer, tmp_path, docs[:4][::-1] + docs[4:])
    assert len(calls) == 2
    kept[0].write_bytes(b"cut off")
    begin(tiny_model(), tokenizer, tmp_path, docs)
    assert len(calls) == 3
    assert load_file(kept[0])["log_probs"].shape == (3, 2)


def test_only_the_newest_references_are_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dpo, "cache", lambda: tmp_path)
    docs, _ = documents(tmp_path, tokenizer)
    monkeypatch.setattr(dpo, "reference_log_probs", lambda *args: torch.zeros(3, 2))
    for n in range(dpo.KEPT + 3):
        before = set(tmp_path.glob("references/*"))
        begin(tiny_model(), tokenizer, tmp_path, docs, start=f"adapter {n}")
        (new,) = {*tmp_path.glob("references/*")} - before
        os.utime(new, (n, n))
    assert sorted(f.stat().st_mtime for f in tmp_path.glob("references/*")) == list(range(3, dpo.KEPT + 3))
