"""training/rehearsal.py: what each phase of a run takes, part by part, before there are weights."""

from dataclasses import replace

import pytest
import torch

from common.device import Precision
from data.loader import Loader
from data.render import IGNORE_INDEX, Document
from model.gemma3 import Gemma3ForCausalLM
from model.loss import CHUNK_BYTES
from tests.makers import documents, tiny_config
from training import setup
from training.config import Adapter, Config, Generate, Train
from training.dataset import TrainingData, ValidationSet
from training.ledger import LOGITS, WORKING
from training.rehearsal import BASE, GRADIENTS, OPTIMIZER, TRAINED, Rehearsal, largest, steps_of

CPU = torch.device("cpu")


class Words:
    """A tokenizer of letters."""

    def render_prompt(self, messages) -> list[int]:
        return [2, 7, *messages[0][1].encode()]


def rehearse(
    rows, adapter: Adapter | None = None, train: Train | None = None, precision: str = "fp32", **sizes
) -> Rehearsal:
    with torch.device("meta"):
        model = Gemma3ForCausalLM(tiny_config(**sizes))
    cfg = Config(
        adapter=adapter or Adapter(r=4),
        train=train or Train(batch_size=4),
        generate=Generate(max_new_tokens=20, prompts=["a", "b"]),
    )
    data = TrainingData(rows, [ValidationSet("val", [], rows)], [], {})
    return Rehearsal(cfg, setup.Base(model, Words(), None, ""), data, Precision(precision, CPU))


def plan_of(loader: Loader, steps: int, accumulate: int):
    cfg = Config(train=Train(max_steps=steps, gradient_accumulation_steps=accumulate))
    return setup.build_plan(cfg, loader)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_parts_are_the_numbers_times_their_bytes(kind):
    run = rehearse(documents(8), Adapter(type=kind, r=4), precision="bf16")
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in run.trained)
    parts = run.steps(run.cfg.train).parts
    assert (
        parts.get(BASE, 0) == 2 * frozen and parts[TRAINED] == 4 * trained
    )  # a frozen base in bfloat16, what trains in float32
    assert parts[OPTIMIZER] == 8 * trained + 4 * len(
        run.trained
    )  # two moments, and a counter for each tensor
    assert 0 <= parts.get(GRADIENTS, 0) <= 4 * trained and parts[WORKING] > 0


def test_a_second_micro_batch_finds_the_gradients_of_the_first():
    row = documents(1, shortest=40)
    alone, after = (
        rehearse(row * 4, train=Train(batch_size=1, gradient_accumulation_steps=n)) for n in (1, 2)
    )
    trained = sum(p.numel() for p in alone.trained)
    alone, after = alone.steps(alone.cfg.train), after.steps(after.cfg.train)
    assert after.parts[GRADIENTS] == 4 * trained and after.total > alone.total


def test_logits_of_all_words_never_live_for_a_whole_batch():
    """2,000 supervised positions over Gemma's vocabulary are 2 GB in float32: in training, evaluation and answers a chunk is held at a time."""
    row = Document([7] * 2000, [7] * 1999 + [IGNORE_INDEX], "long")
    for kind in ("lora", "full"):
        run = rehearse([row] * 2, Adapter(type=kind, r=4), Train(batch_size=1), vocab_size=262_144)
        for forecast in (run.steps(run.cfg.train), *run.evaluations()):
            assert forecast.parts.get(LOGITS, 0) <= 3 * CHUNK_BYTES["cpu"], forecast
        assert run.steps(run.cfg.train).total < 2 * 262_144 * 2000
    run = rehearse([row] * 2, train=Train(batch_size=1), vocab_size=262_144)
    assert run.steps(run.cfg.train).parts[LOGITS] >= CHUNK_BYTES["cpu"] / 2


def test_the_heaviest_step_is_found_wherever_it_comes():
    """Of 3 steps of 2 micro-batches of 2 documents: the most tokens, and the longest document."""
    rows = [Document([7] * n, [7] * n, str(n)) for n in (5, 5, 30, 30, 5, 5, 50, 1, 5, 5, 5, 5)]
    loader = Loader(rows, 2, seed=0, shuffle=False)
    steps, heaviest = steps_of(loader, plan_of(loader, 3, 2))
    assert steps == [((0, 1),), ((0, 1), (2, 3)), ((4, 5),), ((4, 5), (6, 7)), ((8, 9),), ((8, 9), (10, 11))]
    assert {((0, 1), (2, 3)), ((4, 5), (6, 7))} <= heaviest <= set(steps)
    assert steps_of(loader, plan_of(loader, 1, 1)) == ([((0, 1),)], {((0, 1),)})
    assert len(steps_of(loader, plan_of(loader, 30, 1))[0]) == 6, "of five equal epochs one is rehearsed"


def test_recomputed_layers_are_planned_with_less():
    kept, recomputed = (
        rehearse(documents(8), train=Train(batch_size=4, gradient_checkpointing=r)) for r in (False, True)
    )
    kept, recomputed = (r.steps(r.cfg.train).parts[WORKING] for r in (kept, recomputed))
    assert recomputed < 0.8 * kept


def test_the_largest_batch_is_the_last_that_fits():
    run = rehearse(
        documents(12),
        train=Train(batch_size=4, max_steps=9),
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    sizes = [run.steps(replace(run.cfg.train, batch_size=n)).total for n in range(1, 5)]
    assert sizes == sorted(sizes)
    for n in (1, 3, 4):
        assert largest(run, sizes[n - 1]).batch_size == n
    assert largest(run, sizes[0] - 1) is None


def test_answers_take_the_cache_for_all_tokens_that_may_come():
    run = rehearse(documents(4))
    short = run.evaluations()[-1]
    run.cfg.generate.max_new_tokens = 400
    long, cfg = run.evaluations()[-1], run.model.config
    full = cfg.layer_types.count("full_attention")
    assert short.phase == long.phase == "answers"
    assert long.total - short.total == pytest.approx(
        2 * 4 * 2 * cfg.head_dim * 380 * full, rel=0.05
    )  # keys and values of 2 rows, 380 columns more
