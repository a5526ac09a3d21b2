"""training/objectives/grpo.py: the loss by loops, its invariants, and what is sampled and left out."""

import math
from types import SimpleNamespace

import pytest
import torch

from common.device import Precision
from data.packing import pack
from data.rows import Sample
from generation.generate import Completion
from generation.load import LoadedModel
from lora.inject import adapter_state, with_adapter_state
from model.tokenizer import Tokenizer
from tests.makers import embedded, tiny_model, write_tokenizer
from training import loop
from training.config import GRPO
from training.objectives import grpo
from training.objectives.grpo import GroupRelativePolicyOptimization, clipped_loss, group_advantages, k3
from training.optim import make_optimizers

CPU = Precision("fp32", torch.device("cpu"))
SAMPLES = [
    Sample(f"rows.jsonl:{n}", (("user", text), ("assistant", "yes")))
    for n, text in enumerate(["Say yes, please.", "Is it so? Say it.", "Say yes once more, please."], 1)
]


class Scored:
    """Stands for training.objectives.rewards.Rewards: one function of a text."""

    names, files, gold_readers = ["scored"], (), ()

    def __init__(self, function=len):
        self.function = function

    def __call__(self, prompts, completions, golds, ended):
        values = [float(self.function(text)) for text in completions]
        return values, {"scored": values}


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


def objective(model, tokenizer, rewards=None, **settings) -> GroupRelativePolicyOptimization:
    settings = {"num_generations": 4, "max_completion_length": 6, "seed": 0} | settings
    seed = settings.pop("seed")
    made = GroupRelativePolicyOptimization(GRPO(**settings), rewards or Scored(), seed=seed)
    base = LoadedModel(model, tokenizer, None, CPU)
    made.begin(base, SAMPLES, [], "start")
    return made


def prompts(tokenizer, method, samples=SAMPLES, vocab_size=400):
    return pack(method.documents(samples, tokenizer, 400, "error", vocab_size)[0])


# Token ids of four completions of two prompts, made by a model of long ago.
GROUPS = [([3, 9, 7, 20, 8], [[11, 12, 13], [14]]), ([5, 6, 30], [[11, 31, 12, 13, 40], [16, 17]])]
REWARDS = torch.tensor([[0.1, 0.9], [1.0, 0.25]])


