"""lora/mlx.py: an adapter of mlx-lm computes W x + scale * (x lora_a) lora_b, and DoRA's norms."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora.inject import adapters
from lora.peft_io import load_adapter

R, SCALE = 2, 20.0
A, B, M = (
    torch.arange(12.0).view(6, R),
    torch.arange(8.0).view(R, 4) / 100,
    torch.tensor([1.0, 2.0, 3.0, 4.0]),
)
X = torch.linspace(-1, 1, 18).view(3, 6)
CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "batch_size": 4, "adapter_path": "adapters"}
CONFIG |= {"lora_parameters": {"rank": R, "scale": SCALE, "dropout": 0.0}}


def write(folder, **changes) -> None:
    tensors = {"model.layers.0.up_proj.lora_a": A, "model.layers.0.up_proj.lora_b": B}
    if changes.get("fine_tune_type") == "dora":
        tensors["model.layers.0.up_proj.m"] = M
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))


def model() -> nn.Module:
    torch.manual_seed(0)
    names = {name: nn.Linear(6, 4, bias=False) for name in ("up_proj", "gate_proj")}
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(names)])})})


@pytest.mark.fault("foreign adapter")
def test_lora_a_and_lora_b_are_transposed_and_scaled(tmp_path):
    write(tmp_path)
    mine = model().eval()
    config = load_adapter(mine, tmp_path)
    layer = adapters(mine)["model.layers.0.up_proj"]
    assert len(adapters(mine)) == 1 and (config["r"], config["lora_alpha"]) == (R, R * SCALE)
    torch.testing.assert_close(layer(X), layer.base_layer(X) + SCALE * (X @ A) @ B)


def test_m_holds_the_norms_of_dora(tmp_path):
    write(tmp_path, fine_tune_type="dora")
    mine = model().eval()
    load_adapter(mine, tmp_path)
    layer = adapters(mine)["model.layers.0.up_proj"]
    adapted = layer.base_layer.weight + SCALE * (A @ B).T
    expected = X @ adapted.T * (M / adapted.norm(dim=1))
    torch.testing.assert_close(layer(X), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fine_tune_type": "full"}, "fine_tune_type: 'full': .*mlx_lm.fuse"),
        ({"lora_parameters": {"rank": R}}, "lora_parameters: .*rank and scale"),
        ({"lora_parameters": None}, "lora_parameters: .*rank and scale"),
        ({"lora_parameters": {"rank": "2", "scale": 1.0}}, "lora_parameters: .*rank and scale"),
        ({"lora_parameters": {"rank": 2**40, "scale": "x"}}, "lora_parameters: .*rank and scale"),
        ({"lora_parameters": {"rank": 10**400, "scale": 1.0}}, "lora_parameters: .*rank and scale"),
        ({"lora_parameters": {"rank": 10**9, "scale": 1e-9}}, "r: 1000000000 is above"),
    ],
)
def test_what_is_no_adapter_of_mlx_lm_is_refused_by_its_key(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json:\\s*{message}"):
        load_adapter(model(), tmp_path)
