"""GRPO, group relative policy optimization (Shao et al. 2024, arXiv 2402.03300): learning from scores.

A sample is a prompt. The model samples a group of G completions of it, the rewards score each (rewards.py),
and those that beat the mean of their group become likelier:

    A_i = (reward_i - mean of the group) / (standard deviation of the group + 1e-4)     advantage
    ratio_t = p(token_t) / p_old(token_t)         p_old: the model that sampled the completion
    loss_t = -min(ratio_t A, clip(ratio_t, 1 - epsilon, 1 + epsilon) A) + beta k3_t
    k3_t = exp(d) - d - 1, d = log p_reference(token_t) - log p(token_t)     estimates KL(p || p_reference)

The losses of all tokens become one by grpo.loss_type; |o| is a completion's tokens:

    dapo       the sum over all tokens of the step / their number (Yu et al. 2025, arXiv 2503.14476)
    dr_grpo    the sum / (completions * max_completion_length) (Liu et al. 2025, arXiv 2503.20783)
    grpo       the mean over completions of the sum of a completion / |o|

n completions are in a micro-batch of prompts; S is the number of their tokens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from common.errors import listed
from data.packing import Batch, pack
from data.render import IGNORE_INDEX, Counts, Document, render_all
from data.rows import Sample
from generation.generate import Completion, generate
from generation.load import LoadedModel
from lora.inject import adapter_state, with_adapter_state
from model.gemma3 import Gemma3ForCausalLM
from model.tokenizer import Tokenizer
from tasks.measures import Answers
from training.config import GRPO
from training.objectives.objective import Metrics, Objective, target_log_probs
from training.objectives.rewards import Rewards, default_rewards
from training.objectives.sft import SupervisedFineTuning

SMALL = 1e-4  # keeps a group of nearly equal rewards from getting large advantages


@dataclass
class CompletionBatch(Batch):
    """A packed stream of completions after their prompts; the S targets are the completions' tokens."""

    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # of each document
    sampled: list[float] = field(default_factory=list)  # S log-probabilities, as the sampler computed them
    weight: float = 1.0  # what divides the sum of the losses
    figures: Metrics = field(default_factory=dict)  # of all completions
    reference: torch.Tensor | None = None  # S log-probabilities of the reference; None if beta is 0
    old: torch.Tensor | None = None  # S log-probabilities of the model that sampled, set by the first loss


