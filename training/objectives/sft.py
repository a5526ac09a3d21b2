"""Supervised fine-tuning: cross-entropy at the supervised positions of a packed stream.

An objective says what a step means; the loop only steps. Each is a class with the methods below, made from
its own section of the config. Metrics are sums over the same tokens as the loss, so that the loop and the
evaluation divide both by one weight.
"""

import math
from collections.abc import Mapping

import torch

from data.packing import Batch
from data.render import Counts, Document, render_all
from data.rows import Sample
from model.gemma3 import Gemma3ForCausalLM
from model.loss import token_log_probs

HIGHER_IS_BETTER = {"loss": False, "token_accuracy": True}


class SupervisedFineTuning:
    """L = sum over supervised tokens of -log p(token | the tokens before it), in nats."""

    def __init__(self, metric_for_best_model: str = "loss", loss_on: str = "response"):
        self.metric, self.loss_on = metric_for_best_model, loss_on

    def documents(self, samples: list[Sample], tokenizer, **limits) -> tuple[list[Document], Counts]:
        """Returns what the loader packs: one document a sample, within render_all's limits."""
        return render_all(samples, tokenizer, self.loss_on, **limits)

    def prepare(self, model: Gemma3ForCausalLM, batch: Batch) -> Batch:
        """Returns the batch with all that `loss` needs; it has everything already."""
        return batch

    def loss(
        self, model: Gemma3ForCausalLM, batch: Batch
    ) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """Returns the loss, the number of supervised tokens, and {metric: sum over these tokens}.

        "token_accuracy" counts the tokens that have the largest logit at their position.
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
        """Returns whether evaluation `new` is better than `best`; any finite value is better than a NaN."""
        value, record = new[self.metric], best[self.metric]
        if not (math.isfinite(value) and math.isfinite(record)):
            return math.isfinite(value)
        return value > record if HIGHER_IS_BETTER[self.metric] else value < record
