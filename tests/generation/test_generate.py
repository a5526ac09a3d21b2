"""Generation and generate.py: parity with uncached decoding and transformers, and distributions by hand."""

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate as script
from generation.cache import KVCache
from generation.generate import _matmul_settings, generate
from generation.sampling import Sampling, distribution, greedy, sample
from model.chat_template import save_tokenizer
from model.config import FULL, SLIDING, parse_config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import save_model
from tests.generation.small import WINDOW, small_model, texts


def ids(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


@torch.no_grad()
def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    """Runs the model on the whole text for every new token."""
    text = list(prompt)
    for _ in range(count):
        n = len(text)
        hidden = model(torch.tensor(text), torch.arange(n), torch.tensor([0, n]), reference=True)
        text.append(int(model.logits(hidden[-1:]).argmax()))
    return text[len(prompt) :]


def test_greedy_generation_equals_uncached_decoding():
    model = small_model()
    prompts = texts([5, 1, 30])
    got = generate(model, prompts, max_new_tokens=3 * WINDOW, stop_ids=())
    assert ids(got) == [greedy_without_cache(model, p, 3 * WINDOW) for p in prompts]
    assert [c.stop_reason for c in got] == ["length"] * 3
    assert len(set(got[0].token_ids)) > 4, "a model that repeats one token tests nothing"


NUCLEUS = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, NUCLEUS])
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(sampling):
    model = small_model()
    prompts = texts([17, 3, 9, 40, 9, 1, 26])
    settings = {"max_new_tokens": 30, "stop_ids": {4, 9, 31}, **sampling}  # Some rows end early.
    together = generate(model, prompts, **settings)
    assert together == generate(model, prompts, batch_size=3, **settings)
    assert len({len(c.token_ids) for c in together}) > 2
    for row, prompt in enumerate(prompts):
        # A prompt's random numbers depend on its index, so others stand before it.
        assert generate(model, [[row]] * row + [prompt], batch_size=1, **settings)[row] == together[row]


@pytest.fixture(scope="module")
def queue() -> tuple[list, list, set]:
    """Prompts with one instruction, the answer of each one alone without a cache, and the stop ids."""
    (instruction,) = texts([20])
    prompts = [instruction + own for own in texts([1 + i * 7 % 23 for i in range(20)])]
    model, stop_ids = small_model(), {4, 9, 31}
    alone = [greedy_without_cache(model, prompt, 16) for prompt in prompts]
    answers = [row[: next((i for i, token in enumerate(row) if token in stop_ids), None)] for row in alone]
    assert len({len(row) for row in answers}) > 5, "rows end at different steps"
    return prompts, answers, stop_ids


@pytest.mark.parametrize("slots", [1, 2, 4, 64])
def test_a_prompt_in_the_slot_of_a_finished_row_is_answered_as_if_alone(monkeypatch, queue, slots):
    """In total, less than a quarter of the slots of all steps are empty: they are refilled or dropped."""
    prompts, answers, stop_ids = queue
    fed, finished = [], []
    advance = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda cache: fed.append(len(cache.lengths)) or advance(cache))
    settings = {"max_new_tokens": 16, "stop_ids": stop_ids, "batch_size": slots}
    got = generate(small_model(), prompts, on_done=lambda row, _: finished.append(row), **settings)
    assert ids(got) == answers and sorted(finished) == list(range(20))
    # A row's first token comes from the prefill, all others from steps.
    used = sum(len(c.token_ids) - (c.stop_reason == "length") for c in got)
    assert 0.75 * sum(fed) <= used <= sum(fed)


def test_matmul_settings_of_a_single_row_on_a_cpu_disable_onednn_and_change_only_the_rounding():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 640), (256, 640)))
    expected = torch.nn.functional.linear(x.double(), weight.double())
    with _matmul_settings(2, torch.device("cpu")):
        assert torch.backends.mkldnn.enabled
        plain = torch.nn.functional.linear(x, weight)
    with _matmul_settings(1, torch.device("cpu")):
        assert not torch.backends.mkldnn.enabled
        alone = torch.nn.functional.linear(x, weight)
    assert torch.backends.mkldnn.enabled
    for got in (plain, alone):
        torch.testing.assert_close(got.double(), expected, atol=1e-2, rtol=2**-8)