class GroupRelativePolicyOptimization(Objective):
    """L = the losses of the completions' tokens, reduced by loss_type (see above).

    Args:
        settings: the config's section [grpo].
        rewards: the reward functions; None for those of the task.
        task: data.task.
        seed: with the step, the row and the number in the group it determines a completion.
    """

    scores_answers = True
    higher_is_better: ClassVar = {"loss": False, "reward": True}

    def __init__(
        self, settings: GRPO, rewards: Rewards | None = None, task: str = "auto", seed: int = 0
    ) -> None:
        super().__init__(settings.metric_for_best_model)
        self.settings, self.given, self.task, self.seed = settings, rewards, task, seed
        self.steps_per_batch = settings.num_iterations
        self.sft, self.files = SupervisedFineTuning(), rewards.files if rewards else ()
        readers = rewards.gold_readers if rewards else ["the task's own"]
        self.needs_response = f"grpo.rewards ({', '.join(readers)})" if readers else ""

    def documents(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, max_length: int, on_long: str, vocab_size: int
    ) -> tuple[list[Document], Counts]:
        """Returns prompt and gold response of each sample as a document; training takes only its prompt.

        Raises ValueError for samples of raw text.
        """
        if texts := [sample.id for sample in samples if sample.messages is None]:
            remedy = 'Name prompts in data.train and data.validation, such as {"prompt", "response"}'
            raise ValueError(listed("raw text has no prompt that a model could answer:", texts, remedy))
        return render_all(samples, tokenizer, "response", max_length, on_long, vocab_size)

    def begin(
        self, base: LoadedModel, samples: Sequence[Sample], documents: Iterable[Document], start: str
    ) -> None:
        """Keeps the prompts and gold responses and, if beta is not 0, a copy of the adapters as reference.

        Raises ValueError if no reward is named and the task has none.
        """
        self.rewards = self.given or default_rewards(self.task, samples, self.settings.reward_timeout)
        self.base, self.samples = base, {sample.id: sample for sample in samples}
        self.start = (
            {n: x.clone() for n, x in adapter_state(base.model).items()} if self.settings.beta else {}
        )

    def prepare(self, model: Gemma3ForCausalLM, batch: Batch, step: int) -> Batch:
        """Samples and scores a group of completions for each prompt, and returns their packed stream."""
        s, tokenizer = self.settings, self.base.tokenizer
        ids = [id for id in batch.ids for _ in range(s.num_generations)]
        numbers = [completion_number(step, id, i % s.num_generations) for i, id in enumerate(ids)]
        messages = [self.samples[id].messages or () for id in ids]
        prompts = [tokenizer.render_prompt(turns[:-1]) for turns in messages]
        with self.base.precision.autocast():
            completions = generate(
                model,
                prompts,
                max_new_tokens=s.max_completion_length,
                stop_ids=tokenizer.stop_ids,
                temperature=s.temperature,
                seed=self.seed,
                numbers=numbers,
                log_probs=True,
            )
        users, golds = [turns[-2][1] for turns in messages], [turns[-1][1].strip() for turns in messages]
        texts = [tokenizer.decode(completion.token_ids) for completion in completions]
        ended = [completion.stop_reason == "stop" for completion in completions]
        rewards, parts = self.rewards(users, texts, golds, ended)
        found = self._batch(prompts, completions, torch.tensor(rewards), parts, ids)
        if s.beta:
            with torch.no_grad(), self.base.precision.autocast(), with_adapter_state(model, self.start):
                moved = found.to(self.base.precision.device)
                found.reference = target_log_probs(model, moved, s.temperature)[0]
        return found

    def _batch(
        self,
        prompts: list[list[int]],
        completions: list[Completion],
        rewards: torch.Tensor,
        parts: dict[str, list[float]],
        ids: list[str],
    ) -> CompletionBatch:
        """Returns the packed stream of the completions that have an effect on the gradient.

        Without k3, those of advantage 0 have none. They are left out, but their tokens count.
        """
        s, groups = self.settings, rewards.view(-1, self.settings.num_generations)
        truncated = torch.tensor([completion.stop_reason == "length" for completion in completions])
        lengths = torch.tensor([len(completion.log_probs) for completion in completions])
        counted = ~truncated if s.mask_truncated_completions else torch.ones_like(truncated)
        advantages = group_advantages(groups, s.scale_rewards).flatten() * counted
        effective = counted if s.beta else advantages != 0
        kept = effective.nonzero().flatten().tolist() or [int(lengths.argmin())]  # a stream needs one
        packed = pack([completed(prompts[i], completions[i], str(i)) for i in kept], share_prefix=True)
        packed_order = [int(i) for i in packed.ids]
        tokens = int(lengths[counted].sum())
        return CompletionBatch(
            **(vars(packed) | {"ids": [ids[i] for i in packed_order]}),
            advantages=advantages[packed_order],
            sampled=[value for i in packed_order for value in completions[i].log_probs],
            weight=max(1, tokens if s.loss_type == "dapo" else len(completions)),
            figures=figures(groups, parts, lengths, truncated),
        )

    def largest_batch(self, batch: Batch) -> Batch:
        """Returns completions of the greatest length for prompts as long as the documents, none left out."""
        group, length = self.settings.num_generations, self.settings.max_completion_length
        completion = Completion([0] * (length - 1), "stop", 0, [0.0] * length)
        sizes = (batch.position_ids[batch.cu_seqlens[1:].long() - 1] + 1).tolist()  # with a shared prefix
        prefixes = batch.shared_prefix or []
        prompts = [[i] * n for i, n in enumerate(sizes) if i not in prefixes for _ in range(group)]
        rewards = torch.tensor([1.0] + [0.0] * (group - 1)).repeat(len(prompts) // group)  # none is the mean
        return self._batch(prompts, [completion] * len(prompts), rewards, {}, ["largest"] * len(prompts))

    def loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns (the sum of the losses, its weight by loss_type, the metrics of TRL's GRPOTrainer).

        reward, reward_std, rewards/<name>/mean    of the completions, and of each group
        frac_reward_zero_std                       share of groups without a difference, which teach nothing
        completions/mean_length                    in tokens, with the end of the turn
        completions/clipped_ratio                  share that reached max_completion_length
        clip_ratio/region_mean, kl                 share of tokens whose ratio was clipped; mean of k3
        sampling/sampling_logp_difference/max      largest |log p_sampler - log p| of a token
        """
        assert isinstance(batch, CompletionBatch)
        s = self.settings
        log_probs, _ = target_log_probs(model, batch, s.temperature)
        metrics = dict(batch.figures)
        if batch.old is None:
            batch.old = log_probs.detach()
            apart = (batch.old - torch.tensor(batch.sampled).to(batch.old)).abs()
            metrics["sampling/sampling_logp_difference/mean"] = apart.sum(), len(apart)
            metrics["sampling/sampling_logp_difference/max"] = apart.max(), 1
        advantages = batch.repeat(batch.advantages.to(log_probs))
        losses, clipped = clipped_loss(log_probs, batch.old, advantages, s.epsilon)
        metrics["clip_ratio/region_mean"] = clipped.sum(), len(clipped)
        if batch.reference is not None:
            kl = k3(log_probs, batch.reference)
            losses = losses + s.beta * kl
            metrics["kl"] = kl.detach().sum(), len(kl)
        return self._reduced(losses, batch), batch.weight, metrics

    def _reduced(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.settings.loss_type == "dapo":
            return losses.sum()
        if self.settings.loss_type == "dr_grpo":
            return losses.sum() / self.settings.max_completion_length
        return (batch.sums(losses) / torch.tensor(batch.target_counts, device=losses.device)).sum()

    def evaluation_loss(self, model: Gemma3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float, Metrics]:
        """Returns the loss of supervised fine-tuning on the gold responses, and its metrics."""
        return self.sft.loss(model, batch)

    def score(self, answers: Answers) -> dict[str, float]:
        """Returns {"reward": the mean reward of the answers, "rewards/<name>": that of each function}."""
        if not answers.texts:
            return {}
        rewards, parts = self.rewards(answers.prompts, answers.texts, answers.golds, answers.ended)
        named = {f"rewards/{name}": values for name, values in parts.items()}
        return {name: sum(v) / len(v) for name, v in ({"reward": rewards} | named).items()}


def group_advantages(rewards: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """Returns A (groups, G) for rewards (groups, G); without `scale`, it is not divided (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    # In a group of equal rewards, rounding of the mean leaves a remainder.
    centred = centred.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)
    return centred / (rewards.std(1, keepdim=True) + SMALL) if scale else centred


def clipped_loss(
    log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (-min(ratio A, clip(ratio) A), whether the clip took its gradient), both (S,)."""
    ratio = (log_probs - old).exp()
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    clamped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clamped * advantages), clipped


def k3(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Returns exp(d) - d - 1 with d = reference - log_probs; it is at least 0.

    Its mean over tokens drawn from p is KL(p || reference) (Schulman 2020, joschu.net/blog/kl-approx.html).
    """
    d = reference - log_probs
    return d.exp() - d - 1


def completion_number(step: int, id: str, index: int) -> int:
    """Returns the number that selects a completion's random numbers: a hash, so a resume draws the same."""
    return int.from_bytes(hashlib.sha256(f"{step} {index} {id}".encode()).digest()[:7], "little")


def completed(prompt: list[int], completion: Completion, id: str) -> Document:
    """Returns the prompt with its completion as a document; a stop token is a target like all others."""
    tokens = completion.token_ids + ([] if completion.stop_id is None else [completion.stop_id])
    labels = [IGNORE_INDEX] * (len(prompt) - 1) + tokens
    return Document([*prompt, *tokens[:-1]], labels, id)


def figures(
    rewards: torch.Tensor, parts: dict[str, list[float]], lengths: torch.Tensor, truncated: torch.Tensor
) -> Metrics:
    """Returns the metrics of all completions, those without an effect included; rewards (groups, G)."""
    groups, count = len(rewards), rewards.numel()
    equal = (rewards == rewards[:, :1]).all(1)
    found: Metrics = {
        "reward": (rewards.sum().item(), count),
        "reward_std": (rewards.std(1).sum().item(), groups),
        "frac_reward_zero_std": (equal.sum().item(), groups),
        "completions/mean_length": (lengths.sum().item(), count),
        "completions/clipped_ratio": (truncated.sum().item(), count),
    }
    return found | {f"rewards/{name}/mean": (sum(values), count) for name, values in parts.items()}
