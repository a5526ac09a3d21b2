"""Saves and loads adapters in PEFT 0.21's format: adapter_model.safetensors and adapter_config.json."""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from common.errors import listed
from common.files import read_json, replacing
from lora import mlx
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
# Prefixes of the text model inside the multimodal wrapper: of transformers 4.52 and later, and of older ones.
WRAPPED_TEXT_MODEL = ("model.language_model.", "language_model.model.")
# Text never reaches the vision part, so its adapters are ignored.
VISION = tuple(m + part for m in ("", "model.") for part in ("vision_tower.", "multi_modal_projector."))
REQUIRED_KEYS = ("peft_type", "r", "lora_alpha", "target_modules")
# An unknown key is an error unless its value is false, because it may change what the adapter computes.
KNOWN_KEYS = {*REQUIRED_KEYS, "lora_dropout", "use_rslora", "use_dora", "exclude_modules", "rank_pattern"}
KNOWN_KEYS |= {"alpha_pattern", "bias", "init_lora_weights", "modules_to_save", "trainable_token_indices"}
KNOWN_KEYS |= {"layers_to_transform", "layers_pattern"}
IGNORED_KEYS = {"peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode"}
IGNORED_KEYS |= {"auto_mapping", "megatron_core", "qalora_group_size"}
# Other values of init_lora_weights (PiSSA, OLoRA, LoftQ, ...) change the base weights too.
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
# What save_pretrained leaves out of names, and a trainer's own state dict has: the adapter's name "default".
ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.[^.]+(?=\.weight$)")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MERGE = "merge the adapter with PEFT and use the merged model"
CLASSIFIER = "it belongs to a classifier, whose head gives scores and no text; train the base on rows whose "
CLASSIFIER += "response is the label"
# {part of a tensor's name: what is not supported}
UNSUPPORTED = {
    r"lora_embedding_|(embed_tokens|lm_head)\.(lora_|base_layer)": "embedding and head get no adapter here; "
    "train it again without embed_tokens and lm_head in target_modules",
    r"(embed_tokens|lm_head)\.weight$": "PEFT adds the whole matrix where tokens were added; " + MERGE,
    r"\.base_layer\.": "the file holds the base too; save the adapter alone: model.save_pretrained(folder)",
    r"modules_to_save|token_adapter": "parts that were trained as a whole are not loaded; " + MERGE,
    r"(^|\.)(score|classifier|qa_outputs)\.": CLASSIFIER,
}


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model_name: str, config: dict | None = None
) -> None:
    """Saves the model's adapters in PEFT's format; each file is written completely or not at all.

    Args:
        config: may give the revision, r and lora_alpha to write; other keys are ignored. By default, r and
            lora_alpha are those of most layers.

    Raises:
        ValueError: the model has no adapters.
    """
    if not adapters(model):
        raise ValueError("nothing to save: the model has no adapters")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model).items()
    tensors = {PREFIX + file_key(key): t.to("cpu", torch.float32).contiguous() for key, t in state}
    text = json.dumps(peft_config(model, base_model_name, config or {}), indent=2, sort_keys=True) + "\n"
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as settings:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(text, encoding="utf-8")


def file_key(key: str) -> str:
    """Returns PEFT's key for a key of adapter_state: lora_A and lora_B get ".weight" at the end."""
    return key if key.endswith("lora_magnitude_vector") else key + ".weight"


