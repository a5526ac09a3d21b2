"""How good a model is: mean loss at the supervised tokens, and its answers against the gold ones."""

from dataclasses import dataclass

import torch

from common.progress import bar
from data.packing import pack
from generation.generate import generate
from tasks.measures import Row

LOSS_TOKENS = 8192  # tokens in one forward pass of an evaluation


@dataclass
class Answers:
    """What a model said: one text a row, beside the rows' prompts and gold responses."""

    prompts: list[str]
    golds: list[str]
    texts: list[str]


@torch.no_grad()
def mean_loss(model, objective, documents, precision) -> dict:
    """{"loss": mean of -log p over all supervised tokens (nats), "tokens": how many}; the model's training
    mode is put back.
    """
    was_training = model.training
    model.eval()
    total, sums, weight = 0.0, {}, 0
    try:
        for group in groups(documents):
            batch = pack(group, share_prefix=True).to(precision.device)
            with precision.autocast():
                loss, count, metrics = objective.loss(model, batch)
            total, weight = total + float(loss), weight + count
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
    finally:
        model.train(was_training)
    means = {name: value / max(1, weight) for name, value in {"loss": total, **sums}.items()}
    return means | {"tokens": weight}


def groups(documents, limit: int = LOSS_TOKENS):
    """The documents in groups of about `limit` tokens, in order: each is one forward pass."""
    group, size = [], 0
    for d in documents:
        if group and size + len(d.input_ids) > limit:
            yield group
            group, size = [], 0
        group.append(d)
        size += len(d.input_ids)
    if group:
        yield group


def last_exchange(sample) -> tuple[tuple, str] | None:
    """The messages that lead to the last response, and that response; None for raw text."""
    if sample.messages is None:
        return None
    return sample.messages[:-1], sample.messages[-1][1].strip()


def answer(
    model, tokenizer, samples, settings, precision, seed: int, what: str = "answers", quiet: bool = False
) -> Answers:
    """Generates the last response of each sample (raw text has none and is left out); `settings` are the
    config's [generate].
    """
    exchanges = [e for e in map(last_exchange, samples) if e]
    prompts = [tokenizer.render_prompt(messages) for messages, _ in exchanges]
    progress = bar(len(prompts), what, "answer", quiet)
    with precision.autocast():
        done = generate(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=seed,
            on_done=lambda *_: progress.update(),
        )
    progress.close()
    return Answers(
        [m[-1][1] for m, _ in exchanges],
        [gold for _, gold in exchanges],
        [tokenizer.decode(c.token_ids) for c in done],
    )


def measures(answers: Answers, task) -> dict:
    """Returns the task's measures of the completions (`task` is a module of tasks/); {} without rows."""
    rows = [Row(*row) for row in zip(answers.prompts, answers.golds, answers.texts, strict=True)]
    return task.score(rows) if rows else {}
