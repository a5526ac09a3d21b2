"""Supervised fine-tuning: cross-entropy at the supervised positions of a packed stream."""

from model.loss import token_log_probs


def prepare(model, batch):
    """Nothing to do: the batch holds all that a step needs."""
    return batch


def loss(model, batch):
    """sum over supervised positions of -log p(target), their number, and further metrics; batch is a data.packing.Batch on the model's device."""
    hidden = model(
        batch.tokens,
        batch.position_ids,
        batch.cu_seqlens,
        shared_prefix=batch.shared_prefix,
        output_positions=batch.target_positions,
    )  # (S, D)
    log_probs, correct = token_log_probs(
        hidden,
        model.head_weight,
        batch.targets,
        model.config.final_logit_softcapping,
        compiled=model.compiled and model.training,
    )
    return -log_probs.sum(), batch.num_targets, {"token_accuracy": correct.sum()}
