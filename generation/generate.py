"""Text generation with continuous batching (Orca, Yu et al. 2022): when a completion ends, the next prompt
takes its slot in the batch.

Prompts first go through the model in packed streams (prefill). Then each step generates one token for every
slot. B slots, D hidden size.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.machine import free
from data.packing import MIN_PREFIX_TOKENS, common_prefix_length, grouped
from generation.cache import KVCache, SharedPrefix
from generation.sampling import Sampling, greedy, sample, token_log_probs
from lora.merge import merged
from model.config import Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.quantized import dequantized

# Prompt tokens in one forward pass. A longer stream is no faster, and its activations leave the CPU's caches.
PREFILL_TOKENS = 4096
# Prompts are admitted when this share of the slots is free, because each prefill has a fixed cost.
ADMIT_SHARE = 1 / 16
# Within this many batches the longest prompts go first, so that prompts of similar length decode together.
SORTED_BATCHES = 4
# When no prompt waits, free slots are removed once they are this share. Removing copies the cache.
SHRINK_SHARE = 1 / 4
# From so many prompts on, adapters are merged while the model generates; for fewer, merging takes too long.
MERGE_PROMPTS = 4


@dataclass
class Completion:
    """What was generated for one prompt."""

    token_ids: list[int] = field(default_factory=list)  # without the stop id
    stop_reason: str = ""  # "stop": by a stop id; "length": by the limit
    stop_id: int | None = None
    log_probs: list[float] = field(default_factory=list)  # of its tokens and the stop id, if asked for


@dataclass
class Request:
    """A prompt with its limit and its completion so far."""

    number: int  # in the caller's list
    prompt: tuple[int, ...]
    limit: int  # of new tokens
    uniforms: list[float]  # a random number for each new token; empty for greedy decoding
    completion: Completion = field(default_factory=Completion)

    @property
    def uniform(self) -> float:
        """Returns the random number for the next token."""
        return self.uniforms[len(self.completion.token_ids)]


def generate(
    model: Gemma3ForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 64,
    max_new_ratio: float = 0.0,
    log_probs: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Returns a completion per prompt (token ids); up to rounding, it does not depend on the other prompts.

    Args:
        max_new_tokens, max_new_ratio: limits of a completion, in tokens and as a multiple of its prompt.
        stop_ids: tokens that end a completion, such as <eos>.
        temperature, top_k, top_p, seed: see Sampling.
        numbers: seed and number of a prompt determine its random numbers; by default 0, 1, ...
        batch_size: number of slots.
        log_probs: whether completions get log softmax(logits / temperature) of their tokens, in nats.
        on_token: is called with the index of the prompt and each new token except stop ids.
        on_done: is called with the index of the prompt and its finished completion.

    Raises:
        ValueError: lists every bad argument and prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    found = problems(sampling, max_new_tokens, batch_size, max_new_ratio)
    if found := found + _prompt_problems(model.config, prompts):
        raise ValueError("cannot generate: " + "; ".join(found))
    requests = []
    for i, prompt in enumerate(prompts):
        limit = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
        if max_new_ratio:
            limit = max(1, min(limit, math.ceil(max_new_ratio * len(prompt))))
        uniforms = sampling.uniforms(numbers[i] if numbers else i, limit).tolist() if temperature else []
        requests.append(Request(i, tuple(prompt), limit, uniforms))
    room = free(next(model.parameters()).device) // 4
    for_merged = room if len(prompts) >= MERGE_PROMPTS else 0
    with _inference(model), merged(model, for_merged) as unused, dequantized(model, room, unused):
        BatchScheduler(model, requests, batch_size, stop_ids, sampling, on_token, on_done, log_probs).run()
    return [request.completion for request in requests]


def problems(
    sampling: Sampling, max_new_tokens: int, batch_size: int, max_new_ratio: float = 0.0
) -> list[str]:
    """Returns an error message for each bad argument of generate() that can be found without a model."""
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    found = sampling.problems()
    found += [f"{name} is {value}; it must be 1 or more" for name, value in counts.items() if value < 1]
    if not max_new_ratio >= 0:
        found.append(f"max_new_ratio is {max_new_ratio}; it must be above 0, or 0 for no such limit")
    return found


def _prompt_problems(cfg: Gemma3Config, prompts: Sequence[Sequence[int]]) -> list[str]:
    found, positions, vocab = [], cfg.max_position_embeddings, cfg.vocab_size
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < positions:
            found.append(
                f"prompt {i} has {len(prompt)} tokens; it may have 1 to {positions - 1}, because the "
                f"completion needs one of the model's {positions} positions"
            )
        elif not 0 <= min(prompt) <= max(prompt) < vocab:
            found.append(
                f"prompt {i} has token ids {min(prompt)} to {max(prompt)}, but the vocabulary has 0 to "
                f"{vocab - 1}; is this the model's own tokenizer?"
            )
    return found


@contextmanager
def _inference(model: Gemma3ForCausalLM) -> Iterator[None]:
    """Runs a block in eval mode without gradients and torch.compile; then restores each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    # Every step has another shape, and torch.compile would compile each of them.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    model.eval()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        # Autocast keeps the bfloat16 copies of trainable weights. Before torch 2.11 (pytorch pull request
        # 165068) copies made under no_grad carry no gradient. A training step under the same autocast would
        # use them again, and the adapters would silently stop learning.
        torch.clear_autocast_cache()