def test_prompts_that_exceed_one_prefill_stream_are_read_in_several(monkeypatch):
    model = small_model()
    prompts = texts([17, 3, 9, 40, 9, 1, 26])
    expected = generate(model, prompts, max_new_tokens=12, stop_ids=())
    monkeypatch.setattr("generation.generate.PREFILL_TOKENS", 20)
    assert generate(model, prompts, max_new_tokens=12, stop_ids=()) == expected


@pytest.mark.parametrize("own", [[[], [3], [5, 6, 7], [8] * 15, [3]], [[3] * 6, [4] * 9, [3, 5] * 7]])
@pytest.mark.parametrize("stream", [4096, 40])
def test_prompts_with_one_instruction_get_the_answers_that_each_gets_alone(monkeypatch, stream, own):
    monkeypatch.setattr("generation.generate.PREFILL_TOKENS", stream)
    model = small_model()
    (instruction,) = texts([20])
    prompts = [instruction + rest for rest in own]
    got = ids(generate(model, prompts, max_new_tokens=12, stop_ids=()))
    assert got == [greedy_without_cache(model, p, 12) for p in prompts]


def test_greedy_ids_equal_transformers_past_the_window_and_the_sixth_layer():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    more = {"sliding_window": 16, "max_position_embeddings": 256, "tie_word_embeddings": False}
    config = transformers.Gemma3TextConfig(**sizes, **heads, **more, initializer_range=0.2)
    theirs = transformers.Gemma3ForCausalLM(config).eval()
    ours = Gemma3ForCausalLM(parse_config(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(ours.config.layer_types) == {SLIDING, FULL}
    prompts = texts([21, 7], vocab=128)
    got = ids(generate(ours, prompts, max_new_tokens=64, stop_ids=()))
    for prompt, new in zip(prompts, got, strict=True):
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
        (expected,) = theirs.generate(torch.tensor([prompt]), **settings).tolist()
        assert prompt + new == expected
    assert len(set(got[0])) > 4


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.3, 0.2]])


def test_top_k_and_top_p_worked_by_hand():
    """top_k = 3 keeps 0.4, 0.3, 0.2 as 4/9, 3/9, 2/9; top_p = 0.7 then keeps the first two, 7/9 in all."""
    logits = PROBABILITIES.log()
    probs, ids = distribution(logits, Sampling(temperature=1.0))
    assert ids is None
    torch.testing.assert_close(probs, PROBABILITIES)
    probs, ids = distribution(logits, Sampling(temperature=1.0, top_k=3))
    assert ids.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(probs, torch.tensor([[4 / 9, 3 / 9, 2 / 9]]))
    probs, ids = distribution(logits, Sampling(temperature=1.0, top_k=3, top_p=0.7))
    torch.testing.assert_close(probs, torch.tensor([[4 / 9, 3 / 9, 0.0]]))
    probs, ids = distribution(logits, Sampling(temperature=1.0, top_p=0.75))
    assert ids.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(probs, torch.tensor([[0.4, 0.3, 0.2, 0.0]]))
    probs, _ = distribution(logits, Sampling(temperature=1.0, top_p=0.01))
    assert probs.count_nonzero() == 1, "the token with the highest probability always stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_over_chunks_of_the_head_equals_the_argmax_of_all_logits(monkeypatch, dtype):
    """61 vocabulary entries in chunks of 7, the last of 5; of equal logits, both take the first."""
    monkeypatch.setattr("generation.sampling.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (200, 6), generator=generator).to(dtype)
    head = torch.randint(-2, 3, (61, 6), generator=generator).to(dtype)
    logits = hidden @ head.T
    assert ((logits == logits.max(-1, keepdim=True).values).sum(-1) > 1).any()
    expected = sample(logits, Sampling(), None)
    assert len(expected.unique()) > 20 and torch.equal(greedy(hidden, head), expected)


def test_temperature_raises_probabilities_to_the_power_of_its_inverse():
    probs, _ = distribution(PROBABILITIES.log(), Sampling(temperature=0.5))
    torch.testing.assert_close(probs, PROBABILITIES**2 / (PROBABILITIES**2).sum())


def test_inverse_cdf_takes_the_first_id_whose_cumulative_probability_exceeds_u():
    """The cumulative probabilities are 0.1, 0.5, 0.8 and 1."""
    logits = PROBABILITIES.log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.05, 0.15, 0.6, 0.85, 1 - 2**-24])
    assert sample(logits, Sampling(temperature=1.0), uniform).tolist() == [0, 0, 1, 2, 3, 3]
    # top_k = 2 keeps ids 1 and 2: 4/7 and 1. top_p = 0.75 keeps ids 1, 2, 3: 4/9, 7/9 and 1.
    assert sample(logits, Sampling(temperature=1.0, top_k=2), uniform).tolist() == [1, 1, 1, 2, 2, 2]
    assert sample(logits, Sampling(temperature=1.0, top_p=0.75), uniform).tolist() == [1, 1, 1, 2, 3, 3]


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert sample(logits, Sampling(temperature=1.0), uniform).tolist() == [1, 3, 3]


