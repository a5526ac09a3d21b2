"""A run rehearsed without numbers (training/ledger.py): the code that loads, trains, evaluates and answers, and the bytes alive at each one's worst moment."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from common.device import Precision
from data.loader import Loader
from data.packing import Batch, pack
from data.render import Document
from generation.generate import generate
from model.loss import vocab_chunk_size
from model.tokenizer import Tokenizer
from training import evaluation, loop, setup
from training.config import Config, Train
from training.dataset import TrainingData
from training.ledger import LOGITS, WORKING, Ledger
from training.optim import make_optimizers

BASE, TRAINED, GRADIENTS, OPTIMIZER = "base weights", "trained weights", "gradients", "optimiser state"
PARTS = (BASE, TRAINED, OPTIMIZER, GRADIENTS, WORKING, LOGITS)
STORED = torch.bfloat16  # what Gemma's files hold
GENERATED_TOGETHER = 64  # rows: generation.generate's batch


@dataclass
class Forecast:
    """Bytes of each part when most is taken, and the phase of the run in which that is."""

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Rehearsal:
    """A run without numbers: the model with its adapters and optimisers as outlines, and what each phase of the run takes."""

    def __init__(self, cfg: Config, base: setup.Base, data: TrainingData, precision: Precision):
        """base.model has its parameters on the meta device; they become outlines here, and get the run's adapters."""
        self.cfg, self.base, self.data, self.precision, self.model = cfg, base, data, precision, base.model
        self.objective = setup.OBJECTIVES[cfg.train.objective]
        self.ledger = Ledger(precision.device, self.model.config.vocab_size)
        with self.ledger:
            self._load()
            frozen = list(self.model.parameters())
            setup.add_adapters(self.model, cfg)
            self.loading = Forecast({BASE: self.ledger.highest}, "loading")
            self.trained = [p for p in self.model.parameters() if p.requires_grad]
            self.ledger.assign(frozen, BASE)
            self.ledger.assign(self.trained, TRAINED)
            self.optimizers = make_optimizers(
                self.model, cfg.train.optimizer, cfg.train.learning_rate, cfg.train.weight_decay
            )
            self._first_optimizer_step()

    def _load(self) -> None:
        """model.weights.load_model: tensor by tensor, each beside its place in the file."""
        dtype = self.precision.base_dtype(self.cfg.model.dtype, trains_all=self.cfg.adapter.type == "full")
        for name, p in list(self.model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            weight = torch.empty(p.shape, dtype=STORED, device=self.precision.device).to(dtype, copy=True)
            setattr(self.model.get_submodule(module), leaf, nn.Parameter(weight))

    def _first_optimizer_step(self) -> None:
        """Makes the optimisers' state, and has every gradient from now on entered as one."""
        for p in self.trained:
            p.register_post_accumulate_grad_hook(lambda p: self.ledger.assign([p.grad], GRADIENTS))
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:
            optimizer.step()
            self.ledger.assign(
                (
                    t
                    for state in optimizer.state.values()
                    for t in state.values()
                    if isinstance(t, torch.Tensor)
                ),
                OPTIMIZER,
            )
        self.model.zero_grad(set_to_none=True)

    def steps(self, train: Train) -> Forecast:
        """The heaviest steps of the run, with `train` in the place of the config's [train]."""
        cfg = replace(self.cfg, train=train)
        loader = setup.build_loader(cfg, self.data.documents)
        _, heaviest = steps_of(loader, setup.build_plan(cfg, loader))
        return max(
            (self.step([loader.batch(group) for group in step]) for step in heaviest), key=lambda f: f.total
        )

    def step(self, window: list[Batch]) -> Forecast:
        """One optimiser step."""
        self._expect_logits(window)
        with self.ledger:
            loop.train_step(
                self.model,
                self.objective,
                window,
                self.trained,
                self.optimizers,
                self.precision,
                0.0,
                self.cfg.train.max_grad_norm,
            )
            self.model.zero_grad(set_to_none=True)
        return Forecast(self.ledger.peak, "training")

    def _expect_logits(self, window: list[Batch]) -> None:
        """Starts a phase whose losses are over these batches."""
        words, rows = self.model.config.vocab_size, [len(batch.target_positions) for batch in window]
        chunks = [(n, vocab_chunk_size(n, self.precision.device.type)) for n in rows]
        self.ledger.logits = {(n, size) for n, chunk in chunks for size in (chunk, words % chunk)}
        self.ledger.start()

    def evaluations(self) -> list[Forecast]:
        """Mean loss and answers of the validation set with the longest rows."""
        found = []
        for group in longest_groups(self.data):
            self._expect_logits([pack(group, share=True)])
            with self.ledger:
                evaluation.mean_loss(self.model, self.objective, group, self.precision)
            found.append(Forecast(self.ledger.peak, "evaluation"))
        return found + [
            self._answers(prompts) for prompts in longest_prompts(self.cfg, self.base.tokenizer, self.data)
        ]

    def _answers(self, prompts: list[list[int]]) -> Forecast:
        """The longest prompts are read and get two tokens; the cache has room for all that they may get."""
        settings, ledger = self.cfg.generate, self.ledger
        ledger.start()
        ledger.answer = 0

        def stop(row, token):
            ledger.answer = 1

        with ledger, self.precision.autocast():
            generate(
                self.model,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                stop_ids={1},
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                on_token=stop,
            )
        ledger.answer = 0
        forecast = Forecast(ledger.peak, "answers")
        forecast.parts.pop(OPTIMIZER, None)  # training is over by then
        return forecast


def longest_groups(data: TrainingData) -> list[list[Document]]:
    """Of each validation set the documents that are evaluated in one go and have the most tokens."""
    return [
        max(evaluation.groups(v.documents), key=lambda g: sum(len(d.input_ids) for d in g))
        for v in data.validation
    ]


def longest_prompts(cfg: Config, tokenizer: Tokenizer, data: TrainingData) -> list[list[list[int]]]:
    """Of each validation set, and of the config's own prompts, the longest that are answered together."""
    sets = [[e[0] for e in map(evaluation.last_exchange, v.samples) if e] for v in data.validation]
    sets.append([(("user", prompt),) for prompt in cfg.generate.prompts])
    rendered = [[tokenizer.render_prompt(messages) for messages in one] for one in sets]
    return [sorted(prompts, key=len)[-GENERATED_TOGETHER:] for prompts in rendered if prompts]


def steps_of(loader: Loader, plan: loop.Plan) -> tuple[list[tuple], set[tuple]]:
    """(all steps of a run in their order, those of them that may take most): the most tokens, and the longest documents.

    A step is one of its micro-batches behind the one before, whose gradients it finds, as the indices of their documents; equal steps are named once.
    """
    steps, left, epoch = {}, plan.total_steps, 0
    while left > 0:
        groups = [tuple(group) for group in loader.plan(epoch)]
        starts = range(0, len(groups), plan.accumulate)[:left]
        steps |= dict.fromkeys(
            tuple(groups[max(start, i - 1) : i + 1])
            for start in starts
            for i in range(start, min(start + plan.accumulate, len(groups)))
        )
        left, epoch = left - len(starts), epoch + 1
    lengths = [len(d.input_ids) for d in loader.documents]
    by_tokens = sorted(steps, key=lambda step: (sum(lengths[i] for i in step[-1]), len(step)))
    return list(steps), {*by_tokens[-2:], max(steps, key=lambda step: sum(lengths[i] ** 2 for i in step[-1]))}


def largest(rehearsal: Rehearsal, room: int) -> Train | None:
    """The run's [train] with the largest batch_size (or max_tokens, where that cuts the batches) whose steps take at most `room` bytes; None: none does."""
    train, longest = rehearsal.cfg.train, max(len(d.input_ids) for d in rehearsal.data.documents)
    name, low, high = (
        ("max_tokens", longest, train.max_tokens) if train.max_tokens else ("batch_size", 1, train.batch_size)
    )

    def fits(size: int) -> bool:
        return rehearsal.steps(replace(train, **{name: size})).total <= room

    good, bad = (
        low - 1,
        low,
    )  # the largest that is known to fit, and the next to try: upwards, for a small batch is soon rehearsed
    while bad <= high and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, high + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return replace(train, **{name: good}) if good >= low else None
