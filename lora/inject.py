"""Adds adapters to a model's linear layers, lists them, turns them off, and removes them."""

import hashlib
import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from common.errors import listed
from lora.dora import DoRALinear
from lora.layer import LoRALinear

ALL_LINEAR = "all-linear"
# The head gets no adapter: the chunked loss reads the head's weight and does not call the module.
OUTPUT_HEAD = "lm_head"

# Larger values cannot be right, and would take all memory or overflow.
MOST = 2**16  # of r and of lora_alpha; training/config.py has the same, as it must not load torch
REGEX_SECONDS = 2.0  # A path takes a sensible expression microseconds, and some expressions years.

T = TypeVar("T")
Sizes = dict[str, tuple[int, float]]  # {path: (r, lora_alpha)}


def inject(
    model: nn.Module,
    *,
    type: str = "lora",
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: list[str] | str,
    seed: int,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> list[str]:
    """Freezes the model, adds an adapter to each targeted linear layer and returns the paths of these layers.

    The initial values of an adapter depend only on `seed` and the path of its layer.

    Args:
        target_modules: a list of paths or path ends, "all-linear", or a regular expression for whole paths.
        rank_pattern: {regular expression for the end of a path: r}; the first that matches replaces `r`.
        alpha_pattern: {regular expression for the end of a path: lora_alpha}, in the same way.

    Raises:
        ValueError: lists all wrong settings; the model is then as before.
    """
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    problems = bad_settings(type, r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern)
    names = []
    try:
        names = find_targets(model, target_modules)
        problems += [
            f"{field}: {key!r} fits none of the targeted modules, for example {names[0]}"
            for field, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern))
            for key in pattern
            if is_regex(key) and not any(matches_end(key, name) for name in names)
        ]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    ranks = {name: pattern_value(rank_pattern, name, r) for name in names}
    sizes = {name: (ranks[name], pattern_value(alpha_pattern, name, lora_alpha)) for name in names}
    wrap(model, sizes, type=type, lora_dropout=lora_dropout, use_rslora=use_rslora, seed=seed)
    return names


def bad_settings(
    type: str, r: int, lora_alpha: float, lora_dropout: float, rank_pattern: dict, alpha_pattern: dict
) -> list[str]:
    """Returns an error message for each invalid setting."""
    ranks = {"r": r} | {f"rank_pattern.{key}": v for key, v in rank_pattern.items()}
    alphas = {"lora_alpha": lora_alpha} | {f"alpha_pattern.{key}": v for key, v in alpha_pattern.items()}
    problems = [] if type in ("lora", "dora") else [f'type: {type!r} is neither "lora" nor "dora"']
    for field, v in ranks.items():
        if not isinstance(v, int) or not is_number(v) or v < 1:
            problems.append(f"{field}: {v!r} is not a whole number above 0")
        elif v > MOST:
            problems.append(f"{field}: {v!r} is above {MOST:,}, which cannot be right")
    for field, alpha in alphas.items():
        if not is_number(alpha) or alpha <= 0:
            problems.append(f"{field}: {alpha!r} is not a number above 0")
        elif alpha > MOST:
            problems.append(f"{field}: {alpha!r} is above {MOST:,}, which cannot be right")
    if not is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        problems.append(f"lora_dropout: {lora_dropout!r} is not a number from 0 to below 1")
    return problems + [
        f"{field}: {key!r} is not a regular expression; write the end of a module's path"
        for field, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern))
        for key in pattern
        if not is_regex(key)
    ]


