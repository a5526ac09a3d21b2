"""Generation: prompts in, completions out; the prompts of a batch are read in packed streams, then all rows grow by one token a step.

B rows of a batch, V vocabulary, D hidden size.
"""

import math
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from model.cache import KVCache, Opening

PREFILL_TOKENS = 4096  # of prompts in one forward pass: beyond that a stream gains no speed and its activations leave the caches
OPENING_TOKENS = 16  # what all prompts of a batch begin with is read once, if it is as long as this


@dataclass
class Completion:
    """What was generated for one prompt; the stop id that ended it is in `stop_id` and not among `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    stop_reason: str = ""  # "stop": a stop id came; "length": the limit did
    stop_id: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits: temperature 0 takes the likeliest; else softmax(logits / temperature), cut to top_k and top_p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            found.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        return found

    def uniforms(self, row: int, count: int) -> torch.Tensor:
        """(count,) the random numbers of a prompt, one for each of its tokens; they hang on the seed and its number only, not on its batch."""
        return torch.rand(count, generator=torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63))


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, V) logits -> probabilities (B, n), not normalised again after the cuts, and the ids (B, n) that they belong to (None: all, in order).

    As in transformers: temperature, then the top_k likeliest, then of these the fewest that hold top_p of their mass (Holtzman et al. 2020).
    """
    logits, ids = logits.float() / sampling.temperature, None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs  # mass of the likelier ones
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    return probs, ids


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """The next ids (B,) from logits (B, V): the likeliest, or by inverse CDF the first whose cumulated probability exceeds `uniform` (B,) < 1."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, ids = distribution(logits, sampling)
    cdf = probs.cumsum(-1)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)  # right: never one of probability 0
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def generate(model, prompts: list[list[int]], *, max_new_tokens: int, stop_ids, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             seed: int = 0, first_number: int = 0, batch_size: int = 64, max_new_ratio: float | None = None,
             on_token: Callable[[int, int], None] | None = None, on_done: Callable[[int, Completion], None] | None = None) -> list[Completion]:
    """Completions of `prompts` (token ids), in their order; the same for a prompt whatever shares its batch, up to rounding.

    Args: max_new_tokens, and max_new_ratio times the prompt's own tokens, bound a completion; stop_ids end one; temperature, top_k, top_p, seed as in
    Sampling, and first_number the place of prompts[0] among those that share the seed; batch_size rows at once; on_token(row, id) hears every new token
    but stop ids; on_done(row, completion) hears of every prompt that is done.
    Raises ValueError that lists every bad argument and prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    _check(model.config, prompts, max_new_tokens, batch_size, max_new_ratio, sampling)
    limits = [_limit(len(p), max_new_tokens, max_new_ratio, model.config.max_position_embeddings) for p in prompts]
    completions = [Completion() for _ in prompts]
    rows = [Row(r, prompts[r], limits[r], completions[r]) for r in range(len(prompts))]
    with _inference(model):
        for i in range(0, len(rows), batch_size):
            _generate_batch(model, rows[i : i + batch_size], frozenset(stop_ids), sampling, first_number, on_token or _deaf, on_done or _deaf)
    return completions


def _deaf(*_) -> None:
    """A callback that nobody gave."""


def _limit(length: int, max_new_tokens: int, ratio: float | None, max_positions: int) -> int:
    """New tokens that a prompt of `length` may get; at least one."""
    limit = min(max_new_tokens, max_positions - length)
    return limit if ratio is None else max(1, min(limit, math.ceil(ratio * length)))


def _check(cfg, prompts, max_new_tokens: int, batch_size: int, ratio: float | None, sampling: Sampling) -> None:
    problems = sampling.problems()
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    problems += [f"{name} is {value}; it must be 1 or more" for name, value in counts.items() if value < 1]
    if ratio is not None and not ratio > 0:
        problems.append(f"max_new_ratio is {ratio}; it must be above 0, or None for no such limit")
    positions, words = cfg.max_position_embeddings, cfg.vocab_size
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < positions:
            problems.append(f"prompt {row} has {len(prompt)} tokens; it may have 1 to {positions - 1}, as one of {positions} is the answer's")
        elif not 0 <= min(prompt) <= max(prompt) < words:
            found = f"prompt {row} holds token ids {min(prompt)} to {max(prompt)}, but the vocabulary has 0 to {words - 1}"
            problems.append(f"{found}; is this the model's own tokenizer?")
    if problems:
        raise ValueError("cannot generate: " + "; ".join(problems))


