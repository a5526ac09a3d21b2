"""Adapter folders of Hugging Face PEFT (written against 0.21): adapter_model.safetensors and
adapter_config.json.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from common.errors import listed
from common.files import read_json, replacing
from lora.dora import DoRALinear
from lora.inject import (
    adapter_state,
    adapters,
    bad_settings,
    is_regex,
    is_target,
    linear_names,
    load_adapter_state,
    pattern_value,
    unwrap,
    wrap,
)

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
PREFIX = "base_model.model."
# Where the text model lives in a checkpoint of the multimodal wrapper: today's place, and that of
# transformers before 4.52.
TEXT_MODEL = ("model.language_model.", "language_model.model.")
# A text model has no images, so what adapts the image half changes none of its outputs and is passed over.
IMAGE_HALF = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "vision_tower.",
    "multi_modal_projector.",
)
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
}
HARMLESS = {
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "megatron_core",
    "qalora_group_size",
}
PLAIN_STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # other values of init_lora_weights (PiSSA, OLoRA, LoftQ, ...) alter the base weights as well


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model_name: str, config: dict | None = None
) -> None:
    """Writes the model's adapters as PEFT loads them; each file appears whole or not at all.

    What is written about ranks, types and targets is read off the adapters themselves. config: r and
    lora_alpha (those that are not in rank_pattern and alpha_pattern; else the commonest) and revision; its
    other keys are not looked at. Raises ValueError without adapters.
    """
    if not adapters(model):
        raise ValueError("nothing to save: the model has no adapters")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + file_key(key): t.to("cpu", torch.float32).contiguous()
        for key, t in adapter_state(model).items()
    }
    text = json.dumps(peft_config(model, base_model_name, config or {}), indent=2, sort_keys=True) + "\n"
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as settings:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(text, encoding="utf-8")


def file_key(key: str) -> str:
    """Our parameter's name in PEFT's files, where A and B are linear layers and have a weight, and the
    magnitude vector has none.
    """
    return key if key.endswith("lora_magnitude_vector") else key + ".weight"


def peft_config(model: nn.Module, base_model_name: str, config: dict) -> dict:
    """adapter_config.json for the adapters in the model."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    r = config.get("r") or Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    lora_alpha = (
        config.get("lora_alpha")
        or Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": config.get("revision"),
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "use_dora": isinstance(first, DoRALinear),
        "target_modules": shortest_targets(model),
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {name: layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {
            name: layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != lora_alpha
        },
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def shortest_targets(model: nn.Module) -> list[str]:
    """The adapters' last path components where these select just them, else whole paths; never "all-linear",
    which a wrapper reads differently.
    """
    names = list(adapters(model))
    lasts = sorted({name.rpartition(".")[2] for name in names})
    others = [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return lasts if all(name in names for name in others if is_target(name, lasts)) else names


def load_adapter(model: nn.Module, folder: str | Path) -> dict:
    """Injects the adapter that PEFT or save_adapter wrote to `folder` and returns its adapter_config.json;
    its weights stay trainable.

    Raises ValueError, and leaves the model without adapters, for settings that are not supported, files that
    cannot be read, and with every missing, unexpected or misshapen tensor in one message. A pickle is never
    opened.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    paths = file_paths(tensors, linear_names(model))
    chosen = [
        path
        for path in paths
        if is_target(path, config["target_modules"])
        and not is_target(path, config.get("exclude_modules") or [])
    ]
    if not chosen:
        raise ValueError(
            f"{folder / CONFIG}: target_modules {config['target_modules']!r} fits no linear layer of this "
            f"model"
        )
    sizes = {
        paths[path]: (
            pattern_value(config.get("rank_pattern") or {}, path, config["r"]),
            pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"]),
        )
        for path in chosen
    }
    wrap(
        model,
        sizes,
        type="dora" if config.get("use_dora") else "lora",
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        seed=0,
    )
    try:
        load_adapter_state(model, {our_key(key, paths): t for key, t in tensors.items()})
    except ValueError as error:
        unwrap(model)
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    return config


def file_paths(tensors: dict, names: list[str]) -> dict[str, str]:
    """{path in the file: path in our model}; the two differ for adapters of the multimodal wrapper."""
    text_model = next(
        (place for place in TEXT_MODEL if any(key.startswith(PREFIX + place) for key in tensors)), "model."
    )
    return {
        text_model + name.removeprefix("model.") if name.startswith("model.") else name: name
        for name in names
    }


def adapter_tensors(model: nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """The file's tensors by adapter_state's keys, for a model whose adapters load_adapter has made."""
    tensors = read_tensors(Path(folder))
    paths = file_paths(tensors, list(adapters(model)))
    return {our_key(key, paths): t for key, t in tensors.items()}


def our_key(key: str, paths: dict[str, str]) -> str:
    """A file's key as adapter_state names it, or unchanged if it belongs to no linear layer of ours."""
    path, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return f"{paths[path]}.{kind}" if path in paths and key.startswith(PREFIX) else key


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, memory-mapped, without those of the image half."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{folder / PICKLE} is a pickle, which can run any program when it is opened, so it is not "
                f"opened. If you trust "
                f"its origin, convert it: peft's PeftModel.from_pretrained(base, "
                f"folder).save_pretrained(folder) writes {WEIGHTS}"
            )
        raise ValueError(f"{path} does not exist; an adapter folder holds {WEIGHTS} and {CONFIG}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {
                key: file.get_tensor(key)
                for key in file.keys()
                if not key.removeprefix(PREFIX).startswith(IMAGE_HALF)
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from None


def read_config(folder: Path) -> dict:
    """adapter_config.json; raises ValueError with every key that is missing, wrong or stands for something
    that is not done here.
    """
    path = folder / CONFIG
    config = read_json(path, f"an adapter folder holds {WEIGHTS} and {CONFIG}")
    problems = config_problems(config)
    if problems:
        raise ValueError(listed(f"{path}:", problems))
    return config


def config_problems(config: dict) -> list[str]:
    """A line for each key of an adapter_config.json that load_adapter cannot follow."""
    problems = [
        f"{key}: is missing"
        for key in ("peft_type", "r", "lora_alpha", "target_modules")
        if config.get(key) is None
    ]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type: {config['peft_type']!r} is not supported, only LORA is")
    if config.get("bias", "none") != "none":
        problems.append(f'bias: {config["bias"]!r} is not supported, only "none": biases stay frozen')
    if config.get("modules_to_save"):
        problems.append(
            f"modules_to_save: {config['modules_to_save']!r} is not supported: whole modules trained beside "
            f"the adapter are not loaded; "
            "merge the adapter with PEFT and use the merged model"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        problems.append(
            f"init_lora_weights: {config['init_lora_weights']!r} changes the base weights too; convert it "
            f"with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
    unknown = sorted(config.keys() - READ - HARMLESS - {"modules_to_save"})
    problems += [
        f"{key}: {config[key]!r} is not supported, only its default is" for key in unknown if config[key]
    ]
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        return [*problems, "rank_pattern and alpha_pattern: must be objects of name: number"]
    kind = "dora" if config.get("use_dora") else "lora"
    if config.get("r") is not None and config.get("lora_alpha") is not None:
        problems += bad_settings(
            kind, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), *patterns
        )
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        if (
            value is not None
            and not isinstance(value, str)
            and not (isinstance(value, list) and all(isinstance(v, str) for v in value))
        ):
            problems.append(f"{key}: {value!r} is neither a list of names nor a string")
        if isinstance(value, str) and not is_regex(value):
            problems.append(f"{key}: {value!r} is not a regular expression")
    return problems
