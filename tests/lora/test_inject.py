"""lora/inject.py: target selection, trainable parameters, disabling adapters, and loading their state."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from lora.dora import DoRALinear
from lora.inject import adapter_state, adapters, disabled, find_targets, inject, load_adapter_state, unwrap
from lora.layer import LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return x + torch.tanh(self.v_proj(torch.tanh(self.q_proj(self.norm(x)))))


class Toy(nn.Module):
    """Twelve blocks and a head; layer 1 must not match layer 11."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.lm_head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def toy(**settings) -> Toy:
    """Returns a Toy with adapters whose lora_B is random."""
    torch.manual_seed(0)
    model = Toy()
    inject(model, **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "seed": 1} | settings)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B)
    return model


X = torch.linspace(-1, 1, 8).view(2, 4)
PLAIN = {"r": 2, "lora_alpha": 4, "seed": 1}
LISTS = [["q_proj"], ["q_proj", "v_proj"], ["1.q_proj"], ["layers.1.q_proj", "2.v_proj"]]


def test_all_linear_is_every_linear_layer_but_the_head():
    names = inject(Toy(), target_modules="all-linear", **PLAIN)
    assert names == [f"layers.{i}.{name}" for i in range(12) for name in ("q_proj", "v_proj")]
    assert find_targets(Toy(), ["all-linear", "q_proj"]) == names


@pytest.mark.parametrize("target_modules", [*LISTS, r".*\.[35]\.v_proj", r"layers\.1.*q_proj"])
def test_the_same_layers_are_targeted_as_by_peft(target_modules):
    theirs = get_peft_model(Toy(), LoraConfig(target_modules=target_modules)).base_model.model
    expected = [name for name, module in theirs.named_modules() if isinstance(module, PeftLinear)]
    assert find_targets(Toy(), target_modules) == expected != []


def test_unknown_names_are_in_one_error_with_those_that_exist():
    with pytest.raises(ValueError) as error:
        inject(Toy(), target_modules=["q_porj", "norm", "lm_head", "v_proj"], **PLAIN)
    assert "'q_porj', 'norm', 'lm_head'" in str(error.value) and "q_proj, v_proj" in str(error.value)


@pytest.mark.parametrize("target_modules", [[], "q_proj", "("])
def test_targets_that_select_nothing_are_refused(target_modules):
    with pytest.raises(ValueError, match="target_modules"):
        inject(Toy(), target_modules=target_modules, **PLAIN)


def test_every_bad_setting_is_in_one_error_and_the_model_is_untouched():
    model, bad = Toy(), {"type": "lokr", "r": 0, "lora_alpha": -1, "lora_dropout": 1.0}
    with pytest.raises(ValueError) as error:
        inject(model, target_modules=["nope"], seed=1, rank_pattern={"(": 2}, **bad)
    for field in ("type", "r:", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern"):
        assert field in str(error.value)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_pattern_that_is_no_regular_expression_is_refused_by_key():
    with pytest.raises(ValueError, match=r"alpha_pattern: '\(' is not a regular expression"):
        inject(Toy(), target_modules=["q_proj"], alpha_pattern={"(": 8}, **PLAIN)


@pytest.mark.parametrize("key", ["v_proj", "layers.2", "proj"])
def test_a_pattern_that_fits_no_target_is_refused(key):
    with pytest.raises(ValueError, match=f"rank_pattern: '{key}' fits none"):
        inject(Toy(), target_modules=["q_proj"], rank_pattern={key: 8}, **PLAIN)


def test_patterns_give_a_layer_its_own_rank_and_alpha_as_in_peft():
    settings = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.q_proj": 3, "v_proj": 1}}
    settings["alpha_pattern"] = {"1.v_proj": 5, r"1\d\..*": 7}
    model = toy(**settings)
    theirs = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=4, **settings)).base_model.model
    for name, layer in adapters(model).items():
        peft = theirs.get_submodule(name)
        for field in ("r", "lora_alpha", "scaling"):
            assert getattr(layer, field) == getattr(peft, field)["default"]
    q_1, q_11 = model.layers[1].q_proj, model.layers[11].q_proj
    assert (q_1.r, q_11.r, q_11.lora_alpha) == (3, 2, 7)