@contextmanager
def _inference(model):
    """Eval mode, no gradients, no compilation; afterwards every module is back in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    # Compiled layers run eagerly here: every step has another shape, and each shape would be compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    model.eval()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        # Autocast keeps the bfloat16 copies that it made of trainable weights.  Before torch 2.11 (pytorch pull request 165068) copies made
        # under no_grad carry no gradient, a training step under the same autocast uses them again, and the adapters silently stop learning.
        torch.clear_autocast_cache()


@dataclass
class Row:
    """One prompt on its way through a batch."""

    number: int  # in the caller's list
    prompt: list[int]
    limit: int
    completion: Completion

    def take(self, token: int, stop_ids: frozenset[int], on_token) -> None:
        done = self.completion
        if token in stop_ids:
            done.stop_reason, done.stop_id = "stop", token
            return
        done.token_ids.append(token)
        on_token(self.number, token)
        if len(done.token_ids) >= self.limit:
            done.stop_reason = "length"

    @property
    def finished(self) -> bool:
        return self.completion.stop_reason != ""


def _generate_batch(model, rows: list[Row], stop_ids: frozenset[int], sampling: Sampling, first_number: int, on_token, on_done) -> None:
    """Fills the rows' completions: prefill, then a token for every row a step, until all are finished."""
    longest = max(row.limit for row in rows)
    cache, logits = _prefill(model, rows, longest)
    uniforms = torch.stack([sampling.uniforms(first_number + row.number, longest) for row in rows]) if sampling.temperature else None  # (B, steps)
    going = list(range(len(rows)))  # the unfinished among them
    for step in range(longest):
        tokens = choose(logits, sampling, None if uniforms is None else uniforms[:, step])  # (B,)
        before, going = going, []
        ids = tokens.tolist()  # the step's only wait for the device
        for i in before:
            rows[i].take(ids[i], stop_ids, on_token)
            if rows[i].finished:
                on_done(rows[i].number, rows[i].completion)
            else:
                going.append(i)
        if not going:
            return
        if len(going) <= 0.75 * len(rows):  # finished rows cost a step their share; dropping them costs a copy of the cache
            cache.keep(going)
            rows, tokens = [rows[i] for i in going], tokens[going]
            uniforms = None if uniforms is None else uniforms[going]
            going = list(range(len(rows)))
        position_ids = cache.advance()
        logits = model.logits(model(tokens, position_ids, None, attend=cache))  # (B, V)


def _prefill(model, rows: list[Row], max_new_tokens: int) -> tuple[KVCache, torch.Tensor]:
    """A cache that holds the rows' prompts and the logits (B, V) after each; equal prompts (GRPO's groups) are read once and copied."""
    device = next(model.parameters()).device
    found: dict[tuple, int] = {}
    source = [found.setdefault(tuple(row.prompt), len(found)) for row in rows]
    prompts = list(found)
    cache = KVCache(model.config, [len(p) for p in prompts], max_new_tokens, device)
    opening = _read_opening(model, prompts, device)
    shared = opening.length if opening else 0
    last = []
    for first, part in _streams(prompts):
        attend = cache.prefill(first, [len(p) for p in part], opening)
        tokens = torch.tensor([token for p in part for token in p[shared:]], device=device)
        hidden = model(tokens, attend.position_ids, attend.cu_seqlens, attend=attend)  # (T, D)
        last.append(hidden[attend.cu_seqlens[1:] - 1])  # the head runs at each prompt's last token only
    logits = model.logits(torch.cat(last))
    if len(prompts) < len(rows):
        cache.keep(source)
        logits = logits[source]
    return cache, logits


def _read_opening(model, prompts: list[tuple], device: torch.device) -> Opening | None:
    """The tokens that all prompts begin with, run through the model; None for one prompt, or where too few are shared to pay for the call."""
    low, high = min(prompts), max(prompts)  # in the order of a dictionary, so that what these two begin with all do
    most = min(map(len, prompts)) - 1  # every prompt keeps a token of its own, whose logits are wanted
    shared = next((i for i in range(most) if low[i] != high[i]), most)
    if len(prompts) == 1 or shared < OPENING_TOKENS:
        return None
    opening = Opening(model.config, shared, device)
    model(torch.tensor(prompts[0][:shared], device=device), opening.position_ids, opening.cu_seqlens, attend=opening)
    return opening


def _streams(prompts: list[tuple]) -> list[tuple[int, list[tuple]]]:
    """Cuts prompts into runs of at most PREFILL_TOKENS (or one prompt), each with the number of its first."""
    runs: list[tuple[int, list[tuple]]] = []
    room = 0
    for i, prompt in enumerate(prompts):
        room -= len(prompt)
        if room < 0:
            runs.append((i, []))
            room = PREFILL_TOKENS - len(prompt)
        runs[-1][1].append(prompt)
    return runs
