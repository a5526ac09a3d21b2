"""Generation against the model run anew for every token, against transformers, and distributions worked by
hand.
"""

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
from model.config import FULL, SLIDING, parse_config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import copy_tokenizer, save_model
from tests.generation.small import WINDOW, small_model, texts


def ids(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


@torch.no_grad()
def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    """The slow one: the whole text through the model for every token."""
    text = list(prompt)
    for _ in range(count):
        n = len(text)
        hidden = model(torch.tensor(text), torch.arange(n), torch.tensor([0, n]), reference=True)
        text.append(int(model.logits(hidden[-1:]).argmax()))
    return text[len(prompt) :]


def test_greedy_generation_equals_the_model_run_anew_for_every_token():
    model = small_model()
    prompts = texts([5, 1, 30])
    got = generate(model, prompts, max_new_tokens=3 * WINDOW, stop_ids=())
    assert ids(got) == [greedy_without_cache(model, p, 3 * WINDOW) for p in prompts]
    assert [c.stop_reason for c in got] == ["length"] * 3
    assert len(set(got[0].token_ids)) > 4, "a model that repeats one token would prove nothing"


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7}]
)
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(how):
    model = small_model()
    prompts = texts([17, 3, 9, 40, 9, 1, 26])
    stop_ids = {4, 9, 31}  # some rows end early, so that rows leave the batch
    together = generate(model, prompts, max_new_tokens=30, stop_ids=stop_ids, **how)
    by_three = generate(model, prompts, max_new_tokens=30, stop_ids=stop_ids, batch_size=3, **how)
    assert together == by_three
    assert len({len(c.token_ids) for c in together}) > 2
    for row, prompt in enumerate(
        prompts
    ):  # the prompt keeps its number, which its random numbers hang on; the others are filled with another
        alone = generate(
            model, [[row]] * row + [prompt], max_new_tokens=30, stop_ids=stop_ids, batch_size=1, **how
        )
        assert alone[row] == together[row]


@pytest.fixture(scope="module")
def queue() -> tuple[list, list, set]:
    """Prompts behind one instruction, their answers when each is alone and run without a cache, and the stop
    ids, which end them at different steps.
    """
    (instruction,) = texts([20])
    prompts = [instruction + own for own in texts([1 + i * 7 % 23 for i in range(20)])]
    model, stop_ids = small_model(), {4, 9, 31}
    alone = [greedy_without_cache(model, prompt, 16) for prompt in prompts]
    answers = [row[: next((i for i, token in enumerate(row) if token in stop_ids), None)] for row in alone]
    assert len({len(row) for row in answers}) > 5
    return prompts, answers, stop_ids


@pytest.mark.parametrize("places", [1, 2, 4, 64])
def test_a_prompt_that_takes_a_finished_rows_place_is_answered_as_if_alone(monkeypatch, queue, places):
    """All tokens but a row's first come from steps; in none of these is a quarter of the places empty, for
    they are taken anew or dropped.
    """
    prompts, answers, stop_ids = queue
    fed, finished = [], []
    advance = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda cache: fed.append(len(cache.lengths)) or advance(cache))
    got = generate(
        small_model(),
        prompts,
        max_new_tokens=16,
        stop_ids=stop_ids,
        batch_size=places,
        on_done=lambda row, _: finished.append(row),
    )
    assert ids(got) == answers and sorted(finished) == list(range(20))
    worth = sum(len(c.token_ids) - (c.stop_reason == "length") for c in got)
    assert 0.75 * sum(fed) <= worth <= sum(fed)


def test_a_lone_rows_matmul_settings_on_a_cpu_pass_by_oneDNN_and_are_the_same_up_to_rounding():
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


def test_prompts_longer_than_one_stream_are_read_in_several(monkeypatch):
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
    assert ids(generate(model, prompts, max_new_tokens=12, stop_ids=())) == [
        greedy_without_cache(model, p, 12) for p in prompts
    ]