def given(method, model, shift=0.3):
    """Returns the batch of GROUPS, whose old and reference log-probabilities are not the model's."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    prompts = [prompt for prompt, group in GROUPS for _ in group]
    done = [Completion(ids, "length", None, [0.0] * len(ids)) for _, group in GROUPS for ids in group]
    batch = method._batch(prompts, done, REWARDS.to(dtype), {}, list("abcd"))
    with torch.no_grad():
        now = grpo.target_log_probs(model, batch, method.settings.temperature)[0]
    noise = torch.randn(2, len(now), generator=generator, dtype=dtype)
    batch.old, batch.reference = (
        now + shift * noise[0],
        now + 0.3 * noise[1] if method.settings.beta else None,
    )
    return batch


def naive_loss(model, batch, s: GRPO) -> torch.Tensor:
    """The loss of GROUPS by loops over groups, completions and tokens."""
    values = REWARDS.to(batch.old.dtype)
    total, tokens, at = 0.0, 0, 0
    for (prompt, group), rewards in zip(GROUPS, values, strict=True):
        for ids, reward in zip(group, rewards, strict=True):
            gain = reward - rewards.mean()
            if s.scale_rewards:
                spread = math.sqrt(((rewards - rewards.mean()) ** 2).sum() / (len(rewards) - 1))
                gain = gain / (spread + 1e-4)
            text = torch.tensor(prompt + ids)
            hidden = model(text, torch.arange(len(text)), torch.tensor([0, len(text)]), reference=True)
            table = (model.logits(hidden) / s.temperature).log_softmax(-1)
            of_completion = 0.0
            for i, token in enumerate(ids):
                lp = table[len(prompt) + i - 1, token]
                ratio = torch.exp(lp - batch.old[at])
                clipped = torch.clamp(ratio, 1 - s.epsilon, 1 + s.epsilon)
                loss = -torch.minimum(ratio * gain, clipped * gain)
                if s.beta:
                    d = batch.reference[at] - lp
                    loss = loss + s.beta * (torch.exp(d) - d - 1)
                of_completion, at = of_completion + loss, at + 1
            tokens += len(ids)
            total = total + (of_completion / len(ids) if s.loss_type == "grpo" else of_completion)
    return total / {"dapo": tokens, "grpo": 4, "dr_grpo": 4 * s.max_completion_length}[s.loss_type]


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# --- the loss


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("change", [{}, {"beta": 0.04}, {"temperature": 0.7, "scale_rewards": False}])
def test_loss_and_gradient_equal_nested_loops_in_float64(tokenizer, loss_type, change):
    model = tiny_model(dtype=torch.float64)
    method = objective(model, tokenizer, num_generations=2, loss_type=loss_type, **change)
    batch = given(method, model)
    loss, weight, metrics = method.loss(model, batch)
    wanted = naive_loss(model, batch, method.settings)
    assert (loss / weight).item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(
        gradients(model, loss / weight), gradients(model, wanted), rtol=1e-8, atol=1e-12
    )
    assert 0 < metrics["clip_ratio/region_mean"][0].item() < 11


def test_with_ratio_1_the_gradient_is_that_of_the_likelihood_weighted_by_advantage(tokenizer):
    model = tiny_model(dtype=torch.float64)
    method = objective(model, tokenizer, num_generations=2)
    batch = given(method, model, shift=0.0)
    loss, _, _ = method.loss(model, batch)
    log_probs = grpo.target_log_probs(model, batch)[0]
    wanted = -(batch.repeat(batch.advantages) * log_probs).sum()
    torch.testing.assert_close(gradients(model, loss), gradients(model, wanted))


def test_advantages_worked_by_hand():
    """0, 1 and 2: mean 1, standard deviation 1 (with n - 1); equal rewards teach nothing."""
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.3, 0.3, 0.3]], dtype=torch.float64)
    scaled = torch.tensor([[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards), scaled)
    torch.testing.assert_close(
        group_advantages(rewards, scale=False), rewards - torch.tensor([[1.0], [0.3]]).double()
    )


def test_a_constant_added_to_the_rewards_changes_no_advantage():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards + 17.5), group_advantages(rewards))


def test_tokens_outside_the_clip_range_have_no_gradient():
    """Ratios 0.5, 1.1 and 2, with epsilon 0.2: the clip takes 2 if A > 0, and 0.5 if A < 0."""
    log_probs = torch.tensor([0.5, 1.1, 2.0]).log().requires_grad_()
    for gain, kept in ((1.0, [1, 1, 0]), (-1.0, [0, 1, 1])):
        losses, clipped = clipped_loss(log_probs, torch.zeros(3), torch.full((3,), gain), 0.2)
        (slope,) = torch.autograd.grad(losses.sum(), log_probs)
        assert (slope != 0).tolist() == [bool(k) for k in kept]
        assert clipped.tolist() == [not k for k in kept]


def test_the_mean_of_k3_is_the_kl_divergence_and_k3_is_0_only_for_equal_probabilities():
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = k3(p, q)
    assert (values > 0).all()
    assert (k3(p, p) == 0).all()
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * values).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_dapo_does_not_depend_on_how_a_step_is_cut_into_micro_batches(tokenizer):
    model = tiny_model(dtype=torch.float64)
    method = objective(model, tokenizer)
    whole = method.prepare(model, prompts(tokenizer, method), 0)
    parts = [method.prepare(model, prompts(tokenizer, method, [sample]), 0) for sample in SAMPLES]
    loss, weight, _ = method.loss(model, whole)
    found = [method.loss(model, part) for part in parts]
    assert weight == sum(w for _, w, _ in found)
    torch.testing.assert_close(sum(part for part, _, _ in found), loss)


def test_completions_without_an_effect_are_left_out_and_their_tokens_count(tokenizer):
    """Of two groups, the first has equal rewards: loss and gradient are those of all four completions."""
    model = tiny_model(dtype=torch.float64)
    method = objective(model, tokenizer, num_generations=2)
    prompts = [prompt for prompt, group in GROUPS for _ in group]
    done = [Completion(ids, "length", None, [0.0] * len(ids)) for _, group in GROUPS for ids in group]
    rewards = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    batch = method._batch(prompts, done, rewards, {}, list("abcd"))
    assert (batch.ids, batch.weight) == (["c", "d"], 11)
    loss, _, metrics = method.loss(model, batch)
    log_probs = [
        grpo.target_log_probs(model, pack([grpo.completed(p, c, "")]))[0]
        for p, c in zip(prompts, done, strict=True)
    ]
    gains = group_advantages(rewards).flatten()
    wanted = -sum(gain * lp.sum() for gain, lp in zip(gains, log_probs, strict=True))
    torch.testing.assert_close(gradients(model, loss), gradients(model, wanted))
    assert metrics["frac_reward_zero_std"] == (1, 2)
    equal = method._batch(prompts, done, torch.ones(2, 2), {}, list("abcd"))
    assert (equal.ids, method.loss(model, equal)[0].item()) == (["b"], 0.0)


@pytest.mark.parametrize("beta, kept", [(0.0, 2), (0.1, 4)])
def test_completions_of_advantage_0_stay_where_k3_has_an_effect_on_them(tokenizer, beta, kept):
    model = tiny_model(dtype=torch.float64)
    method = objective(model, tokenizer, num_generations=2, beta=beta)
    prompts = [prompt for prompt, group in GROUPS for _ in group]
    done = [Completion(ids, "length", None, [0.0] * len(ids)) for _, group in GROUPS for ids in group]
    batch = method._batch(prompts, done, torch.tensor([[0.5, 0.5], [1.0, 0.0]]), {}, list("abcd"))
    assert len(batch.ids) == kept
    if beta:
        batch.reference = torch.full((batch.num_targets,), -6.0, dtype=torch.float64)
        batch.advantages = torch.zeros(kept)
        assert (gradients(model, method.loss(model, batch)[0]) != 0).any()


@pytest.mark.parametrize("share", [True, False], ids=["with a shared prefix", "each prompt alone"])
@pytest.mark.parametrize("change", [{}, {"beta": 0.1}, {"mask_truncated_completions": True}])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_the_largest_batch_is_as_large_as_any_that_is_prepared(tokenizer, group, change, share):
    """No completion ends before its limit, and all have different rewards."""
    model = tiny_model()
    count = iter(range(10**6))
    method = objective(
        model, tokenizer, Scored(lambda text: 2.0 ** next(count)), num_generations=group, **change
    )
    batch = pack(method.documents(SAMPLES, tokenizer, 400, "error", 400)[0], share)
    largest, prepared = method.largest_batch(batch), method.prepare(model, batch, 0)
    assert largest.num_targets == 3 * group * 6 >= prepared.num_targets
    assert len(largest.tokens) >= len(prepared.tokens)


def test_truncated_completions_can_be_left_out_of_the_loss(tokenizer):
    model = tiny_model()
    done = [Completion([11, 12], "stop", 1, [0.0] * 3), Completion([13, 14, 15], "length", None, [0.0] * 3)]
    for mask, ids, weight in ((False, ["a", "b"], 6), (True, ["a"], 3)):
        method = objective(model, tokenizer, num_generations=2, mask_truncated_completions=mask)
        batch = method._batch([[3, 4]] * 2, done, torch.tensor([[0.0, 1.0]]), {}, ["a", "b"])
        assert (batch.ids, batch.weight) == (ids, weight)
        assert batch.figures["completions/clipped_ratio"] == (1, 2)
    assert batch.targets.tolist() == [11, 12, 1]  # the stop token is learnt too


# --- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_compute_the_same_log_probabilities(tokenizer, temperature):
    model = tiny_model()
    method = objective(model, tokenizer, num_generations=8, max_completion_length=40, temperature=temperature)
    batch = method.prepare(model, prompts(tokenizer, method), 0)
    _, _, metrics = method.loss(model, batch)
    apart, _ = metrics["sampling/sampling_logp_difference/max"]
    assert 0 < apart < 1e-4
    assert batch.num_targets > 300


# The bounds of the mean and the largest difference, in nats. In bfloat16 they are generous: it keeps 8 bits.
@pytest.mark.parametrize("precision, mean, largest", [("fp32", 1e-5, 1e-4), ("bf16", 0.05, 0.6)])
def test_sampler_and_trainer_agree_on_the_embedded_base_in_float32_and_nearly_in_bfloat16(
    precision, mean, largest
):
    base = embedded(precision)
    method = GroupRelativePolicyOptimization(GRPO(num_generations=4, max_completion_length=16), Scored())
    method.begin(base, SAMPLES, [], "start")
    with base.precision.autocast():
        batch = method.prepare(base.model, prompts(base.tokenizer, method, SAMPLES[:2], 10**5), 0)
        _, _, metrics = method.loss(base.model, batch)
    apart = {name: metrics[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max")}
    print(precision, {name: float(value / weight) for name, (value, weight) in apart.items()})
    assert 0 < float(apart["mean"][0] / apart["mean"][1]) < mean
    assert float(apart["max"][0]) < largest


def test_completions_depend_on_the_step_the_prompt_and_the_seed_and_on_nothing_else(tokenizer):
    model, torch_state = tiny_model(), torch.get_rng_state()
    method = objective(model, tokenizer)
    batch = prompts(tokenizer, method)
    first = method.prepare(model, batch, 7)
    method.prepare(model, batch, 8)
    torch.manual_seed(5)
    assert torch.equal(method.prepare(model, batch, 7).tokens, first.tokens)
    alone = method.prepare(model, prompts(tokenizer, method, SAMPLES[1:2]), 7)
    (start,) = {tuple(d) for d in [alone.tokens.tolist()]}
    assert str(list(start))[1:-1] in str(first.tokens.tolist())
    assert not torch.equal(method.prepare(model, batch, 8).tokens, first.tokens)
    other = objective(model, tokenizer, seed=1)
    assert not torch.equal(other.prepare(model, batch, 7).tokens, first.tokens)
    torch.set_rng_state(torch_state)


def test_the_reference_of_k3_is_the_model_at_the_start_with_its_adapter(tokenizer):
    model = tiny_model()  # its adapters change its output, as those of adapter.init_from do
    method = objective(model, tokenizer, beta=0.1)
    before = {name: x.clone() for name, x in adapter_state(model).items()}
    batch = method.prepare(model, prompts(tokenizer, method), 0)
    _, _, metrics = method.loss(model, batch)
    assert metrics["kl"][0].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    moved = {name: x.clone() for name, x in adapter_state(model).items()}
    batch = method.prepare(model, prompts(tokenizer, method), 1)
    _, _, metrics = method.loss(model, batch)
    assert metrics["kl"][0].item() > 0.01
    assert all(torch.equal(x, moved[name]) for name, x in adapter_state(model).items())
    with with_adapter_state(model, before):
        lp = grpo.target_log_probs(model, batch)[0]
    torch.testing.assert_close(lp.detach(), batch.reference)


def test_sampling_leaves_the_model_in_training_mode(tokenizer):
    model = tiny_model().train()
    method = objective(model, tokenizer, beta=0.1)
    method.prepare(model, prompts(tokenizer, method), 0)
    assert all(module.training for module in model.modules())


# --- learning


def letters(text: str) -> float:
    """The share of a text's characters that are letters: at most 1, and about a fifth for random tokens."""
    return sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))


