"""What a training method is to the rest of the program: an Objective. The loop calls, the method computes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from data.packing import Batch
from data.render import Counts, Document
from data.rows import Sample
from generation.load import LoadedModel
from model.gemma3 import Gemma3ForCausalLM
from model.loss import token_log_probs
from model.tokenizer import Tokenizer
from tasks.measures import Answers

# {name: (sum, what divides it)}; a name that ends with "/max" has a tensor's largest value, (value, 1).
Metrics = dict[str, tuple[torch.Tensor | float, float]]


class Totals:
    """Adds up metrics over micro-batches; the tensors stay on their device until `means` is called."""

    def __init__(self) -> None:
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            before, weight_before = self.sums.get(name, (0.0, 0.0))
            if isinstance(value, torch.Tensor) and name.endswith("/max"):
                self.sums[name] = (torch.maximum(torch.as_tensor(before).to(value), value), 1)
            else:
                self.sums[name] = (value + before, weight + weight_before)

    def means(self) -> dict[str, Any]:
        """Returns {name: sum / weight}, after one wait for the device."""
        means = {name: value / weight for name, (value, weight) in self.sums.items()}
        tensors = {name: mean for name, mean in means.items() if isinstance(mean, torch.Tensor)}
        values = torch.stack(list(tensors.values())).tolist() if tensors else []
        return means | dict(zip(tensors, values, strict=True))


class Objective:
    """A training method; sft.py, dpo.py and grpo.py are the three.

    T, S and D are the tokens and supervised positions of a micro-batch, and the model's hidden size.
    """

    per_sample = 1  # documents that `documents` makes of a sample
    steps_per_batch = 1  # optimizer steps on the same micro-batches
    scores_answers = False  # whether `score` has a measure that selects the best weights
    higher_is_better: ClassVar[Mapping[str, bool]] = {"loss": False}
    needs_response = "train.objective"  # what needs the response of each row; "" if a prompt is enough
    files: Sequence[Path] = ()  # of the user, on which the results depend

    def __init__(self, metric_for_best_model: str):
        self.metric = metric_for_best_model

    def documents(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, max_length: int, on_long: str, vocab_size: int
    ) -> tuple[list[Document], Counts]:
        """Returns the documents of the samples, `per_sample` each, and counts of samples kept or left out."""
        raise NotImplementedError

    def begin(
        self, base: LoadedModel, samples: Sequence[Sample], documents: Iterable[Document], start: str
    ) -> None:
        """Is called once, when the model has its weights of the start of the run, also before a resume.

        Args:
            samples: the training samples.
            documents: those of training and validation that the run will use; found when they are asked for.
            start: a text that identifies the model's weights; if it is "", nothing is kept for a later run.
        """

    def prepare(self, model: Gemma3ForCausalLM, batch: Batch, step: int) -> Batch:
        """Returns the micro-batch to train on in the optimizer steps after `step`; by default this one."""
        return batch

    def largest_batch(self, batch: Batch) -> Batch:
        """Returns a micro-batch as large as `prepare` may return, without a model; for memory estimates."""
        return batch

    def loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns (sum of the losses, the weight that divides it, metrics).

        The loop divides the sum over the micro-batches of a step by the sum of their weights.
        """
        raise NotImplementedError

    def evaluation_loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns the same as `loss` for documents of a validation set; by default it is `loss`."""
        return self.loss(model, batch)

    def score(self, answers: Answers) -> dict[str, float]:
        """Returns further measures of generated answers to the prompts of a validation set."""
        return {}

    def better(self, new: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Returns whether metrics `new` are better than `best`; finite is better than NaN or infinite."""
        value, record = new[self.metric], best[self.metric]
        if not (math.isfinite(value) and math.isfinite(record)):
            return math.isfinite(value)
        return value > record if self.higher_is_better[self.metric] else value < record


def target_log_probs(
    model: Gemma3ForCausalLM, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log softmax(z / temperature)[target] (S,) in nats, and whether it has the largest logit.

    z (V,) are the logits at a supervised position.
    """
    hidden = model(
        batch.tokens,
        batch.position_ids,
        batch.cu_seqlens,
        shared_prefix=batch.shared_prefix,
        output_positions=batch.target_positions,
    )  # (S, D)
    softcap, compiled = model.config.final_logit_softcapping, model.compiled and model.training
    if temperature != 1:  # c tanh(W h / c) / t = c' tanh(W h' / c') with h' = h / t and c' = c / t
        hidden, softcap = hidden / temperature, None if softcap is None else softcap / temperature
    return token_log_probs(hidden, model.head_weight, batch.targets, softcap, compiled=compiled)
