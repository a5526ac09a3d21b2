"""model/config.py: published configs are read as transformers reads them, and impossible ones are refused."""

import copy
import json

import pytest

from model.config import FULL, SLIDING, Gemma3Config, parse_config, read_config

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
    "architectures": ["Gemma3ForCausalLM"],
}
KINDS_270M = ([SLIDING] * 5 + [FULL]) * 3
LINEAR_8 = {"factor": 8.0, "rope_type": "linear"}


def heads(queries: int, keys: int) -> dict:
    return {"num_attention_heads": queries, "num_key_value_heads": keys}


def multimodal(hidden_size: int, intermediate_size: int, layers: int, **text) -> dict:
    """The published form: the text config holds only what differs from the class's defaults."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    text = {"model_type": "gemma3_text", "rope_scaling": LINEAR_8, "sliding_window": 1024} | sizes | text
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


PUBLISHED = {
    "270m": COMMON
    | {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "eos_token_id": 1,
        "_sliding_window_pattern": 6,
        "layer_types": KINDS_270M,
        "use_bidirectional_attention": False,
    },
    "1b": COMMON
    | {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "eos_token_id": [1, 106],
        "sliding_window_pattern": 6,
        "cache_implementation": "hybrid",
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    },
    "4b": multimodal(2560, 10240, 34),
    "12b": multimodal(3840, 15360, 48, **heads(16, 8)),
    "27b": multimodal(5376, 21504, 62, **heads(32, 16), head_dim=128, query_pre_attn_scalar=168),
}
SMALL = {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7}


def write(folder, raw):
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def reference_config(raw: dict):
    """transformers' Gemma3TextConfig of a config.json."""
    from transformers import Gemma3Config as Wrapper
    from transformers import Gemma3TextConfig

    raw = copy.deepcopy(raw)  # transformers changes its argument
    return Wrapper(**raw).text_config if raw["model_type"] == "gemma3" else Gemma3TextConfig(**raw)


def assert_same_architecture(ours: Gemma3Config, reference):
    elsewhere = {"rope_theta", "rope_local_base_freq", "rope_linear_factor", "eos_token_id"}
    for name in Gemma3Config.__dataclass_fields__.keys() - elsewhere:
        assert getattr(ours, name) == getattr(reference, name), name
    full, local = reference.rope_parameters[FULL], reference.rope_parameters[SLIDING]
    assert (ours.rope_theta, ours.rope_local_base_freq) == (full["rope_theta"], local["rope_theta"])
    assert ours.rope_linear_factor == (full["factor"] if full["rope_type"] == "linear" else 1.0)
    assert local["rope_type"] == "default"


# the same as transformers


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_published_old_style_config_is_read_as_transformers_reads_it(tmp_path, size):
    assert_same_architecture(read_config(write(tmp_path, PUBLISHED[size])), reference_config(PUBLISHED[size]))


@pytest.mark.parametrize("size", PUBLISHED)
def test_old_style_and_new_style_of_one_config_are_equal(tmp_path, size):
    old = read_config(write(tmp_path, PUBLISHED[size]))
    reference = reference_config(PUBLISHED[size])
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw and "rope_theta" not in raw, "this is the new style"
    new = read_config(tmp_path)
    new.eos_token_id = old.eos_token_id  # a key of the multimodal wrapper, which the text part does not have
    assert new == old


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_a_new_style_multimodal_config_equals_its_old_style(tmp_path, size):
    from transformers import Gemma3Config as Wrapper

    old = read_config(write(tmp_path, PUBLISHED[size]))
    Wrapper(**copy.deepcopy(PUBLISHED[size])).save_pretrained(tmp_path)
    new = read_config(tmp_path)
    assert_same_architecture(new, reference_config(PUBLISHED[size]))
    assert {**vars(new), "eos_token_id": 0} == {**vars(old), "eos_token_id": 0}