def learn(tokenizer, seed, shuffled=False, iterations=1, steps=30) -> tuple[float, float]:
    """Returns the mean reward of the first and of the last five steps; it is the share of letters."""
    # All weights are trained: with a frozen random head, no adapter makes letters much likelier.
    model, generator = tiny_model(seed, adapted=False), torch.Generator().manual_seed(seed)

    class Shuffled(Scored):
        def __call__(self, *texts):
            values, parts = super().__call__(*texts)
            order = torch.randperm(len(values), generator=generator).tolist()
            return ([values[i] for i in order] if shuffled else values), parts

    method = objective(
        model, tokenizer, Shuffled(letters), seed=seed, num_iterations=iterations, num_generations=8
    )
    optimizers, records = make_optimizers(model, "adamw", 1e-2, 0.0), []
    batch = prompts(tokenizer, method)
    for step in range(steps):
        prepared = [method.prepare(model, batch, step)]
        for _ in range(iterations):
            record = loop.train_step(model, method, prepared, optimizers, CPU, 1e-2, 1.0)
            model.zero_grad()
        records.append(record["rewards/scored/mean"])
    return sum(records[:5]) / 5, sum(records[-5:]) / 5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_reward_with_a_known_optimum_rises_to_it_and_a_shuffled_one_does_not(tokenizer, seed):
    before, after = learn(tokenizer, seed)
    assert before < 0.3
    assert after > 0.9
    before, after = learn(tokenizer, seed, shuffled=True)
    assert abs(after - before) < 0.1


def test_several_steps_on_the_same_completions_learn_more_from_them(tokenizer):
    _, once = learn(tokenizer, 1, steps=15)
    _, thrice = learn(tokenizer, 1, steps=15, iterations=3)
    assert thrice > once + 0.2


def test_score_is_the_mean_reward_of_answers(tokenizer):
    method = objective(tiny_model(), tokenizer, Scored(lambda text: text.count("e") / 2))
    answers = SimpleNamespace(prompts=["a", "b"], texts=["ee", "xe"], golds=["", ""], ended=[True, True])
    assert method.score(answers) == {"reward": 0.75, "rewards/scored": 0.75}
