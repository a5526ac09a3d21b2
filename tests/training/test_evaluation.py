"""training/evaluation.py: the labels' log-probabilities equal those of one label at a time, and bits per byte
count the bytes of the supervised text.
"""

import math
from pathlib import Path

import pytest
import torch

from common.device import Precision
from data.render import render
from data.rows import Sample
from generation.load import LoadedModel
from model.loss import reference_token_log_probs
from model.tokenizer import Tokenizer
from model.weights import load_model
from training import evaluation
from training.evaluation import label_log_probs, text_measures

LABELS = ["positive", "negative", "neither of the two, but indifferent", "0"]
ASK = "Is this review positive or negative?\n\n"
TEXTS = ["Hi", ASK + "Never again.", ASK + "A"]


@pytest.fixture(scope="module")
def loaded(base) -> LoadedModel:
    model = load_model(base, torch.float32)
    return LoadedModel(model, Tokenizer(base), Path(base), Precision("fp32", torch.device("cpu")))


def one_at_a_time(loaded, prompt, label):
    """Returns log p(label, end of turn | prompt) from the logits of this one document."""
    ids = [*loaded.tokenizer.encode(label), loaded.tokenizer.end_of_turn_id]
    tokens = torch.tensor(prompt + ids)
    n = len(tokens)
    hidden = loaded.model(tokens, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
    predicting = hidden[len(prompt) - 1 : -1]
    return reference_token_log_probs(predicting, loaded.model.head_weight, torch.tensor(ids)).sum().item()


@pytest.mark.parametrize("limit", [evaluation.LOSS_TOKENS, 100])
@torch.no_grad()
def test_label_log_probs_equal_those_of_one_label_at_a_time(loaded, limit, monkeypatch):
    monkeypatch.setattr(evaluation, "LOSS_TOKENS", limit)
    prompts = [loaded.tokenizer.render_prompt([("user", text)]) for text in TEXTS]
    assert len(prompts[0]) < 16 < len(prompts[1])  # too short for a shared prefix, and long enough
    found = label_log_probs(loaded, prompts, LABELS)
    expected = [[one_at_a_time(loaded, prompt, label) for label in LABELS] for prompt in prompts]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_the_labels_of_a_row_share_the_computation_of_its_prompt(loaded, monkeypatch):
    streams, forward = [], type(loaded.model).forward

    def counted(self, tokens, *args, **options):
        streams.append(tokens.tolist())
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(type(loaded.model), "forward", counted)
    prompts = [loaded.tokenizer.render_prompt([("user", text)]) for text in TEXTS[1:]]
    label_log_probs(loaded, prompts, LABELS)
    responses = [len(loaded.tokenizer.encode(label)) + 1 for label in LABELS]
    # each label has the last token of the prompt again, which predicts its first token
    assert [len(s) for s in streams] == [sum(len(p) - 1 + sum(n + 1 for n in responses) for p in prompts)]


RAW = "Zürich, 東京 \U0001f600 and a plain end."
CHAT = (("user", "hi"), ("assistant", " Grüezi! "), ("user", "más"), ("assistant", "ñandú"))


def test_bits_per_byte_divide_by_the_bytes_of_the_raw_text_and_of_all_responses(loaded):
    samples = [Sample("a:1", text=RAW), Sample("a:2", CHAT)]
    documents = [render(sample, loaded.tokenizer) for sample in samples]
    found = {"loss": math.log(2), "tokens": 1000}
    size = len(RAW.encode()) + len("Grüezi!".encode()) + len("ñandú".encode())
    measured = text_measures(found, documents, loaded.tokenizer)
    assert measured == {"perplexity": pytest.approx(2), "bits_per_byte": pytest.approx(1000 / size)}