def is_number(value: object) -> bool:
    """Returns whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def matches(pattern: str, path: str) -> bool:
    """Returns whether a regular expression matches a whole path.

    Raises ValueError after REGEX_SECONDS. Python can be interrupted so in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        return re.fullmatch(pattern, path) is not None

    def stop(*_: object) -> None:
        raise ValueError(
            f"{pattern!r} backtracks for more than {REGEX_SECONDS:g} s on {path}; give a list of names"
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, REGEX_SECONDS)
    try:
        return re.fullmatch(pattern, path) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def linear_names(model: nn.Module) -> list[str]:
    """Returns the paths of all nn.Linear layers except the language-model head, in the model's order."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if name.rpartition(".")[2] != OUTPUT_HEAD]


def find_targets(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    """Returns the paths of the linear layers that target_modules selects.

    Raises ValueError that lists the entries of target_modules that select no layer, and the names to choose
    from.
    """
    names = linear_names(model)
    found = [name for name in names if is_target(name, target_modules)]
    entries = [target_modules] if isinstance(target_modules, str) else [[entry] for entry in target_modules]
    unknown = [entry for entry in entries if not any(is_target(name, entry) for name in names)]
    if unknown or not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        what = ", ".join(repr(e if isinstance(e, str) else e[0]) for e in unknown) or "the empty list"
        raise ValueError(
            f"target_modules: {what} selects no linear layer; the model has {known}; "
            f'"{ALL_LINEAR}" selects all'
        )
    return found


def is_target(name: str, target_modules: list[str] | str) -> bool:
    """Returns whether target_modules selects the layer with this path, by PEFT's rules.

    An entry of a list selects the path that equals it, and every path that ends with a dot and the entry. A
    string is "all-linear" or a regular expression that must match the whole path.
    """
    if isinstance(target_modules, str):
        if target_modules == ALL_LINEAR:
            return True
        if not is_regex(target_modules):
            raise ValueError(
                f"target_modules: {target_modules!r} is not a regular expression; give a list of names"
            )
        return matches(target_modules, name)
    return any(entry == ALL_LINEAR or f".{name}".endswith(f".{entry}") for entry in target_modules)


def matches_end(pattern: str, name: str) -> bool:
    """Returns whether a regular expression matches a path or its end after a dot (PEFT's get_pattern_key)."""
    return matches(rf"(.*\.)?({pattern})", name)


def pattern_value(pattern: dict[str, T], name: str, default: T) -> T:
    """Returns the value of the first key of `pattern` that matches_end accepts for a path, or `default`."""
    return next((value for key, value in pattern.items() if matches_end(key, name)), default)


def wrap(
    model: nn.Module, sizes: Sizes, *, type: str, lora_dropout: float, use_rslora: bool, seed: int
) -> None:
    """Freezes the model and adds an adapter to each linear layer in `sizes`, {path: (r, lora_alpha)}.

    Raises ValueError if the model already has adapters.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them or load the model again")
    model.requires_grad_(False)
    kind = DoRALinear if type == "dora" else LoRALinear
    for name, (r, lora_alpha) in sizes.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear), name
        layer = kind(base, r, lora_alpha, lora_dropout, use_rslora, module_seed(seed, name))
        set_module(model, name, layer.train(base.training))


def module_seed(seed: int, name: str) -> int:
    """Returns a seed below 2^63 for a module's path. Python's hash() would differ from process to process."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule at a path."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unwrap(model: nn.Module) -> None:
    """Removes every adapter and puts its base layer, which stays frozen, back into the model."""
    for name, layer in adapters(model).items():
        set_module(model, name, layer.base_layer)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns {path of the wrapped layer: adapter} for all adapters, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Turns all adapters off inside a `with` block, so that the model equals its base; then restores them."""
    before = {layer: layer.enabled for layer in adapters(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns {"<layer's path>.lora_A": tensor, ...} with every lora_A, lora_B and lora_magnitude_vector.

    The tensors share memory with the parameters, so the next optimizer step changes them; clone to keep them.
    """
    return {
        f"{name}.{key}": p.detach()
        for name, layer in adapters(model).items()
        for key, p in layer.named_parameters(recurse=False)
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copies `state`, which has the keys of adapter_state, into the model's adapters.

    Raises ValueError that lists all missing, unexpected and misshapen tensors; the model is then as before.
    """
    own = adapter_state(model)
    problems = [f"missing: {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected: {key}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if state[key].shape != own[key].shape:
            problems.append(f"{key}: shape {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}")
    if problems:
        head = "these tensors do not fit the model's adapters; use the base that they were made for:"
        raise ValueError(listed(head, sorted(problems)))
    for key, tensor in own.items():
        tensor.copy_(state[key])


@contextmanager
def with_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Gives the adapters other weights, and eval mode, inside a `with` block; then restores their own."""
    own = {name: x.clone() for name, x in adapter_state(model).items()}
    was_training = model.training
    try:
        load_adapter_state(model, state)
        model.eval()
        yield
    finally:
        load_adapter_state(model, own)
        model.train(was_training)
