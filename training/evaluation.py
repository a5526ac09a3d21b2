"""Evaluates a model: the mean loss per supervised token, responses against gold responses, and labels."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import ModuleType

import torch

from common.device import Precision
from common.progress import bar
from data.packing import grouped, pack
from data.render import IGNORE_INDEX, Document
from data.rows import Messages, Sample
from generation.generate import generate
from generation.load import LoadedModel
from model.gemma3 import Gemma3ForCausalLM
from model.tokenizer import Tokenizer
from tasks import classification, text
from tasks.measures import Answers, Row
from training.config import Generate
from training.objectives.objective import Objective, Totals, target_log_probs

# A forward pass has at most this many tokens, or one longer document.
LOSS_TOKENS = 8192


@torch.no_grad()
def mean_loss(
    model: Gemma3ForCausalLM,
    objective: Objective,
    documents: Iterable[Document],
    precision: Precision,
) -> dict:
    """Returns {"loss", the objective's metrics, "tokens"} of the documents, without gradients and dropout.

    In supervised fine-tuning the loss is the mean of -log p over the supervised tokens, in nats, and
    "token_accuracy" the metric. "tokens" is the number of supervised tokens.
    """
    was_training = model.training
    model.eval()
    totals, tokens = Totals(), 0
    try:
        for group in groups(documents, objective.per_sample):
            batch = pack(group, share_prefix=True).to(precision.device)
            with precision.autocast():
                loss, weight, metrics = objective.evaluation_loss(model, batch)
            totals.add({"loss": (loss, weight)} | metrics)
            tokens += batch.num_targets
    finally:
        model.train(was_training)
    return ({"loss": 0.0} | totals.means()) | {"tokens": tokens}


def text_measures(found: dict, documents: Iterable[Document], tokenizer: Tokenizer) -> dict:
    """Returns perplexity and bits_per_byte (tasks/text.py) of what mean_loss found in the documents.

    The end of a turn or of a text counts as a token, and has no bytes.
    """
    supervised = ([i for i in document.labels if i != IGNORE_INDEX] for document in documents)
    text_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in supervised)
    return text.score_loss(found["loss"], found["tokens"], text_bytes)


def groups(documents: Iterable[Document], per_sample: int = 1) -> Iterator[list[Document]]:
    """Yields groups of documents, one a forward pass: up to LOSS_TOKENS tokens, or one longer sample.

    `per_sample` documents in a row are of one sample and stay together.
    """
    samples = zip(*[iter(documents)] * per_sample, strict=True)
    for group in grouped(samples, lambda sample: sum(len(d.input_ids) for d in sample), LOSS_TOKENS):
        yield list(chain.from_iterable(group))


def last_exchange(sample: Sample) -> tuple[Messages, str] | None:
    """Returns (the messages before the last one, the text of the last message), or None for raw text."""
    if sample.messages is None:
        return None
    return sample.messages[:-1], sample.messages[-1][1].strip()


def answer(
    loaded: LoadedModel,
    samples: Iterable[Sample],
    settings: Generate,
    seed: int,
    what: str = "answers",
    quiet: bool = False,
) -> Answers:
    """Generates the last message of each conversation from those before it; skips samples of raw text."""
    tokenizer, exchanges = loaded.tokenizer, [e for e in map(last_exchange, samples) if e]
    prompts = [tokenizer.render_prompt(messages) for messages, _ in exchanges]
    options = {name: value for name, value in vars(settings).items() if name != "prompts"}
    options |= {"stop_ids": tokenizer.stop_ids, "seed": seed}
    with bar(len(prompts), what, "answer", quiet) as progress, loaded.precision.autocast():
        done = generate(loaded.model, prompts, on_done=lambda *_: progress.update(), **options)
    ended = [completion.stop_reason == "stop" for completion in done]
    texts = [tokenizer.decode(completion.token_ids) for completion in done]
    return Answers([m[-1][1] for m, _ in exchanges], [gold for _, gold in exchanges], texts, ended)


def measures(answers: Answers, task: ModuleType, labels: Sequence[str] = ()) -> dict:
    """Returns {measure: value} of the generated responses, as the task defines it; {} without responses.

    `labels` are those of a classification: a response that is none of them is invalid.
    """
    rows = [Row(*row) for row in zip(answers.prompts, answers.golds, answers.texts, strict=True)]
    if not rows:
        return {}
    return classification.score(rows, labels) if task is classification else task.score(rows)


def label_measures(loaded: LoadedModel, samples: Sequence[Sample], labels: Sequence[str]) -> dict:
    """Returns label_accuracy and label_macro_f1 (tasks/classification.py); {} without labels to compare."""
    exchanges = [e for e in map(last_exchange, samples) if e]
    if not exchanges or not labels:
        return {}
    prompts = [loaded.tokenizer.render_prompt(messages) for messages, _ in exchanges]
    log_probs = label_log_probs(loaded, prompts, labels)
    return classification.score_labels([gold for _, gold in exchanges], labels, log_probs)


@torch.no_grad()
def label_log_probs(
    loaded: LoadedModel, prompts: Sequence[list[int]], labels: Sequence[str]
) -> list[list[float]]:
    """Returns log p(label and the end of the turn | prompt) in nats, for each prompt and each label.

    The labels of a prompt share its computation: a stream has the prompt once and then each label's tokens.
    """
    tokenizer, model, found = loaded.tokenizer, loaded.model, [list[float]() for _ in prompts]
    responses = [[*ids, tokenizer.end_of_turn_id] for ids in tokenizer.encode_batch(list(labels))]
    lengths = [len(ids) for ids in responses]

    def documents(number: int) -> list[Document]:
        prompt = prompts[number]
        unsupervised = [IGNORE_INDEX] * (len(prompt) - 1)
        return [Document(prompt + ids, [*unsupervised, *ids, IGNORE_INDEX], str(number)) for ids in responses]

    was_training = model.training
    model.eval()
    try:
        for rows in grouped(range(len(prompts)), lambda n: len(prompts[n]) + sum(lengths), LOSS_TOKENS):
            batch = pack([d for n in rows for d in documents(n)], share_prefix=True)
            batch = batch.to(loaded.precision.device)
            with loaded.precision.autocast():
                sums = batch.sums(target_log_probs(model, batch)[0]).tolist()
            for number, log_prob in zip(batch.ids, sums, strict=True):
                found[int(number)].append(log_prob)
    finally:
        model.train(was_training)
    return found