class BatchScheduler:
    """Generates completions in B slots, which share a KV cache; slot i uses row i of it."""

    def __init__(
        self,
        model: Gemma3ForCausalLM,
        requests: Sequence[Request],
        batch_size: int,
        stop_ids: Collection[int],
        sampling: Sampling,
        on_token: Callable[[int, int], None] | None,
        on_done: Callable[[int, Completion], None] | None,
        log_probs: bool = False,
    ):
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self.log_probs = log_probs
        self.on_token, self.on_done = on_token, on_done
        self.device = next(model.parameters()).device
        self.waiting = deque(_longest_first(requests, SORTED_BATCHES * batch_size))
        self.slots: list[Request | None] = [None] * min(batch_size, len(requests))
        self.tokens = torch.zeros(len(self.slots), dtype=torch.long, device=self.device)  # (B,) the last ones
        self.shared_prefix = _read_shared_prefix(model, [r.prompt for r in requests], self.device)
        room = max((len(r.prompt) + r.limit for r in requests), default=0)
        self.cache = KVCache(model.config, len(self.slots), room, self.device)

    def run(self) -> None:
        """Completes all requests."""
        while self.admit():
            self.step()

    def admit(self) -> bool:
        """Fills free slots from the queue, or removes some if it is empty; returns False when all is done."""
        while self.waiting or any(self.slots):
            free = [i for i, request in enumerate(self.slots) if request is None]
            if not self.waiting or len(free) < ADMIT_SHARE * len(self.slots):
                if not self.waiting and len(free) >= SHRINK_SHARE * len(self.slots):
                    self._keep([i for i, request in enumerate(self.slots) if request])
                return True
            self._prefill(free[: len(self.waiting)])  # Some requests may end with their first token.
        return False

    def step(self) -> None:
        """Gives every slot one more token."""
        position_ids = self.cache.advance()
        with _matmul_settings(len(self.slots), self.device):
            hidden = self.model(self.tokens, position_ids, None, attend=self.cache)  # (B, D)
            self.tokens = self._next_tokens(hidden, range(len(self.slots)))

    def _prefill(self, free: list[int]) -> None:
        requests = [self.waiting.popleft() for _ in free]
        for i, request in zip(free, requests, strict=True):
            self.slots[i] = request
        prompts = [request.prompt for request in requests]
        shared_prefix = self.shared_prefix or _read_shared_prefix(self.model, prompts, self.device)
        hidden = _read_prompts(self.model, self.cache, free, prompts, shared_prefix)
        self.tokens[free] = self._next_tokens(hidden, free)

    def _keep(self, slots: list[int]) -> None:
        self.cache.keep(slots)
        self.tokens = self.tokens[slots]
        self.slots = [self.slots[i] for i in slots]

    def _next_tokens(self, hidden: Tensor, slots: Sequence[int]) -> Tensor:
        """Chooses the next tokens (n,) of n slots from hidden states (n, D); adds them to the completions."""
        requests = [self.slots[i] for i in slots]
        log_probs: Sequence[float | None] = [None] * len(requests)
        plain_greedy = not self.sampling.temperature and self.model.config.final_logit_softcapping is None
        plain_greedy = plain_greedy and not self.log_probs
        if plain_greedy and self.device.type == "cpu":
            tokens = greedy(hidden, self.model.head_weight)
        else:
            uniform = None
            if self.sampling.temperature:
                uniform = torch.tensor([request.uniform if request else 0.0 for request in requests])
            logits = self.model.logits(hidden)
            tokens = sample(logits, self.sampling, uniform)
            if self.log_probs:
                log_probs = token_log_probs(logits, tokens, self.sampling).tolist()
        # tolist() is the only point of a step that waits for the device.
        for i, request, token, log_prob in zip(slots, requests, tokens.tolist(), log_probs, strict=True):
            if request and log_prob is not None:
                request.completion.log_probs.append(log_prob)
            if request and self._append(request, token):
                self.retire(i, request)
        return tokens

    def _append(self, request: Request, token: int) -> bool:
        """Adds a token to a completion and returns whether the completion is finished."""
        done = request.completion
        if token in self.stop_ids:
            done.stop_reason, done.stop_id = "stop", token
            return True
        done.token_ids.append(token)
        if self.on_token:
            self.on_token(request.number, token)
        if len(done.token_ids) >= request.limit:
            done.stop_reason = "length"
        return bool(done.stop_reason)

    def retire(self, slot: int, request: Request) -> None:
        """Frees the slot of a finished request."""
        self.slots[slot] = None
        if self.on_done:
            self.on_done(request.number, request.completion)