def peft_config(model: nn.Module, base_model_name: str, config: dict) -> dict:
    """Returns adapter_config.json for the adapters in the model."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    r = config.get("r") or Counter(ranks.values()).most_common(1)[0][0]
    lora_alpha = config.get("lora_alpha") or Counter(alphas.values()).most_common(1)[0][0]
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
        "rank_pattern": {name: v for name, v in ranks.items() if v != r},
        "alpha_pattern": {name: v for name, v in alphas.items() if v != lora_alpha},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def shortest_targets(model: nn.Module) -> list[str]:
    """Returns target_modules: the last parts of the adapters' paths, such as "q_proj", or the whole paths.

    Whole paths are necessary if a layer without an adapter has such a last part too. PEFT resolves
    "all-linear" differently in a multimodal model.
    """
    names = list(adapters(model))
    lasts = sorted({name.rpartition(".")[2] for name in names})
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    selected = (name.removesuffix(".base_layer") for name in linear)
    return lasts if all(name in names for name in selected if is_target(name, lasts)) else names


def load_adapter(model: nn.Module, folder: str | Path) -> dict:
    """Adds an adapter saved by PEFT or save_adapter to the model, as trainable, and returns its config.

    Raises ValueError for unsupported settings, for an unreadable file, and with a list of all missing,
    unexpected and misshapen tensors. The model then has no part of the adapter. A pickle is never opened.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    paths = file_paths(tensors, linear_names(model))
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        chosen = [path for path in paths if is_target(path, targets) and not is_target(path, excluded)]
        if layers is not None:
            chosen = [path for path in chosen if (i := LAYER.search(path)) and int(i[1]) in layers]
        sizes = {
            paths[p]: (pattern_value(ranks, p, config["r"]), pattern_value(alphas, p, config["lora_alpha"]))
            for p in chosen
        }
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    if not chosen:
        raise ValueError(f"{folder / CONFIG}: target_modules {targets!r} fits no linear layer of this model")
    largest = max((max(t.shape, default=0) for t in tensors.values()), default=0)
    if (r := max(r for r, _ in sizes.values())) > largest:  # before anything of that size is allocated
        raise ValueError(f"{folder / CONFIG}: r: {r} does not fit the tensors, whose r is {largest} at most")
    kind, rslora = "dora" if config.get("use_dora") else "lora", config.get("use_rslora", False)
    dropout = config.get("lora_dropout", 0.0)
    wrap(model, sizes, type=kind, lora_dropout=dropout, use_rslora=rslora, seed=0)
    try:
        load_adapter_state(model, {own_key(key, paths): t for key, t in tensors.items()})
    except ValueError as error:
        unwrap(model)
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    return config


def file_paths(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, str]:
    """Returns {layer's path in the file: path in the model}; they differ for a multimodal model's adapter."""
    wrapped = (prefix for prefix in WRAPPED_TEXT_MODEL if any(k.startswith(PREFIX + prefix) for k in tensors))
    prefix = next(wrapped, "model.")
    return {prefix + n.removeprefix("model.") if n.startswith("model.") else n: n for n in names}


