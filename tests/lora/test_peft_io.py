"""lora/peft_io.py: the contents of the files, exchange with PEFT both ways, and errors of bad files."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma3Config as HFWrapperConfig
from transformers import Gemma3ForCausalLM as HFGemma3
from transformers import Gemma3ForConditionalGeneration, Gemma3TextConfig

from lora.inject import adapter_state, adapters, inject
from lora.peft_io import load_adapter, save_adapter
from model.config import parse_config
from model.gemma3 import Gemma3ForCausalLM

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.q_proj": 5, "v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dora": {"use_dora": True},
    "dora with rslora and patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
}
X = torch.linspace(-1, 1, 18).view(3, 6)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        names = {"q_proj": True, "v_proj": False}  # {name: bias}
        layers = [{n: nn.Linear(6, 6, bias=bias) for n, bias in names.items()} for _ in range(3)]
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer["v_proj"](torch.tanh(layer["q_proj"](x))))
        return x


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def train(model: nn.Module) -> nn.Module:
    """Changes every adapter parameter, Loupe's or PEFT's, by a random value."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data += 0.3 * torch.rand(p.shape, generator=generator)
    return model


SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def ours(**settings) -> Toy:
    model = toy()
    settings["type"] = "dora" if settings.pop("use_dora", False) else "lora"
    inject(model, **SETTINGS | {"seed": 1} | settings)
    return train(model).eval()


def theirs(model: nn.Module | None = None, **settings) -> nn.Module:
    return train(get_peft_model(model or toy(), LoraConfig(**SETTINGS | settings))).eval()


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """The adapter folder of a Toy, written by save_adapter."""
    save_adapter(ours(), tmp_path, base_model_name="toy", config={"r": 4, "lora_alpha": 8})
    return tmp_path


def test_the_files_hold_the_keys_and_settings_of_an_example_by_hand(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    settings = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["0"]}
    inject(model, type="dora", seed=1, **settings)
    save_adapter(model, tmp_path, base_model_name="google/gemma-3-270m-it", config={"revision": "abc"})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (1, 3),
        "base_model.model.0.lora_B.weight": (2, 1),
        "base_model.model.0.lora_magnitude_vector": (2,),
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == settings | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "google/gemma-3-270m-it",
        "revision": "abc",
        "inference_mode": True,
        "use_dora": True,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_our_adapter_with_the_same_outputs(tmp_path, variant):
    model = ours(**VARIANTS[variant])
    save_adapter(model, tmp_path, base_model_name="toy", config={"r": 4, "lora_alpha": 8})
    # With CAUSAL_LM, PEFT requires a transformers model; the Gemma tests below have one.
    edit_config(tmp_path, task_type=None)
    loaded = PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X))
    assert (model(X) - toy()(X)).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_load_pefts_adapter_with_the_same_outputs(tmp_path, variant):
    peft = theirs(**VARIANTS[variant])
    peft.save_pretrained(tmp_path)
    model = toy().eval()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), peft(X))
    assert (model(X) - toy()(X)).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_adapters_are_equal_to_the_last_bit(tmp_path, variant):
    model, again = ours(**VARIANTS[variant]), toy()
    save_adapter(model, tmp_path, base_model_name="toy")
    load_adapter(again, tmp_path)
    tensors, expected = adapter_state(again), adapter_state(model)
    assert list(tensors) == list(expected) and all(
        torch.equal(tensors[key], expected[key]) for key in tensors
    )
    scalings = [[layer.scaling for layer in adapters(m).values()] for m in (again, model)]
    assert scalings[0] == scalings[1]


TARGETS = ["all-linear", r"layers\.[02]\.q_proj", ["1.q_proj", "layers.2.v_proj"]]


@pytest.mark.parametrize("target_modules", TARGETS)
def test_target_modules_select_the_layers_that_peft_selected(tmp_path, target_modules):
    peft = theirs(target_modules=target_modules)
    peft.save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules=target_modules)
    model = toy()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), peft(X))