def _longest_first(requests: Sequence[Request], window: int) -> Iterator[Request]:
    """Sorts each `window` of consecutive requests, the longest prompts first and equal prompts together."""
    for i in range(0, len(requests), window):
        yield from sorted(requests[i : i + window], key=lambda r: (-len(r.prompt), r.prompt))


def _matmul_settings(rows: int, device: torch.device) -> AbstractContextManager:
    """Returns a context. For one row on a CPU it disables oneDNN, which would rearrange bfloat16 weights."""
    if rows == 1 and device.type == "cpu":
        return torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None)
    return nullcontext()


def _read_prompts(
    model: Gemma3ForCausalLM,
    cache: KVCache,
    rows: list[int],
    prompts: list[tuple[int, ...]],
    shared_prefix: SharedPrefix | None,
) -> Tensor:
    """Runs n prompts through the model and fills rows of the cache; returns last hidden states (n, D)."""
    # Equal prompts, as in a group of GRPO, are read once and copied.
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    source = [index[prompt] for prompt in prompts]
    first_rows = [rows[source.index(i)] for i in range(len(index))]
    shared, last = shared_prefix.length if shared_prefix else 0, []
    for stream in grouped(zip(first_rows, index, strict=True), lambda item: len(item[1]), PREFILL_TOKENS):
        attend = cache.prefill([row for row, _ in stream], [len(p) for _, p in stream], shared_prefix)
        tokens = torch.tensor([token for _, p in stream for token in p[shared:]], device=cache.device)
        hidden = model(tokens, attend.position_ids, attend.cu_seqlens, attend=attend)  # (T, D)
        last.append(hidden[attend.cu_seqlens[1:] - 1])
    if len(index) < len(rows):
        cache.copy([first_rows[i] for i in source], rows)
    return torch.cat(last)[source]


def _read_shared_prefix(
    model: Gemma3ForCausalLM, prompts: list[tuple[int, ...]], device: torch.device
) -> SharedPrefix | None:
    """Runs the tokens that all prompts begin with through the model; returns None if they are too few."""
    if len(set(prompts)) < 2:
        return None
    # Every prompt keeps a token of its own, whose logits are needed.
    length = common_prefix_length(prompts, min(map(len, prompts)) - 1)
    if length < MIN_PREFIX_TOKENS:
        return None
    prefix = SharedPrefix(model.config, length, device)
    tokens = torch.tensor(prompts[0][:length], device=device)
    model(tokens, prefix.position_ids, prefix.cu_seqlens, attend=prefix)
    return prefix
