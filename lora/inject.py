"""Puts adapters around a model's linear layers, finds them again, and switches them on and off."""

import hashlib
import re
from contextlib import contextmanager

import torch
from torch import nn

from common.errors import listed
from lora.dora import DoRALinear
from lora.layer import LoRALinear

ALL_LINEAR = "all-linear"
OUTPUT_HEAD = (
    "lm_head"  # never adapted: a loss in chunks reads the head's weight and does not call the module
)


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
    """Freezes the model, wraps its targeted linear layers and returns their names; raises ValueError with
    every bad setting.

    target_modules: names as PEFT matches them (a whole dotted path or the end of one), "all-linear", or one
    regular expression for whole paths. rank_pattern, alpha_pattern: {end of a path, as a regular expression:
    its own r or lora_alpha}; the first that fits is taken. An adapter's first weights depend on `seed` and
    its own name only, not on the global generator or on what else is targeted.
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
            if not any(fits(key, name) for name in names)
        ]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    sizes = {
        name: (pattern_value(rank_pattern, name, r), pattern_value(alpha_pattern, name, lora_alpha))
        for name in names
    }
    wrap(model, sizes, type=type, lora_dropout=lora_dropout, use_rslora=use_rslora, seed=seed)
    return names


def bad_settings(type, r, lora_alpha, lora_dropout, rank_pattern: dict, alpha_pattern: dict) -> list[str]:
    """A line for each setting that no adapter can have."""
    problems = [] if type in ("lora", "dora") else [f'type: {type!r} is neither "lora" nor "dora"']
    for field, value in [("r", r), *((f"rank_pattern.{key}", v) for key, v in rank_pattern.items())]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{field}: {value!r} is not a whole number above 0")
    for field, value in [
        ("lora_alpha", lora_alpha),
        *((f"alpha_pattern.{key}", v) for key, v in alpha_pattern.items()),
    ]:
        if not is_number(value) or value <= 0:
            problems.append(f"{field}: {value!r} is not a number above 0")
    if not is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        problems.append(f"lora_dropout: {lora_dropout!r} is not a number from 0 to below 1")
    for field, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        problems += [
            f"{field}: {key!r} is not a regular expression; write the end of a module's path"
            for key in pattern
            if not is_regex(key)
        ]
    return problems


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the nn.Linear layers that can be adapted, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != OUTPUT_HEAD
    ]


def find_targets(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    """Paths of the linear layers that target_modules means; raises ValueError naming each that means none and
    the names there are.
    """
    names = linear_names(model)
    found = [name for name in names if is_target(name, target_modules)]
    wanted = [target_modules] if isinstance(target_modules, str) else [[target] for target in target_modules]
    unknown = [target for target in wanted if not any(is_target(name, target) for name in names)]
    if unknown or not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none at all"
        what = (
            ", ".join(repr(target if isinstance(target, str) else target[0]) for target in unknown)
            or "as the empty list says"
        )
        raise ValueError(
            f"target_modules: no linear layer is called {what}; there are {there}, or all with {ALL_LINEAR!r}"
        )
    return found


def is_target(name: str, target_modules: list[str] | str) -> bool:
    """PEFT's rule: a list holds whole paths or ends of them after a dot; a string is "all-linear" or a
    regular expression for the whole path.
    """
    if target_modules == ALL_LINEAR or (not isinstance(target_modules, str) and ALL_LINEAR in target_modules):
        return True
    if not isinstance(target_modules, str):
        return any(name == target or name.endswith("." + target) for target in target_modules)
    if not is_regex(target_modules):
        raise ValueError(
            f"target_modules: {target_modules!r} is not a regular expression; give a list of names"
        )
    return re.fullmatch(target_modules, name) is not None


def fits(pattern: str, name: str) -> bool:
    """Whether the end of a path, from a dot on, is this regular expression (PEFT's get_pattern_key)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_value(pattern: dict, name: str, default):
    """The value of the first key that fits the module's name, else the default."""
    return next((value for key, value in pattern.items() if fits(key, name)), default)


def wrap(
    model: nn.Module,
    sizes: dict[str, tuple[int, float]],
    *,
    type: str,
    lora_dropout: float,
    use_rslora: bool,
    seed: int,
) -> None:
    """Freezes the model and puts an adapter of (r, lora_alpha) around each named linear layer; ValueError if
    the model has adapters.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them or load the model anew")
    model.requires_grad_(False)
    for name, (r, lora_alpha) in sizes.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear), name
        layer = (DoRALinear if type == "dora" else LoRALinear)(
            base, r, lora_alpha, lora_dropout, use_rslora, seed=module_seed(seed, name)
        )
        set_module(model, name, layer.train(base.training))


def module_seed(seed: int, name: str) -> int:
    """A seed below 2^63 for one module, far from its neighbours' (Python's hash() differs between runs)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place that `name` means."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unwrap(model: nn.Module) -> None:
    """Takes every adapter away and leaves the frozen base layers as they were."""
    for name, layer in adapters(model).items():
        set_module(model, name, layer.base_layer)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapters by the path of the layer they wrap, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all adapters on, or off so that the model is its base."""
    for layer in adapters(model).values():
        layer.enabled = enabled


@contextmanager
def disabled(model: nn.Module):
    """The base model inside the block (DPO's and GRPO's reference); afterwards, also on an exception, every
    adapter is as it was.
    """
    before = {layer: layer.enabled for layer in adapters(model).values()}
    set_enabled(model, False)
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """{path.lora_A, path.lora_B, path.lora_magnitude_vector: tensor}, detached but not copied: clone what
    must outlive the next step.
    """
    return {
        f"{name}.{key}": p.detach()
        for name, layer in adapters(model).items()
        for key, p in layer.named_parameters(recurse=False)
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copies adapter_state's tensors back; raises ValueError with every missing, unexpected or misshapen one,
    and then changes nothing.
    """
    mine = adapter_state(model)
    problems = [f"missing: {key}" for key in mine.keys() - state.keys()] + [
        f"unexpected: {key}" for key in state.keys() - mine.keys()
    ]
    problems += [
        f"{key}: shape {tuple(state[key].shape)}, the model's is {tuple(mine[key].shape)}"
        for key in mine.keys() & state.keys()
        if state[key].shape != mine[key].shape
    ]
    if problems:
        head = "these tensors do not fit the model's adapters; use the base that they were made for:"
        raise ValueError(listed(head, sorted(problems)))
    for key, tensor in mine.items():
        tensor.copy_(state[key])