def test_full_names_are_written_where_suffixes_would_select_other_layers_too(tmp_path):
    save_adapter(ours(target_modules=["1.q_proj"]), tmp_path, base_model_name="toy")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["layers.1.q_proj"]


def test_excluded_modules_stay_without_an_adapter(tmp_path):
    peft = theirs(exclude_modules=["1.q_proj"])
    peft.save_pretrained(tmp_path)
    model = toy()
    load_adapter(model, tmp_path)
    assert "layers.1.q_proj" not in adapters(model)
    torch.testing.assert_close(model(X), peft(X))


def test_bfloat16_files_load_into_float32_adapters(folder):
    edit_tensors(folder, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    model = toy()
    load_adapter(model, folder)
    assert {t.dtype for t in adapter_state(model).values()} == {torch.float32}


LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = LAYER | {"vocab_size": 64, "num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8}
SIZES |= {"sliding_window": 4, "max_position_embeddings": 64}
TOKENS = torch.arange(2, 13)  # More tokens than the window.


def gemma_pair():
    """Returns a small random Gemma 3 of transformers (its last layer is global) and ours with its weights."""
    torch.manual_seed(0)
    hf = HFGemma3(Gemma3TextConfig(**SIZES, attn_implementation="eager")).eval()
    return hf, our_gemma(hf.config, hf.state_dict())


def our_gemma(config, weights) -> Gemma3ForCausalLM:
    model = Gemma3ForCausalLM(parse_config(config.to_dict())).eval()
    weights = {key: t for key, t in weights.items() if not key.startswith("lm_head")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return model


@torch.no_grad()
def our_logits(model):
    n = len(TOKENS)
    return model.logits(model(TOKENS, torch.arange(n), torch.tensor([0, n], dtype=torch.int32)))


@torch.no_grad()
def hf_logits(model):
    return model(input_ids=TOKENS[None]).logits[0]


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}])
def test_pefts_adapter_of_transformers_gemma_changes_our_logits_equally(tmp_path, settings):
    hf, model = gemma_pair()
    base = hf_logits(hf)
    peft = theirs(copy.deepcopy(hf), target_modules="all-linear", **settings)
    peft.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert len(adapters(model)) == 6 * 7
    delta = hf_logits(peft) - base
    assert delta.abs().max() > 0.1
    torch.testing.assert_close(our_logits(model) - base, delta, rtol=1e-4, atol=1e-4)


def test_our_adapter_changes_transformers_gemmas_logits_equally(tmp_path):
    hf, model = gemma_pair()
    settings = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    inject(model, r=3, lora_alpha=6, seed=1, rank_pattern={"layers.1.self_attn.q_proj": 2}, **settings)
    train(model)
    save_adapter(model, tmp_path, base_model_name="random")
    expected, loaded = our_logits(model), PeftModel.from_pretrained(hf, tmp_path)
    torch.testing.assert_close(hf_logits(loaded), expected, rtol=1e-4, atol=1e-4)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WRAPPER = {"vision_config": VISION | {"image_size": 16, "patch_size": 8}, "mm_tokens_per_image": 1}
WRAPPER_TARGETS = [["q_proj", "down_proj"], "all-linear", r".*language_model.*\.(q_proj|down_proj)"]


@pytest.mark.parametrize("target_modules", WRAPPER_TARGETS)
def test_an_adapter_of_the_multimodal_wrapper_loads_into_the_text_model(tmp_path, target_modules):
    torch.manual_seed(0)
    config = HFWrapperConfig(text_config=SIZES, attn_implementation="eager", **WRAPPER)
    hf = Gemma3ForConditionalGeneration(config).eval()
    weights = {key: t for key, t in hf.state_dict().items() if "language_model" in key}
    weights = {key.replace("model.language_model.", "model."): t for key, t in weights.items()}
    peft = theirs(hf, target_modules=target_modules)
    peft.save_pretrained(tmp_path)
    model = our_gemma(config.text_config, weights)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(our_logits(model), hf_logits(peft), rtol=1e-4, atol=1e-4)