def test_greedy_ids_equal_transformers_past_the_window_and_the_sixth_layer():
    import transformers

    torch.manual_seed(0)
    theirs = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=8,
            vocab_size=128,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ).eval()
    ours = Gemma3ForCausalLM(parse_config(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(ours.config.layer_types) == {SLIDING, FULL}
    prompts = texts([21, 7], vocab=128)
    expected = [
        theirs.generate(torch.tensor([p]), max_new_tokens=64, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    assert ids(generate(ours, prompts, max_new_tokens=64, stop_ids=())) == expected
    assert len(set(expected[0])) > 4


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.3, 0.2]])


def test_top_k_and_top_p_worked_by_hand():
    """0.4, 0.3, 0.2, 0.1 in order.

    top_k = 3 leaves 4/9, 3/9, 2/9; of these top_p = 0.7 needs the first two (7/9), while 4/9 alone is too
    little.
    """
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
    assert probs.count_nonzero() == 1, "the likeliest token always stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_of_a_head_in_pieces_is_the_likeliest_of_all_logits(monkeypatch, dtype):
    """Pieces of 7 of 61 words, the last of 5; bfloat16 has ties, of which both take the first."""
    monkeypatch.setattr("generation.sampling.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in ((200, 6), (61, 6))
    )
    logits = hidden @ head.T
    assert ((logits == logits.max(-1, keepdim=True).values).sum(-1) > 1).any()
    expected = sample(logits, Sampling(), None)
    assert len(expected.unique()) > 20 and torch.equal(greedy(hidden, head), expected)


def test_temperature_sharpens_as_a_power():
    probs, _ = distribution(PROBABILITIES.log(), Sampling(temperature=0.5))
    torch.testing.assert_close(probs, PROBABILITIES**2 / (PROBABILITIES**2).sum())


def test_inverse_cdf_takes_the_first_id_whose_cumulative_probability_exceeds_u():
    """Cumulative: id 0 up to 0.1, id 1 up to 0.5, id 2 up to 0.8, id 3 up to 1."""
    logits = PROBABILITIES.log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.05, 0.15, 0.6, 0.85, 1 - 2**-24])
    assert sample(logits, Sampling(temperature=1.0), uniform).tolist() == [0, 0, 1, 2, 3, 3]
    # top_k = 2 leaves id 1 up to 4/7, id 2 up to 1. top_p = 0.75 leaves 0.4, 0.3, 0.2 of 0.9: u = 0.6 means
    # 0.54, in id 2; 0.85 means 0.765, in id 3.
    assert sample(logits, Sampling(temperature=1.0, top_k=2), uniform).tolist() == [1, 1, 1, 2, 2, 2]
    assert sample(logits, Sampling(temperature=1.0, top_p=0.75), uniform).tolist() == [1, 1, 1, 2, 3, 3]


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, 5)
    assert sample(logits, Sampling(temperature=1.0), torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [
        1,
        3,
        3,
    ]


def test_samples_come_as_often_as_their_probability_says():
    sampling = Sampling(temperature=1.0, seed=3)
    uniform = sampling.uniforms(0, 20_000)
    counts = sample(PROBABILITIES.log().expand(20_000, 4), sampling, uniform).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, PROBABILITIES[0], atol=0.015, rtol=0)