@pytest.mark.parametrize("size", PUBLISHED)
def test_what_we_write_is_read_back_equal_by_us_and_by_transformers(tmp_path, size):
    ours = read_config(write(tmp_path, PUBLISHED[size]))
    assert read_config(write(tmp_path, ours.to_json())) == ours
    assert_same_architecture(ours, reference_config(ours.to_json()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_meta_model_of_a_published_config_has_transformers_parameters(tmp_path, size):
    import torch
    from transformers import Gemma3ForCausalLM as Reference

    from model.gemma3 import Gemma3ForCausalLM

    with torch.device("meta"):
        ours = Gemma3ForCausalLM(read_config(write(tmp_path, PUBLISHED[size])))
        reference = Reference(reference_config(PUBLISHED[size]))
    shapes, expected = ({n: p.shape for n, p in m.named_parameters()} for m in (ours, reference))
    assert shapes == expected


# by hand


def test_the_sparse_4b_config_takes_its_missing_values_from_the_class(tmp_path):
    cfg = read_config(write(tmp_path, PUBLISHED["4b"]))
    heads = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    assert (cfg.vocab_size, *heads) == (262208, 8, 4, 256)
    assert (cfg.rope_theta, cfg.rope_local_base_freq, cfg.rope_linear_factor) == (1e6, 1e4, 8.0)
    assert (cfg.max_position_embeddings, cfg.sliding_window, cfg.eos_token_id) == (131072, 1024, [1, 106])
    assert cfg.layer_types == ([SLIDING] * 5 + [FULL]) * 5 + [SLIDING] * 4


def test_the_query_scale_of_27b_comes_from_its_own_key(tmp_path):
    assert read_config(write(tmp_path, PUBLISHED["27b"])).attention_scale == 168**-0.5
    assert read_config(write(tmp_path, PUBLISHED["270m"])).attention_scale == 1 / 16


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_every_nth_layer_is_global_where_only_the_pattern_is_given(key):
    assert parse_config(SMALL | {key: 3}).layer_types == [SLIDING, SLIDING, FULL] * 2 + [SLIDING]
    assert parse_config(SMALL).layer_types == [SLIDING] * 5 + [FULL, SLIDING]


def test_layer_types_win_over_the_pattern():
    kinds = [FULL, SLIDING] * 3 + [FULL]
    assert parse_config(SMALL | {"layer_types": kinds, "sliding_window_pattern": 6}).layer_types == kinds


def test_the_old_key_type_of_rope_scaling_is_read_too():
    assert parse_config(SMALL | {"rope_scaling": {"type": "linear", "factor": 4}}).rope_linear_factor == 4.0


def test_unknown_keys_are_left_alone():
    assert parse_config(SMALL | {"a_key_of_tomorrow": 1}) == parse_config(SMALL)


# refused


def rope(parameters) -> dict:
    return {"rope_parameters": parameters}


def error_of(folder) -> str:
    with pytest.raises(ValueError) as caught:
        read_config(folder)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


def test_a_missing_config_says_what_a_model_folder_holds(tmp_path):
    assert "no such file; a model folder holds config.json" in error_of(tmp_path)
    (tmp_path / "config.json").mkdir()
    assert "cannot be read (Is a directory); a model folder holds config.json" in error_of(tmp_path)


@pytest.mark.parametrize("raw", ["", "{", '{"model_type": "gemma3_text"', "\x00"])
def test_a_config_that_is_no_json_is_refused(tmp_path, raw):
    assert "not valid JSON" in error_of(write(tmp_path, raw))


@pytest.mark.parametrize("raw", [[], 3, "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, raw):
    assert "not a JSON object" in error_of(write(tmp_path, raw))


@pytest.mark.parametrize("model_type", [None, "llama", "gemma2", "gemma3n"])
def test_another_architecture_is_refused_by_name(tmp_path, model_type):
    message = error_of(write(tmp_path, {"model_type": model_type} if model_type else {}))
    assert "Loupe knows Gemma 3 only" in message and repr(model_type) in message


@pytest.mark.parametrize(
    "raw, problems",
    [
        (
            {"model_type": "gemma3_text", "hidden_size": 0, "head_dim": "256", "vocab_size": True},
            ["intermediate_size is missing", "num_hidden_layers is missing", "hidden_size is 0"]
            + ["head_dim is '256'", "vocab_size is True"],
        ),
        (
            SMALL | {"head_dim": 15, "hidden_activation": "silu", "rope_scaling": {"rope_type": "yarn"}},
            ["head_dim 15", "'silu'", "'yarn'"],
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": "7", "rope_scaling": {"rope_type": "linear"}}
            | {"layer_types": 5, "rope_theta": "x", "rms_norm_eps": "a", "head_dim": 15},
            ["hidden_size is missing", "num_hidden_layers is '7'", "factor of rope_scaling", "layer_types"]
            + ["rope_theta is 'x'", "rms_norm_eps", "15"],
        ),
    ],
    ids=["missing and impossible sizes", "impossible values", "wrong kinds and missing keys"],
)
def test_all_problems_are_in_one_error(tmp_path, raw, problems):
    message = error_of(write(tmp_path, raw))
    assert all(problem in message for problem in problems), message


def test_a_multimodal_config_without_its_text_part_lists_what_is_missing(tmp_path):
    message = error_of(write(tmp_path, {"model_type": "gemma3", "vision_config": {}}))
    assert "hidden_size is missing" in message and "num_hidden_layers is missing" in message


@pytest.mark.fault("impossible size")
@pytest.mark.parametrize(
    "change, problem",
    [
        ({"layer_types": [FULL]}, "layer_types must list 7 times"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types must list 7 times"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({"use_bidirectional_attention": True}, "EmbeddingGemma"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "rope_scaling has the type 'yarn'"),
        ({"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, "rope_parameters has the type 'dynamic'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_impossible_architecture_is_refused_by_key_and_value(tmp_path, change, problem):
    assert problem in error_of(write(tmp_path, SMALL | change))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is None; it must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -8}}, "factor of rope_scaling is -8"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be an object"),
        ({"rope_theta": "x"}, "rope_theta is 'x'; it must be a number above 0"),
        (rope({FULL: {"rope_theta": "x"}}), "rope_theta of full_attention of rope_parameters is 'x'"),
        (rope({SLIDING: {"rope_theta": 0}}), "rope_theta of sliding_attention of rope_parameters is 0"),
        (rope({SLIDING: LINEAR_8}), "sliding_attention of rope_parameters has the type 'linear'"),
        (rope(LINEAR_8 | {"rope_theta": 1e6}), "it must be an object with the keys 'full_attention' and"),
        (rope(3), "rope_parameters is 3"),
        (rope({FULL: "linear"}), "full_attention of rope_parameters is 'linear'"),
        ({"layer_types": 5}, "layer_types must list 7 times"),
        ({"layer_types": [[FULL]] * 7}, "layer_types must list 7 times"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern is '6'"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps is 'a'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        pytest.param({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000", id="rms_norm_eps 10^400"),
        pytest.param({"rope_theta": 10**400}, "rope_theta is 1000", id="rope_theta 10^400"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number from 1 to 16,777,216"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"eos_token_id": [1, "<end_of_turn>"]}, "eos_token_id is [1, '<end_of_turn>']"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_by_key_and_value(tmp_path, change, problem):
    assert problem in error_of(write(tmp_path, SMALL | change))


@pytest.mark.parametrize("text", [[1], "x", 3])
def test_a_text_config_that_is_no_object_is_refused(tmp_path, text):
    assert "text_config is" in error_of(write(tmp_path, {"model_type": "gemma3", "text_config": text}))


@pytest.mark.fault("impossible size")
def test_sizes_that_are_possible_alone_and_too_many_parameters_together_are_refused():
    sizes = {"hidden_size": 2**24, "vocab_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 1000}
    with pytest.raises(ValueError, match="make about 8e.17 parameters; at most 1e.13"):
        parse_config(sizes)


@pytest.mark.parametrize("text", ['{"a":' * 50_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_nested_or_long_beyond_pythons_limits_is_one_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_config(tmp_path)