def test_every_tensor_that_does_not_fit_is_in_one_error_and_the_model_has_no_adapters(folder):
    def edit(tensors):
        del tensors["base_model.model.layers.0.q_proj.lora_A.weight"]
        tensors["base_model.model.layers.1.q_proj.lora_B.weight"] = torch.zeros(6, 9)
        tensors["base_model.model.layers.1.k_proj.lora_B.weight"] = torch.zeros(6, 4)

    edit_tensors(folder, edit)
    model = toy()
    with pytest.raises(ValueError) as error:
        load_adapter(model, folder)
    for text in (
        "adapter_model.safetensors",
        "missing: layers.0.q_proj.lora_A",
        "layers.1.q_proj.lora_B: shape (6, 9), the model's is (6, 4)",
        "unexpected: base_model.model.layers.1.k_proj.lora_B.weight",
    ):
        assert text in str(error.value)
    assert not adapters(model)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "small.toml").write_text("")
    with pytest.raises(ValueError, match=r"adapter_config.json: no such file; an adapter folder holds"):
        load_adapter(toy(), tmp_path / "small.toml")


def test_a_rank_that_differs_from_the_tensors_is_refused(folder):
    edit_config(folder, r=5)
    with pytest.raises(ValueError, match="shape"):
        load_adapter(toy(), folder)


UNSUPPORTED = [
    ("bias", "all"),
    ("modules_to_save", ["lm_head"]),
    ("fan_in_fan_out", True),
    ("peft_type", "LOHA"),
    ("init_lora_weights", "pissa"),
    ("layers_to_transform", ["1"]),
    ("layers_pattern", "blocks"),
    ("task_type", "SEQ_CLS"),
    ("use_rslora", "no"),
    ("use_dora", 1),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 1e300),
    ("alpha_pattern", {"q_proj": float("nan")}),
    ("r", 10**9),
    ("r", 10**30),
    ("r", 2**16),
    ("rank_pattern", {"q_proj": 2**62}),
    ("target_modules", "(" * 10_000 + ")" * 10_000),
    ("trainable_token_indices", [3]),
    ("some_new_method", {"on": True}),
    ("r", 0),
    ("r", None),
    ("lora_alpha", "16"),
    ("lora_dropout", None),
    ("target_modules", 3),
    ("target_modules", "("),
    ("target_modules", ["conv"]),
    ("exclude_modules", "("),
    ("rank_pattern", ["q_proj"]),
]
CATASTROPHIC = r"(\w+\.?)+!"


@pytest.mark.parametrize("key, value", UNSUPPORTED)
def test_a_setting_that_is_not_supported_is_refused_by_name(folder, key, value):
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=f"adapter_config.json:(.|\n)*{key}"):
        load_adapter(toy(), folder)