def test_the_frequencies_of_samples_are_their_probabilities():
    sampling = Sampling(temperature=1.0, seed=3)
    uniform = sampling.uniforms(0, 20_000)
    counts = sample(PROBABILITIES.log().expand(20_000, 4), sampling, uniform).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, PROBABILITIES[0], atol=0.015, rtol=0)


SAMPLED = {"max_new_tokens": 20, "stop_ids": (), "temperature": 1.0}


def test_the_same_seed_gives_the_same_ids_and_another_seed_others():
    model, prompts = small_model(), texts([6, 6])
    runs = [ids(generate(model, prompts, seed=seed, **SAMPLED)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_rest_of_a_list_of_prompts_is_sampled_as_in_the_whole_list():
    model, prompts = small_model(), texts([6, 9, 7, 8])
    whole = ids(generate(model, prompts, **SAMPLED))
    assert ids(generate(model, prompts[1::2], numbers=[1, 3], **SAMPLED)) == whole[1::2]


def test_samples_of_equal_prompts_differ_and_their_greedy_ids_do_not():
    model = small_model()
    (prompt,) = texts([12])
    sampled = ids(generate(model, [prompt] * 4, **SAMPLED))
    assert len(set(map(tuple, sampled))) == 4
    greedy = ids(generate(model, [prompt] * 4, max_new_tokens=20, stop_ids=()))
    assert greedy == [greedy_without_cache(model, prompt, 20)] * 4


def test_a_stop_id_ends_its_row_is_not_in_the_ids_and_does_not_end_others():
    model = small_model()
    prompts = texts([6, 7, 8])
    unstopped = ids(generate(model, prompts, max_new_tokens=24, stop_ids=()))
    stop = unstopped[1][5]
    ends = [row.index(stop) if stop in row else None for row in unstopped]
    assert None in ends, "choose other weights: some row must reach the limit"
    got = generate(model, prompts, max_new_tokens=24, stop_ids={stop})
    for completion, row, n in zip(got, unstopped, ends, strict=True):
        reason = ("length", None) if n is None else ("stop", stop)
        assert completion.token_ids == row[:n] and (completion.stop_reason, completion.stop_id) == reason


def test_the_callbacks_get_every_new_token_and_every_finished_prompt_once():
    tokens, done = {0: [], 1: [], 2: []}, {}
    got = generate(
        small_model(),
        texts([9, 4, 6]),
        max_new_tokens=15,
        stop_ids={4, 9, 31},
        batch_size=2,
        on_token=lambda row, token: tokens[row].append(token),
        on_done=lambda row, completion: done.setdefault(row, completion.token_ids),
    )
    assert list(tokens.values()) == ids(got)
    assert [done[row] for row in range(3)] == ids(got)


def test_limits_by_ratio_and_by_the_models_positions():
    model = small_model(max_position_embeddings=32)
    got = generate(model, texts([1, 10, 30]), max_new_tokens=12, stop_ids=(), max_new_ratio=0.55)
    assert [len(c.token_ids) for c in got] == [1, 6, 2]


def test_training_mode_of_every_module_is_restored_even_after_an_exception():
    model = small_model().train()
    model.model.layers[3].eval()
    modes = [m.training for m in model.modules()]

    def fail(row, token):
        assert not any(m.training for m in model.modules())
        raise KeyError

    with pytest.raises(KeyError):
        generate(model, texts([4]), max_new_tokens=2, stop_ids=(), on_token=fail)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_generating_under_the_autocast_of_a_training_step_keeps_gradients_working():
    model = small_model()
    text = torch.tensor(texts([6])[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, [text.tolist()], max_new_tokens=2, stop_ids=())
        model.logits(model(text, torch.arange(6), torch.tensor([0, 6]))).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_arguments_and_prompts_are_all_named_in_one_error():
    bad = {"max_new_tokens": 0, "temperature": -1.0, "top_p": 0.0}
    with pytest.raises(ValueError) as error:
        generate(small_model(), [[], [1], [61], [1] * 256], stop_ids=(), **bad)
    for part in ("temperature", "top_p", "max_new_tokens", "prompt 0", "prompt 2", "prompt 3"):
        assert part in str(error.value)
    assert "prompt 1 " not in str(error.value)


def test_no_prompts_give_no_completions():
    assert generate(small_model(), [], max_new_tokens=3, stop_ids=()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model folder with random weights and tiny's tokenizer, for generate.py."""
    path = tmp_path_factory.mktemp("model")
    save_model(small_model(vocab_size=Tokenizer(TINY).vocab_size), path, torch.float32)
    save_tokenizer(Tokenizer(TINY), path)
    return str(path)


def arguments(folder: str, *more: str) -> list[str]:
    return ["--model", folder, "--dtype", "float32", "--max-new-tokens", "6", *more]


def test_help_does_not_load_torch_and_takes_a_second():
    started, root = time.perf_counter(), Path(script.__file__).parent
    code = "import sys, generate\ntry: generate.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "--adapter" in done.stdout, done.stderr
    assert time.perf_counter() - started < 5, "it takes a second on an idle machine"


def test_json_gives_the_text_ids_and_stop_reason_of_the_chat_prompt(folder, capsys):
    tokenizer = Tokenizer(folder)
    assert script.main(arguments(folder, "--prompt", "Hello", "--json")) == 0
    got = json.loads(capsys.readouterr().out)
    model = small_model(vocab_size=tokenizer.vocab_size)
    assert got["token_ids"] == greedy_without_cache(model, tokenizer.render_prompt([("user", "Hello")]), 6)
    assert (got["text"], got["stop_reason"]) == (tokenizer.decode(got["token_ids"]), "length")


def test_raw_continues_bos_and_the_text_without_a_chat_template(folder, capsys):
    tokenizer = Tokenizer(folder)
    assert script.main(arguments(folder, "--prompt", "Hello", "--raw")) == 0
    model = small_model(vocab_size=tokenizer.vocab_size)
    expected = greedy_without_cache(model, [tokenizer.bos_id, *tokenizer.encode("Hello")], 6)
    assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"


def test_the_chat_keeps_the_conversation_and_ends_with_the_input(folder, capsys, monkeypatch):
    prompts, complete = [], script.Bot.complete

    def record(bot, prompt, *args, **kwargs):
        prompts.append(prompt)
        return complete(bot, prompt, *args, **kwargs)

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd then?\n"))
    monkeypatch.setattr(script.Bot, "complete", record)
    assert script.main(arguments(folder)) == 0
    tokenizer = Tokenizer(folder)
    first = tokenizer.render_prompt([("user", "Hello")])
    assert prompts[0] == first and len(prompts) == 2
    assert prompts[1][: len(first)] == first and tokenizer.decode(prompts[1]).count("And then?") == 1


def test_text_streamed_to_a_terminal_equals_text_written_to_a_file(folder, capsys, monkeypatch):
    script.main(arguments(folder, "--prompt", "Hello"))
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    script.main(arguments(folder, "--prompt", "Hello"))
    assert capsys.readouterr().out == whole


WRONG = [("--model", "no/such folder"), ("--adapter", "no"), ("--temperature", "-1"), ("--device", "no")]


@pytest.mark.parametrize("option, value", WRONG)
def test_wrong_input_is_one_message_and_exit_code_2(folder, capsys, option, value):
    assert script.main(arguments(folder, "--prompt", "Hello", option, value)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err


@pytest.mark.fault("stop")
def test_ctrl_c_is_exit_code_130(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Bot, "complete", interrupt)
    assert script.main(arguments(folder, "--prompt", "Hello")) == 130