@pytest.mark.parametrize("type, kind", [("lora", LoRALinear), ("dora", DoRALinear)])
def test_only_adapters_are_trainable(type, kind):
    model = toy(type=type)
    assert {layer.__class__ for layer in adapters(model).values()} == {kind}
    trainable = [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad]
    assert set(trainable) <= {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert len(trainable) == len(adapter_state(model)) == 12 * (2 if type == "lora" else 3)


def test_a_layers_first_weights_do_not_depend_on_the_other_targets():
    few, many, other = Toy(), Toy(), Toy()
    inject(few, target_modules=["3.v_proj"], **PLAIN)
    inject(many, target_modules="all-linear", **PLAIN)
    inject(other, target_modules="all-linear", **PLAIN | {"seed": 2})
    assert torch.equal(few.layers[3].v_proj.lora_A, many.layers[3].v_proj.lora_A)
    assert not torch.equal(many.layers[2].v_proj.lora_A, many.layers[3].v_proj.lora_A)
    assert not torch.equal(other.layers[3].v_proj.lora_A, many.layers[3].v_proj.lora_A)


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_a_freshly_injected_model_equals_its_base(type):
    model = Toy()
    before = model(X)
    inject(model, type=type, target_modules="all-linear", **PLAIN)
    assert torch.equal(model(X), before)


def test_adapters_of_a_model_in_eval_mode_are_in_eval_mode():
    model = Toy().eval()
    inject(model, lora_dropout=0.5, target_modules="all-linear", **PLAIN)
    assert not any(module.training for module in model.modules())


def test_a_second_injection_is_refused():
    with pytest.raises(ValueError, match="adapters already"):
        inject(toy(), target_modules=["v_proj"], **PLAIN)


def test_unwrap_gives_the_base_back():
    model = toy()
    with disabled(model):
        expected = model(X)
    unwrap(model)
    assert type(model.layers[0].q_proj) is nn.Linear
    assert torch.equal(model(X), expected)


def test_disabled_is_the_base_inside_and_the_adapted_model_again_after_an_exception():
    model = toy()
    adapted = model(X)
    with pytest.raises(KeyboardInterrupt), disabled(model):
        assert not torch.equal(model(X), adapted)
        raise KeyboardInterrupt
    assert torch.equal(model(X), adapted)


def test_disabled_leaves_an_adapter_off_that_was_off_before():
    model = toy()
    for layer in adapters(model).values():
        layer.enabled = layer is model.layers[0].q_proj
    with disabled(model):
        pass
    assert [layer.enabled for layer in adapters(model).values()] == [True] + [False] * 11


def test_adapter_state_put_back_gives_the_same_model():
    model, other = toy(type="dora"), toy(type="dora", seed=5)
    load_adapter_state(other, adapter_state(model))
    assert torch.equal(other(X), model(X))


def test_state_that_does_not_fit_is_reported_whole_and_changes_nothing():
    model = toy()
    state = {key: tensor + 1 for key, tensor in adapter_state(model).items()}
    before = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    del state["layers.3.q_proj.lora_A"]
    state["layers.4.q_proj.lora_B"] = torch.zeros(4, 9)
    state["layers.5.k_proj.lora_B"] = torch.zeros(4, 2)
    with pytest.raises(ValueError) as error:
        load_adapter_state(model, state)
    missing_and_unexpected = "missing: layers.3.q_proj.lora_A", "unexpected: layers.5.k_proj.lora_B"
    for text in (*missing_and_unexpected, "layers.4.q_proj.lora_B: shape (4, 9), the model's is (4, 2)"):
        assert text in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_state(model).items())


def test_the_error_for_the_state_of_another_model_has_at_most_20_lines_of_tensors():
    with pytest.raises(ValueError, match="use the base that they were made for:(\n.+){20}\n.*and 13 more$"):
        load_adapter_state(toy(), {f"layers.{n}.lora_A": X for n in range(33)} | adapter_state(toy()))
