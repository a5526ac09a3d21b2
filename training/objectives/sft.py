"""Supervised fine-tuning: cross-entropy at the supervised positions of packed documents.

A sample is a conversation or a raw text. S is the number of supervised positions of a micro-batch.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from common.errors import listed
from data.packing import Batch
from data.render import Counts, Document, render_all
from data.rows import Sample
from model.gemma3 import Gemma3ForCausalLM
from model.tokenizer import Tokenizer
from training.objectives.objective import Metrics, Objective, target_log_probs


class SupervisedFineTuning(Objective):
    """L = the mean over supervised tokens of -log p(token | earlier tokens of its document), in nats."""

    higher_is_better: ClassVar = {"loss": False, "token_accuracy": True}

    def __init__(self, metric_for_best_model: str = "loss", loss_on: str = "response") -> None:
        super().__init__(metric_for_best_model)
        self.loss_on = loss_on

    def documents(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, max_length: int, on_long: str, vocab_size: int
    ) -> tuple[list[Document], Counts]:
        """Returns the token ids and labels of each sample, and counts of samples kept and left out.

        Raises ValueError for samples with a chosen and a rejected answer.
        """
        if pairs := [sample.id for sample in samples if sample.rejected is not None]:
            remedy = 'Set train.objective = "dpo", or rename "chosen" to "response" and remove "rejected"'
            raise ValueError(listed("rows with a chosen and a rejected answer are for DPO:", pairs, remedy))
        return render_all(samples, tokenizer, self.loss_on, max_length, on_long, vocab_size)

    def loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns (the sum of the losses, S, {"token_accuracy"}).

        The token accuracy is the share of supervised tokens that have the largest logit at their position.
        """
        log_probs, correct = target_log_probs(model, batch)
        count = batch.num_targets
        return -log_probs.sum(), count, {"token_accuracy": (correct.sum(), count)}
