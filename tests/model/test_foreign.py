"""model/foreign.py: checkpoints that cannot be loaded are named for what they are, with a remedy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.weights import Checkpoint
from tests.folders import make_model

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS = {
    "bitsandbytes 4-bit": {"quantization_config": BNB},
    "gptq 8-bit": {"quantization_config": {"quant_method": "gptq", "bits": 8}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "MLX 4-bit": {"quantization": {"group_size": 64, "bits": 4}},
    "a classifier": {"architectures": ["Gemma3TextForSequenceClassification"]},
}
REMEDIES = {"a classifier": "whose response is the label", "not merged": "merge_and_unload()"}
QUANTIZED = "take the model that it was made from"
Q_PROJ = "model.layers.0.self_attn.q_proj"
TENSORS = {
    f"{Q_PROJ}.weight.absmax": "bitsandbytes",
    f"{Q_PROJ}.qweight": "quantized",
    f"{Q_PROJ}.weight_scale_inv": "quantized",
    f"{Q_PROJ}.lora_A.default.weight": "not merged",
    f"{Q_PROJ}.base_layer.weight": "not merged",
    "score.weight": "a classifier",
}


def refusal(folder) -> str:
    with pytest.raises(ValueError) as e:
        Checkpoint(folder)
    return str(e.value)


@pytest.mark.fault("quantized checkpoint")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_config_is_named_for_what_it_is_before_its_weights_are_read(tmp_path, kind, wrapped):
    raw = {"model_type": "gemma3", "text_config": {}} if wrapped else {"model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(raw | CONFIGS[kind]))
    message = refusal(tmp_path)
    assert kind in message and REMEDIES.get(kind, QUANTIZED) in message and "\n" not in message


@pytest.mark.fault("other checkpoint")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_kind_of_checkpoint_are_one_line(tmp_path, name):
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {name: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    kind, message = TENSORS[name], refusal(tmp_path)
    assert f"{name}: " in message and kind in message and REMEDIES.get(kind, QUANTIZED) in message
    assert "\n" not in message and "download" not in message


@pytest.mark.fault("other checkpoint")
def test_code_that_comes_with_a_checkpoint_does_not_run(tmp_path):
    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config | auto_map))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Checkpoint(tmp_path).load(torch.float32, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
