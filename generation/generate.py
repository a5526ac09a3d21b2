"""Generation: prompts in, completions out; prompts are read in packed streams, then all rows grow by one
token a step, and where a row ends the next prompt takes its place.

B rows that grow together, V vocabulary, D hidden size.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from generation.cache import KVCache, SharedPrefix
from generation.sampling import Sampling, greedy, sample

# Of prompts in one forward pass: beyond that a stream gains no speed and its activations leave the caches.
PREFILL_TOKENS = 4096
MIN_PREFIX_TOKENS = 16  # what all prompts begin with is read once, if it is as long as this
REFILL = (
    1 / 16
    # Of the rows have to be free before prompts take their places: each forward pass over prompts has a fixed
    # cost.
)
# Batches whose prompts are taken longest first: like lengths then grow together, and prompts are still done
# nearly in their order.
WINDOW = 4
SHRINK = (
    1 / 4
)  # of the rows have to be free, with no prompt left, before they are dropped: it costs a copy of the cache


@dataclass
class Completion:
    """What was generated for one prompt; the stop id that ended it is in `stop_id` and not among `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    stop_reason: str = ""  # "stop": a stop id came; "length": the limit did
    stop_id: int | None = None


def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 64,
    max_new_ratio: float | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Completions of `prompts` (token ids), in their order; the same for a prompt whatever shares its batch,
    up to rounding.

    Args: max_new_tokens, and max_new_ratio times the prompt's own tokens, bound a completion; stop_ids end
    one; temperature, top_k, top_p, seed as in Sampling, and numbers the places of prompts among those that
    share the seed, 0, 1, ... if not given; batch_size rows at once; on_token(row, id) hears every new token
    but stop ids; on_done(row, completion) hears of every prompt that is done. Raises ValueError that lists
    every bad argument and prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    found = problems(sampling, max_new_tokens, batch_size, max_new_ratio) + _prompt_problems(
        model.config, prompts
    )
    if found:
        raise ValueError("cannot generate: " + "; ".join(found))
    limits = [
        _limit(len(p), max_new_tokens, max_new_ratio, model.config.max_position_embeddings) for p in prompts
    ]
    completions = [Completion() for _ in prompts]
    places = numbers or range(len(prompts))
    rows = [
        Row(r, p, limit, sampling.uniforms(place, limit).tolist() if temperature else [], done)
        for r, (p, limit, done, place) in enumerate(zip(prompts, limits, completions, places, strict=True))
    ]
    window = WINDOW * batch_size
    rows = [
        row
        for i in range(0, len(rows), window)
        for row in sorted(rows[i : i + window], key=lambda row: (-len(row.prompt), row.prompt))
    ]
    with _inference(model):
        table = Table(
            model, rows, batch_size, frozenset(stop_ids), sampling, on_token or _deaf, on_done or _deaf
        )
        while table.fill():
            table.step()
    return completions


def _deaf(*_) -> None:
    """A callback that nobody gave."""


def _limit(length: int, max_new_tokens: int, ratio: float | None, max_positions: int) -> int:
    """New tokens that a prompt of `length` may get; at least one."""
    limit = min(max_new_tokens, max_positions - length)
    return limit if ratio is None else max(1, min(limit, math.ceil(ratio * length)))


def problems(
    sampling: Sampling, max_new_tokens: int, batch_size: int, max_new_ratio: float | None = None
) -> list[str]:
    """What is wrong with these arguments of `generate`, which needs no model to tell."""
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    found = sampling.problems() + [
        f"{name} is {value}; it must be 1 or more" for name, value in counts.items() if value < 1
    ]
    if max_new_ratio is not None and not max_new_ratio > 0:
        found.append(f"max_new_ratio is {max_new_ratio}; it must be above 0, or None for no such limit")
    return found


def _prompt_problems(cfg, prompts: list[list[int]]) -> list[str]:
    found, positions, words = [], cfg.max_position_embeddings, cfg.vocab_size
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < positions:
            found.append(
                f"prompt {row} has {len(prompt)} tokens; it may have 1 to {positions - 1}, as one of "
                f"{positions} is the answer's"
            )
        elif not 0 <= min(prompt) <= max(prompt) < words:
            held = f"prompt {row} holds token ids {min(prompt)} to {max(prompt)}, but the vocabulary has 0 to {words - 1}"
            found.append(f"{held}; is this the model's own tokenizer?")
    return found


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
        # Autocast keeps the bfloat16 copies that it made of trainable weights. Before torch 2.11 (pytorch
        # pull request 165068) copies made under no_grad carry no gradient, a training step under the same
        # autocast uses them again, and the adapters silently stop learning.
        torch.clear_autocast_cache()


@dataclass
class Row:
    """One prompt on its way."""

    number: int  # in the caller's list
    prompt: list[int]
    limit: int
    uniforms: list[float]  # a random number for each token, where tokens are sampled
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
    def uniform(self) -> float:
        return self.uniforms[len(self.completion.token_ids)]


class Table:
    """B places with a cache: `while table.fill(): table.step()` seats the rows that wait, and grows all that
    sit by a token.
    """

    def __init__(
        self,
        model,
        rows: list[Row],
        places: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        on_token,
        on_done,
    ):
        self.model, self.stop_ids, self.sampling, self.on_token, self.on_done = (
            model,
            stop_ids,
            sampling,
            on_token,
            on_done,
        )
        self.device = next(model.parameters()).device
        self.waiting = deque(rows)
        self.places: list[Row | None] = [None] * min(places, len(rows))
        self.tokens = torch.zeros(
            len(self.places), dtype=torch.long, device=self.device
        )  # (B,) what each row said last
        self.shared_prefix = _read_shared_prefix(
            model, [tuple(row.prompt) for row in rows], self.device
        )  # of all, so that it is read once
        self.cache = KVCache(
            model.config,
            len(self.places),
            max((len(row.prompt) + row.limit for row in rows), default=0),
            self.device,
        )

    def fill(self) -> bool:
        """Seats rows where enough places are free, or drops the places where nobody waits for them; False
        when all rows are done.
        """
        while self.waiting or any(self.places):
            free = [i for i, row in enumerate(self.places) if row is None]
            if self.waiting and len(free) >= REFILL * len(self.places):
                self._seat(free[: len(self.waiting)])  # of which some may end with their first token
            else:
                if not self.waiting and len(free) >= SHRINK * len(self.places):
                    self._keep([i for i, row in enumerate(self.places) if row is not None])
                return True
        return False

    def step(self) -> None:
        position_ids = self.cache.advance()
        with _products(len(self.places), self.device):
            hidden = self.model(self.tokens, position_ids, None, attend=self.cache)  # (B, D)
            self.tokens = self._take(hidden, range(len(self.places)))

    def _seat(self, free: list[int]) -> None:
        rows = [self.waiting.popleft() for _ in free]
        for i, row in zip(free, rows, strict=True):
            self.places[i] = row
        prompts = [tuple(row.prompt) for row in rows]
        shared_prefix = self.shared_prefix or _read_shared_prefix(self.model, prompts, self.device)
        self.tokens[free] = self._take(_prefill(self.model, self.cache, free, prompts, shared_prefix), free)

    def _keep(self, places: list[int]) -> None:
        self.cache.keep(places)
        self.tokens = self.tokens[places]
        self.places = [self.places[i] for i in places]

    def _take(self, hidden: torch.Tensor, places) -> torch.Tensor:
        """Gives each row in these places its next token, (n,) in all, from the last hidden states (n, D); a
        row that ends leaves its place.
        """
        rows = [self.places[i] for i in places]
        if (
            self.sampling.temperature == 0
            and self.device.type == "cpu"
            and self.model.config.final_logit_softcapping is None
        ):
            tokens = greedy(hidden, self.model.head_weight)
        else:
            uniform = (
                torch.tensor([row.uniform if row else 0.0 for row in rows])
                if self.sampling.temperature
                else None
            )
            tokens = sample(self.model.logits(hidden), self.sampling, uniform)
        for i, row, token in zip(
            places, rows, tokens.tolist(), strict=True
        ):  # tolist: the step's only wait for the device
            if row:
                row.take(token, self.stop_ids, self.on_token)
                if row.completion.stop_reason:
                    self.places[i] = None
                    self.on_done(row.number, row.completion)
        return tokens


def _products(rows: int, device: torch.device):
    """How a step multiplies: one row on a CPU without oneDNN, which lays bfloat16 weights out anew for each
    product, to use them once.
    """
    return (
        torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None)
        if rows == 1 and device.type == "cpu"
        else nullcontext()
    )


def _prefill(
    model, cache: KVCache, rows: list[int], prompts: list[tuple], shared_prefix: SharedPrefix | None
) -> torch.Tensor:
    """Reads prompts into rows of the cache; returns the hidden states (n, D) at their ends. Equal prompts
    (GRPO's groups) are read once and copied.
    """
    found: dict[tuple, int] = {}
    source = [found.setdefault(prompt, len(found)) for prompt in prompts]
    firsts = [rows[source.index(i)] for i in range(len(found))]
    shared, last = shared_prefix.length if shared_prefix else 0, []
    for first, part in _streams(list(found)):
        attend = cache.prefill(firsts[first : first + len(part)], [len(p) for p in part], shared_prefix)
        tokens = torch.tensor([token for p in part for token in p[shared:]], device=cache.device)
        hidden = model(tokens, attend.position_ids, attend.cu_seqlens, attend=attend)  # (T, D)
        last.append(hidden[attend.cu_seqlens[1:] - 1])  # the head runs at each prompt's last token only
    if len(found) < len(rows):
        cache.copy([firsts[i] for i in source], rows)
    return torch.cat(last)[source]


def _read_shared_prefix(model, prompts: list[tuple], device: torch.device) -> SharedPrefix | None:
    """The tokens that all prompts begin with, run through the model; None for one prompt, or where too few
    are shared to pay for the call.
    """
    if len(set(prompts)) < 2:
        return None
    low, high = (
        min(prompts),
        max(prompts),
    )  # in the order of a dictionary, so that what these two begin with all do
    most = min(map(len, prompts)) - 1  # every prompt keeps a token of its own, whose logits are wanted
    shared = next((i for i in range(most) if low[i] != high[i]), most)
    if shared < MIN_PREFIX_TOKENS:
        return None
    shared_prefix = SharedPrefix(model.config, shared, device)
    model(
        torch.tensor(prompts[0][:shared], device=device),
        shared_prefix.position_ids,
        shared_prefix.cu_seqlens,
        attend=shared_prefix,
    )
    return shared_prefix


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