def adapter_tensors(model: nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """Reads an adapter folder's tensors, keyed as in adapter_state; the model must have that adapter."""
    tensors = read_tensors(Path(folder))
    paths = file_paths(tensors, list(adapters(model)))
    return {own_key(key, paths): t for key, t in tensors.items()}


def own_key(key: str, paths: dict[str, str]) -> str:
    """Returns adapter_state's key for a key of the file, or the key itself if `paths` lacks its layer."""
    path, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return f"{paths[path]}.{kind}" if path in paths and key.startswith(PREFIX) else key


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns an adapter's tensors by PEFT's names, memory-mapped, except those of a vision part.

    Raises ValueError that names the file, and every tensor that is unsupported or not finite.
    """
    path, pickle = weights_file(folder), folder / PICKLE
    if not path.is_file() and pickle.is_file():
        raise ValueError(
            f"{pickle} is a pickle, which can run any code when it is opened, so it is not opened. "
            "If you trust it, convert it to safetensors with peft: "
            "PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        )
    tensors: dict[str, torch.Tensor] = {}
    for stored, tensor in _stored_tensors(path).items():
        key = stored
        if path.name == mlx.WEIGHTS:
            key, tensor = mlx.peft_tensor(PREFIX + key, tensor)
        # torch.compile and DistributedDataParallel put these before the names in what they wrap.
        key = ADAPTER_NAME.sub(r"\1", key.replace("_orig_mod.", "").removeprefix("module."))
        if key in tensors:
            raise ValueError(f"{path}: holds {key} twice, as of several adapters; save one of them alone")
        if not key.removeprefix(PREFIX).startswith(VISION):
            tensors[key] = tensor
    if problems := tensor_problems(tensors):
        raise ValueError(listed(f"{path}:", problems))
    return tensors


def _stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; an adapter folder holds {WEIGHTS} and {CONFIG}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e}); copy or download it again") from None


def weights_file(folder: Path) -> Path:
    """Returns the path of an adapter's tensors: PEFT's file or, where there is only this one, mlx-lm's."""
    names = [name for name in (WEIGHTS, mlx.WEIGHTS) if (folder / name).is_file()]
    return folder / (names[0] if names else WEIGHTS)


def tensor_problems(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Returns an error message for each kind of unsupported tensor, and each value that is not finite."""
    kinds = {key: next((p for p in UNSUPPORTED if re.search(p, key)), "") for key in tensors}
    first = {kind: key for key, kind in reversed(kinds.items()) if kind}
    problems = [f"{key}: {UNSUPPORTED[kind]}" for kind, key in first.items()]
    for dtype in {tensor.dtype: None for tensor in tensors.values() if tensor.dtype not in FLOATS}:
        keys = [key for key, tensor in tensors.items() if tensor.dtype == dtype]
        count = f" (one of {len(keys)} such tensors)" if len(keys) > 1 else ""
        problems.append(f"{keys[0]}: is stored as {dtype}{count}, which is no float of 16 bits or more")
    for key, tensor in tensors.items():
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            problems.append(f"{key}: has an infinity or NaN; take an earlier step of that training")
    return problems


def read_config(folder: Path) -> dict:
    """Returns adapter_config.json; raises ValueError that lists all missing, wrong and unsupported keys."""
    path = folder / CONFIG
    config = read_json(path, f"an adapter folder holds {WEIGHTS} and {CONFIG}")
    if mlx.is_mlx(config):
        try:
            config = mlx.peft_config(config, _stored_tensors(weights_file(folder)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    problems = config_problems(config)
    if problems:
        raise ValueError(listed(f"{path}:", problems))
    return config


def config_problems(config: dict) -> list[str]:
    """Returns an error message for each missing, wrong or unsupported key of adapter_config.json."""
    problems = _unsupported(config)
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        return [*problems, "rank_pattern and alpha_pattern: must be objects of name: number"]
    r, lora_alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if r is not None and lora_alpha is not None:
        problems += bad_settings("lora", r, lora_alpha, dropout, *patterns)
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if value is not None and not isinstance(value, str) and not names:
            problems.append(f"{key}: {value!r} is neither a list of names nor a string")
        if isinstance(value, str) and not is_regex(value):
            problems.append(f"{key}: {value!r} is not a regular expression")
    return problems


def _unsupported(config: dict) -> list[str]:
    """Returns an error message for each missing key, and each one with a value that is not supported."""
    problems = [f"{key}: is missing" for key in REQUIRED_KEYS if config.get(key) is None]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type: {config['peft_type']!r} is not supported, only LORA is")
    if config.get("bias", "none") != "none":
        problems.append(f'bias: {config["bias"]!r} is not supported, only "none": biases stay frozen')
    if modules := config.get("modules_to_save"):
        problems.append(
            f"modules_to_save: {modules!r} is not supported: modules that were trained as a whole are not "
            f"loaded; {MERGE}"
        )
    if tokens := config.get("trainable_token_indices"):
        problems.append(f"trainable_token_indices: {tokens!r} is not supported; {MERGE}")
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        problems.append(f"task_type: {config['task_type']!r}: {CLASSIFIER}")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key) or False, bool):
            problems.append(f"{key}: {config[key]!r} is neither true nor false")
    layers = config.get("layers_to_transform")
    if any(not isinstance(i, int) for i in (layers if isinstance(layers, list) else [layers or 0])):
        problems.append(
            f"layers_to_transform: {layers!r} is neither the number of a layer nor a list of these"
        )
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        problems.append(f"layers_pattern: {config['layers_pattern']!r} is not supported, only 'layers' is")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights: {init!r} changes the base weights too; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    unknown = sorted(key for key in config.keys() - KNOWN_KEYS - IGNORED_KEYS if config[key])
    problems += [f"{key}: {config[key]!r} is not supported, only its default is" for key in unknown]
    return problems
