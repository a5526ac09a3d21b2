"""DPO, direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): learning from pairs.

A sample is a prompt with a chosen and a rejected answer, and gives two documents, the chosen one first. They
stand side by side in a micro-batch, and their prompt is computed once (data/packing.py). P pairs.

log p(answer) is the sum over its tokens, with the end of the turn. The reference is the model at the start of
the run. Its log-probabilities do not change, so they are computed once, before the first step, and kept in
the user's cache under the hash of all they depend on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import listed
from common.files import replacing
from common.progress import bar
from data.packing import Batch, grouped, pack
from data.render import IGNORE_INDEX, Counts, Document, render_all
from data.rows import Sample
from generation.load import LoadedModel
from model.gemma3 import Gemma3ForCausalLM
from model.package import cache
from model.tokenizer import Tokenizer
from training.objectives.objective import Metrics, Objective, target_log_probs

# Nats, by precision: where only rounding differs, the margin of a pair differs by less. Rounding depends on
# the stream that a document stands in, and the reference was computed in another one.
TIE = {"fp32": 1e-3, "fp16": 0.125, "bf16": 1.0}
KEPT = 16  # files of log-probabilities: those of the last runs, which may be resumed or repeated
REFERENCE_TOKENS = 4096  # of a forward pass of the reference, or one longer pair


class DirectPreferenceOptimization(Objective):
    """L = the mean over pairs of -log sigmoid(r_chosen - r_rejected), with the rewards r of both answers.

    r = beta (log p(answer) - log p_reference(answer)). At the start of a run L = log 2, up to rounding.
    """

    per_sample = 2
    higher_is_better: ClassVar = {"loss": False, "rewards/accuracies": True, "rewards/margins": True}

    def __init__(self, beta: float = 0.1, metric_for_best_model: str = "loss") -> None:
        super().__init__(metric_for_best_model)
        self.beta = beta
        self.reference: dict[str, torch.Tensor] = {}  # id of a pair -> log p_reference of both answers (2,)
        self.tie = TIE["fp32"]

    def documents(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, max_length: int, on_long: str, vocab_size: int
    ) -> tuple[list[Document], Counts]:
        """Returns the chosen and the rejected document of each pair, labelled at the last answer only.

        A pair is left out if one of the two is, or would be cut: their remains may be the same.
        Raises ValueError for samples without a rejected answer.
        """
        if lacking := [sample.id for sample in samples if sample.rejected is None]:
            head = (
                'train.objective = "dpo" needs rows with "prompt", "chosen" and "rejected"; these have none:'
            )
            raise ValueError(listed(head, lacking, "Redaction rows: python -m tasks.redaction_pairs"))
        halves = [half for sample in samples for half in _halves(sample)]
        on_long = "drop" if on_long == "truncate" else on_long
        documents, counts = render_all(halves, tokenizer, "response", max_length, on_long, vocab_size)
        whole = Counter(document.id for document in documents)
        documents = [_last_answer(document) for document in documents if whole[document.id] == 2]
        kept = len(documents) // 2
        if samples and not kept:
            raise ValueError(
                f"none of the {len(samples)} pairs fits into data.max_length = {max_length}; raise it to "
                f"{counts.longest}"
            )
        return documents, replace(counts, kept=kept, dropped=len(samples) - kept, unsupervised=0)

    def begin(
        self, base: LoadedModel, samples: Sequence[Sample], documents: Iterable[Document], start: str
    ) -> None:
        """Computes the reference's log-probabilities of the documents, or reads those of an earlier run."""
        documents = list(documents)
        text = repr([(d.id, d.input_ids, d.labels) for d in documents])
        about = f"{start} {base.precision.name} {torch.__version__} {text}"
        name = hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()
        file = cache() / "references" / f"{name}.safetensors" if start else None
        values = _read(file) if file else None
        if values is None:
            values = reference_log_probs(base, documents)
            if file:
                _keep(file, values)
        self.reference = dict(zip([d.id for d in documents[::2]], values, strict=True))
        self.tie = TIE[base.precision.name]

    def largest_batch(self, batch: Batch) -> Batch:
        """Returns the same micro-batch; its pairs get a reference of zeros."""
        self.reference |= {id: torch.zeros(2) for id in batch.ids}
        return batch

    def loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns (the sum of the losses, P, the metrics of TRL's DPOTrainer).

        rewards/chosen, rewards/rejected    r of both answers
        rewards/margins                     r_chosen - r_rejected
        rewards/accuracies                  1 for a pair with a margin above 0 (by more than rounding)
        logps/chosen, logps/rejected        log p of both answers; a far fall of the chosen one's is a failure
        """
        log_probs = batch.sums(target_log_probs(model, batch)[0]).view(-1, 2)  # (P, 2): chosen, rejected
        reference = torch.stack([self.reference[id] for id in batch.ids[::2]]).to(log_probs)
        rewards = self.beta * (log_probs - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        figures = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": margins > self.tie * self.beta,
            "logps/chosen": log_probs[:, 0],
            "logps/rejected": log_probs[:, 1],
        }
        pairs = len(margins)
        return -F.logsigmoid(margins).sum(), pairs, {k: (v.detach().sum(), pairs) for k, v in figures.items()}


def reference_log_probs(base: LoadedModel, documents: Sequence[Document]) -> torch.Tensor:
    """Returns log p of both answers of each pair, (P, 2) on the CPU, by the model as it is now."""
    found: dict[str, torch.Tensor] = {}
    pairs, was_training = list(zip(documents[::2], documents[1::2], strict=True)), base.model.training
    base.model.eval()
    try:
        with bar(len(pairs), "reference", "pair") as progress, torch.no_grad():
            for group in grouped(pairs, lambda pair: sum(len(d.input_ids) for d in pair), REFERENCE_TOKENS):
                batch = pack([d for pair in group for d in pair], share_prefix=True).to(base.precision.device)
                with base.precision.autocast():
                    sums = batch.sums(target_log_probs(base.model, batch)[0]).view(-1, 2)
                found |= dict(zip(batch.ids[::2], sums.cpu(), strict=True))
                progress.update(len(group))
    finally:
        base.model.train(was_training)
    return torch.stack([found[chosen.id] for chosen, _ in pairs])


def _read(file: Path) -> torch.Tensor | None:
    """Returns the log-probabilities in a file, or None if it is missing or damaged."""
    with suppress(OSError, SafetensorError, KeyError):
        return load_file(file)["log_probs"]
    return None


def _keep(file: Path, values: torch.Tensor) -> None:
    with suppress(OSError, SafetensorError):  # A full disk, for example, does not stop the run.
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            save_file({"log_probs": values}, part)
        for old in sorted(file.parent.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)


def _halves(sample: Sample) -> tuple[Sample, Sample]:
    """Returns the prompt with the chosen answer, and the prompt with the rejected one."""
    prompt = (sample.messages or ())[:-1]
    rejected = (*prompt, ("assistant", sample.rejected or ""))
    return replace(sample, rejected=None), replace(sample, messages=rejected, rejected=None)


def _last_answer(document: Document) -> Document:
    """Returns the document without the labels of earlier answers, which are part of the prompt."""
    labels = document.labels
    end = next(i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORE_INDEX)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORE_INDEX), 0)
    return replace(document, labels=[IGNORE_INDEX] * start + labels[start:])