def test_all_refused_settings_are_in_one_error(folder):
    edit_config(folder, bias="all", fan_in_fan_out=True, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="bias(.|\n)*modules_to_save(.|\n)*fan_in_fan_out"):
        load_adapter(toy(), folder)


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.fault("pickle")
def test_a_pickle_is_refused_unopened(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Bomb(folder / "exploded"), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle.*not opened.*convert"):
        load_adapter(toy(), folder)
    assert not (folder / "exploded").exists()


@pytest.mark.fault("damaged adapter")
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_by_name(folder, size):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="adapter_model.safetensors is not a whole safetensors file"):
        load_adapter(toy(), folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused_by_name(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(toy(), folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.* (does not exist|no such file)"):
        load_adapter(toy(), folder)


def test_a_crash_while_saving_keeps_the_old_adapter(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def crash(tensors, path, metadata):
        path.write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr("lora.peft_io.save_file", crash)
    with pytest.raises(OSError):
        save_adapter(ours(r=2), folder, base_model_name="toy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_without_adapters_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(toy(), tmp_path, base_model_name="toy")


@pytest.mark.fault("slow pattern")
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_regular_expression_that_would_take_years_is_refused(folder, monkeypatch, key):
    monkeypatch.setattr("lora.inject.REGEX_SECONDS", 0.05)
    model = nn.ModuleDict({"a" * 60: toy()})
    value = {CATASTROPHIC: 4} if key.endswith("pattern") else CATASTROPHIC
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match="adapter_config.json: .* backtracks for more than 0.05 s"):
        load_adapter(model, folder)


def rename_keys(folder, rename):
    tensors = {rename(key): t for key, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.fault("foreign adapter")
@pytest.mark.parametrize("prefix", ["{}", "_orig_mod.{}", "module.{}", "module._orig_mod.{}"])
@pytest.mark.parametrize("name", ["", ".default", ".my-adapter"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_the_names_of_a_trainers_own_state_dict_load(tmp_path, prefix, name, settings):
    model = theirs(**settings)
    model.save_pretrained(tmp_path)

    def rename(key):  # a state dict has ".weight" at the end of DoRA's vector too
        key = key if key.endswith(".weight") or not name else key + ".weight"
        return prefix.format(key.removesuffix(".weight") + name + ".weight" if name else key)

    rename_keys(tmp_path, rename)
    mine = toy().eval()
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(mine(X), model(X))


def test_two_adapters_in_one_file_are_refused(folder):
    def add(tensors):
        for key in list(tensors):
            one = tensors.pop(key)
            for name in ("default", "other"):
                tensors[key.replace(".weight", f".{name}.weight")] = one.clone()

    edit_tensors(folder, add)
    with pytest.raises(ValueError, match="twice, as of several adapters"):
        load_adapter(toy(), folder)


@pytest.mark.fault("foreign adapter")
@pytest.mark.parametrize("layers", [1, [0, 2]])
def test_only_the_layers_of_layers_to_transform_are_adapted(tmp_path, layers):
    wrapped = nn.ModuleDict({"model": toy()})
    model = theirs(wrapped, layers_to_transform=layers)
    model.save_pretrained(tmp_path)
    mine = nn.ModuleDict({"model": toy()}).eval()
    load_adapter(mine, tmp_path)
    chosen = [layers] if isinstance(layers, int) else layers
    assert {int(name.split(".")[2]) for name in adapters(mine)} == set(chosen)
    torch.testing.assert_close(mine["model"](X), model.base_model.model["model"](X))


FOREIGN = {
    "lm_head.lora_A.weight": "train it again without",
    "lm_head.base_layer.weight": "train it again without",
    "model.embed_tokens.lora_embedding_A": "train it again without",
    "model.embed_tokens.weight": "where tokens were added; merge the adapter with PEFT",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": "merge the adapter with PEFT",
    "model.embed_tokens.modules_to_save.weight": "merge the adapter with PEFT",
    "layers.0.q_proj.base_layer.weight": "save the adapter alone",
    "score.weight": "a classifier",
}


@pytest.mark.fault("foreign adapter")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_that_is_no_adapter_of_a_linear_layer_is_named_with_its_remedy(folder, name):
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model." + name: torch.zeros(4, 6)}))
    with pytest.raises(ValueError, match=f"{name}: .*{FOREIGN[name]}") as e:
        load_adapter(toy(), folder)
    assert str(e.value).count("\n") == 1


@pytest.mark.fault("not finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(folder, value):
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match="layers.0.q_proj.lora_A.weight: has an infinity or NaN"):
        load_adapter(toy(), folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_floats_are_one_line(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    with pytest.raises(ValueError, match=f"stored as {dtype} .one of 12 such tensors") as e:
        load_adapter(toy(), folder)
    assert str(e.value).count("\n") == 1