def test_same_seed_same_ids_and_another_seed_others():
    model = small_model()
    prompts = texts([6, 6])
    runs = [
        ids(generate(model, prompts, max_new_tokens=20, stop_ids=(), temperature=1.0, seed=s))
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_prompts_that_are_left_of_a_list_are_sampled_as_in_the_whole_list():
    model = small_model()
    prompts = texts([6, 9, 7, 8])
    whole, part = (
        ids(generate(model, p, max_new_tokens=20, stop_ids=(), temperature=1.0, numbers=n))
        for p, n in ((prompts, None), (prompts[1::2], [1, 3]))
    )
    assert part == whole[1::2]


def test_equal_prompts_are_sampled_apart_and_decoded_alike():
    model = small_model()
    (prompt,) = texts([12])
    sampled = ids(generate(model, [prompt] * 4, max_new_tokens=20, stop_ids=(), temperature=1.0))
    assert len(set(map(tuple, sampled))) == 4
    greedy = ids(generate(model, [prompt] * 4, max_new_tokens=20, stop_ids=()))
    assert greedy == [greedy_without_cache(model, prompt, 20)] * 4


def test_a_stop_id_ends_its_row_and_stays_out_of_the_ids_while_others_go_on():
    model = small_model()
    prompts = texts([6, 7, 8])
    free = ids(generate(model, prompts, max_new_tokens=24, stop_ids=()))
    stop = free[1][5]
    cut = [row.index(stop) if stop in row else None for row in free]
    assert None in cut, "choose other weights: some row must go on to the limit"
    got = generate(model, prompts, max_new_tokens=24, stop_ids={stop})
    for completion, row, n in zip(got, free, cut, strict=True):
        assert completion.token_ids == row[:n]
        assert (completion.stop_reason, completion.stop_id) == (
            ("length", None) if n is None else ("stop", stop)
        )


def test_every_new_token_and_every_finished_prompt_is_called_back_once():
    model = small_model()
    heard, told = {0: [], 1: [], 2: []}, {}
    got = generate(
        model,
        texts([9, 4, 6]),
        max_new_tokens=15,
        stop_ids={4, 9, 31},
        batch_size=2,
        on_token=lambda row, token: heard[row].append(token),
        on_done=lambda row, completion: told.setdefault(row, completion.token_ids),
    )
    assert list(heard.values()) == ids(got)
    assert [told[row] for row in range(3)] == ids(got)


def test_limits_by_ratio_and_by_the_models_positions():
    model = small_model(max_position_embeddings=32)
    got = generate(model, texts([1, 10, 30]), max_new_tokens=12, stop_ids=(), max_new_ratio=0.55)
    assert [len(c.token_ids) for c in got] == [1, 6, 2]


def test_training_mode_of_every_module_comes_back_even_after_an_exception():
    model = small_model().train()
    model.model.layers[3].eval()  # a part that its owner had frozen
    modes = [m.training for m in model.modules()]

    def fail(row, token):
        assert not any(m.training for m in model.modules())
        raise KeyError("from the callback")

    with pytest.raises(KeyError):
        generate(model, texts([4]), max_new_tokens=2, stop_ids=(), on_token=fail)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_generating_inside_a_training_steps_autocast_leaves_the_gradients_alone():
    model = small_model()
    text = torch.tensor(texts([6])[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, [text.tolist()], max_new_tokens=2, stop_ids=())
        model.logits(model(text, torch.arange(6), torch.tensor([0, 6]))).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bad_arguments_and_prompts_are_all_named_in_one_error():
    with pytest.raises(ValueError) as error:
        generate(
            small_model(),
            [[], [1], [61], [1] * 256],
            max_new_tokens=0,
            stop_ids=(),
            temperature=-1.0,
            top_p=0.0,
        )
    for part in ("temperature", "top_p", "max_new_tokens", "prompt 0", "prompt 2", "prompt 3"):
        assert part in str(error.value)
    assert "prompt 1 " not in str(error.value)


def test_no_prompts_no_completions():
    assert generate(small_model(), [], max_new_tokens=3, stop_ids=()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model folder with random weights and the embedded model's tokenizer, for the script."""
    path = tmp_path_factory.mktemp("model")
    save_model(small_model(vocab_size=Tokenizer(TINY).vocab_size), path, torch.float32)
    copy_tokenizer(TINY, path)
    return str(path)


def ask(folder: str, *words: str) -> list[str]:
    return ["--model", folder, "--dtype", "float32", "--max-new-tokens", "6", *words]


def test_help_comes_in_a_second_since_torch_is_not_loaded():
    started = time.perf_counter()
    code = "import sys, generate\ntry: generate.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(script.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--adapter" in done.stdout, done.stderr
    assert time.perf_counter() - started < 5  # a second on an idle machine


def test_json_gives_the_text_ids_and_stop_reason_of_the_chat_prompt(folder, capsys):
    tokenizer = Tokenizer(folder)
    assert script.main(ask(folder, "--prompt", "Hello", "--json")) == 0
    got = json.loads(capsys.readouterr().out)
    model = small_model(vocab_size=tokenizer.vocab_size)
    assert got["token_ids"] == greedy_without_cache(model, tokenizer.render_prompt([("user", "Hello")]), 6)
    assert (got["text"], got["stop_reason"]) == (tokenizer.decode(got["token_ids"]), "length")


def test_raw_continues_bos_and_the_text_without_turns(folder, capsys):
    tokenizer = Tokenizer(folder)
    assert script.main(ask(folder, "--prompt", "Hello", "--raw")) == 0
    model = small_model(vocab_size=tokenizer.vocab_size)
    expected = greedy_without_cache(model, [tokenizer.bos_id, *tokenizer.encode("Hello")], 6)
    assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"


def test_the_chat_remembers_the_conversation_and_ends_with_the_input(folder, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd then?\n"))
    complete = script.Bot.complete
    monkeypatch.setattr(
        script.Bot,
        "complete",
        lambda bot, prompt, *how, **more: asked.append(prompt) or complete(bot, prompt, *how, **more),
    )
    assert script.main(ask(folder)) == 0
    tokenizer = Tokenizer(folder)
    first = tokenizer.render_prompt([("user", "Hello")])
    assert asked[0] == first and len(asked) == 2
    assert asked[1][: len(first)] == first and tokenizer.decode(asked[1]).count("And then?") == 1


def test_text_that_streams_to_a_terminal_is_the_text_that_goes_to_a_file(folder, capsys, monkeypatch):
    script.main(ask(folder, "--prompt", "Hello"))
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    script.main(ask(folder, "--prompt", "Hello"))
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "no/such folder"],
        ["--adapter", "no-such"],
        ["--temperature", "-1"],
        ["--device", "no-such"],
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(folder, capsys, words):
    assert script.main(ask(folder, "--prompt", "Hello", *words)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err


def test_ctrl_c_is_exit_code_130(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Bot, "complete", interrupt)
    assert script.main(ask(folder, "--prompt", "Hello")) == 130
