"""Supervised fine-tuning: cross-entropy at the supervised positions of packed documents.

T, S and D are the tokens and supervised positions of a micro-batch, and the model's hidden size. Losses and
metrics are sums over S positions. training/loop.py and training/evaluation.py divide them by the total S.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from data.packing import Batch
from data.render import Counts, Document, render_all
from data.rows import Sample
from model.gemma3 import Gemma3ForCausalLM
from model.loss import token_log_probs
from model.tokenizer import Tokenizer

HIGHER_IS_BETTER = {"loss": False, "token_accuracy": True}


class SupervisedFineTuning:
    """L = the sum over supervised tokens of -log p(token | earlier tokens of its document), in nats."""

    def __init__(self, metric_for_best_model: str = "loss", loss_on: str = "response") -> None:
        self.metric, self.loss_on = metric_for_best_model, loss_on

    def documents(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, max_length: int, on_long: str, vocab_size: int
    ) -> tuple[list[Document], Counts]:
        """Returns the token ids and labels of each sample, and counts of samples kept and left out."""
        return render_all(samples, tokenizer, self.loss_on, max_length, on_long, vocab_size)

    def prepare(self, model: Gemma3ForCausalLM, batch: Batch) -> Batch:
        """Returns the batch unchanged; objectives that compute more before the loss do it here."""
        return batch

    def loss(
        self, model: Gemma3ForCausalLM, batch: Batch
    ) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """Returns the loss L (summed), S, and {"token_accuracy": c}.

        c is the number of supervised tokens that have the largest logit at their position.
        """
        hidden = model(
            batch.tokens,
            batch.position_ids,
            batch.cu_seqlens,
            shared_prefix=batch.shared_prefix,
            output_positions=batch.target_positions,
        )  # (S, D)
        softcap, compiled = model.config.final_logit_softcapping, model.compiled and model.training
        log_probs, correct = token_log_probs(
            hidden, model.head_weight, batch.targets, softcap, compiled=compiled
        )
        return -log_probs.sum(), batch.num_targets, {"token_accuracy": correct.sum()}

    def better(self, new: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Returns whether metrics `new` are better than `best`; finite is better than NaN or infinite."""
        value, record = new[self.metric], best[self.metric]
        if not (math.isfinite(value) and math.isfinite(record)):
            return math.isfinite(value)
        return value > record if HIGHER_IS_BETTER[self.metric] else value < record
