"""generation/cache.py: cached logits equal uncached ones in local and global layers, past three windows."""

import pytest
import torch

from generation.cache import KVCache, SharedPrefix
from tests.generation.small import WINDOW, small_model, texts


def uncached(model, text: list[int]) -> torch.Tensor:
    """Returns the logits (n, V) of a text in one forward pass without a cache."""
    n = len(text)
    return model.logits(model(torch.tensor(text), torch.arange(n), torch.tensor([0, n]), reference=True))


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def cached(
    model, rows: list[list[int]], prompts: list[int], new: int, keep_at: dict | None = None
) -> tuple[KVCache, list]:
    """Prefills rows[i][:prompts[i]], then feeds the next `new` tokens, one a step.

    `keep_at` maps a step to the rows that stay from this step on. Returns the cache and each row's logits.
    """
    cache = KVCache(model.config, len(prompts), max(prompts) + new)
    hidden = read(
        model, cache, list(range(len(prompts))), [r[:n] for r, n in zip(rows, prompts, strict=True)]
    )
    out, live = [[model.logits(part)] for part in hidden.split(prompts)], list(range(len(rows)))
    for step in range(new):
        if keep_at and step in keep_at:
            cache.keep(keep_at[step])
            live = [live[i] for i in keep_at[step]]
        position_ids = cache.advance()
        assert position_ids.tolist() == [prompts[i] + step for i in live]
        tokens = torch.tensor([rows[i][prompts[i] + step] for i in live])
        logits = model.logits(model(tokens, position_ids, None, attend=cache))
        for i, z in zip(live, logits, strict=True):
            out[i].append(z[None])
    return cache, [torch.cat(parts) for parts in out]


@torch.no_grad()
def read(model, cache: KVCache, rows: list[int], prompts: list[list[int]]) -> torch.Tensor:
    """Prefills the rows of the cache with the prompts; returns the hidden states (T, hidden)."""
    attend = cache.prefill(rows, [len(p) for p in prompts])
    tokens = torch.tensor([t for p in prompts for t in p])
    return model(tokens, attend.position_ids, attend.cu_seqlens, attend=attend)


@torch.no_grad()
def step(model, cache: KVCache, tokens: list[int]) -> torch.Tensor:
    """Feeds one token to each row; returns the logits (rows, V)."""
    return model.logits(model(torch.tensor(tokens), cache.advance(), None, attend=cache))


def test_cached_logits_equal_uncached_ones_for_three_windows():
    model = small_model()
    (text,) = texts([3 * WINDOW + 5])
    _, (got,) = cached(model, [text], [5], 3 * WINDOW)
    assert_close(got, uncached(model, text))


@pytest.mark.parametrize("prompts", [[1, 5, 12], [12, 20, 9], [6, 6, 6]])
@pytest.mark.parametrize("block", [1, 2, 16])
def test_rows_of_unequal_length_equal_each_row_alone(monkeypatch, prompts, block):
    monkeypatch.setattr("generation.cache.BLOCK", block)
    model = small_model()
    rows = texts([n + 3 * WINDOW for n in prompts])
    _, got = cached(model, rows, prompts, 3 * WINDOW)
    for logits, text in zip(got, rows, strict=True):
        assert_close(logits, uncached(model, text))


def test_softcapped_scores_equal_uncached_ones():
    model = small_model(attn_logit_softcapping=0.5)
    rows = texts([20, 24])
    _, got = cached(model, rows, [8, 12], 12)
    for logits, text in zip(got, rows, strict=True):
        assert_close(logits, uncached(model, text))


def test_rows_that_stay_are_not_changed_when_others_leave():
    model = small_model()
    prompts = [3, 11, 14, 14]
    rows = texts([n + 20 for n in prompts])
    cache, got = cached(model, rows, prompts, 20, keep_at={4: [0, 2, 3], 11: [2, 0]})
    for i, fed in ((0, 20), (1, 4), (2, 11), (3, 20)):
        assert got[i].shape[0] == prompts[i] + fed
        assert_close(got[i], uncached(model, rows[i])[: prompts[i] + fed])
    assert cache.keys[0].shape[0] == 2


def test_a_row_may_be_copied():
    model = small_model()
    text, other = texts([9, 4])
    cache = KVCache(model.config, 3, 21)
    read(model, cache, [0, 1], [other, text])
    cache.copy([1, 0, 1], [1, 0, 2])
    first, second = step(model, cache, [3, 5, 7]), step(model, cache, [6, 6, 6])
    for row, fed in enumerate((other + [3, 6], text + [5, 6], text + [7, 6])):
        assert_close(torch.stack((first[row], second[row])), uncached(model, fed)[-2:])


@pytest.mark.parametrize("lengths", [(30, 3), (3, 30), (30, WINDOW)])
def test_a_prompt_in_the_slot_of_a_finished_row_sees_nothing_of_it(lengths):
    """The finished row or the new one is longer than the window; the row in the other slot is not changed."""
    model = small_model()
    before, prompt, neighbour = texts([*lengths, 5])
    cache = KVCache(model.config, 2, 50)
    read(model, cache, [0, 1], [before, neighbour])
    step(model, cache, [1, 2])
    read(model, cache, [0], [prompt])
    for i in range(2 * WINDOW):
        got = step(model, cache, [3 + i, 4 + i])
    fed = [*range(3, 3 + 2 * WINDOW)]
    assert_close(got[0], uncached(model, prompt + fed)[-1])
    assert_close(got[1], uncached(model, neighbour + [2] + [t + 1 for t in fed])[-1])


def test_a_finished_row_that_is_fed_past_its_capacity_does_not_change_others():
    model = small_model()
    full, text = texts([10, 4])
    cache = KVCache(model.config, 2, 10)
    read(model, cache, [0, 1], [full, text])
    for i in range(3):
        got = step(model, cache, [i, i])
    assert_close(got[1], uncached(model, text + [0, 1, 2])[-1])


@pytest.mark.parametrize("shared", [1, 5, 13])
def test_prompts_after_a_shared_prefix_equal_whole_prompts(shared):
    """13 tokens exceed the window, one prompt has one token of its own, and two streams use the prefix."""
    model, got = small_model(), []
    rows = [texts([shared])[0] + own for own in texts([4, 1, 17, 2])]
    cache, prefix = KVCache(model.config, 4, max(map(len, rows)) + 1), SharedPrefix(model.config, shared)
    with torch.no_grad():
        model(torch.tensor(rows[0][:shared]), prefix.position_ids, prefix.cu_seqlens, attend=prefix)
        for slots in ([0, 1, 2], [3]):
            attend = cache.prefill(slots, [len(rows[i]) for i in slots], prefix)
            tokens = torch.tensor([t for i in slots for t in rows[i][shared:]])
            assert tokens.shape == attend.position_ids.shape
            hidden = model(tokens, attend.position_ids, attend.cu_seqlens, attend=attend)
            got += model.logits(hidden).split(attend.cu_seqlens.diff().tolist())
    for row, logits, last in zip(rows, got, step(model, cache, [7] * 4), strict=True):
        assert_close(torch.cat((logits, last[None])), uncached(model, [*row, 7])[shared:])


def test_sliding_layers_hold_one_window_and_full_layers_everything():
    model = small_model()
    cache, _ = cached(model, texts([50]), [30], 20)
    slots = {layer: (keys.shape[2], cache.values[layer].shape[2]) for layer, keys in cache.keys.items()}
    assert slots == {layer: (50, 50) if layer in (3, 6) else (WINDOW, WINDOW) for layer in range(7)}


def test_slots_of_a_ring_worked_by_hand():
    """With window 3 and prompts of 2 and 4 tokens, row 1 holds positions 3, 1, 2 after prefill."""
    cfg = small_model(sliding_window=3).config
    cache = KVCache(cfg, 2, 6)
    attend = cache.prefill([0, 1], [2, 4])
    k = torch.tensor([10.0, 11.0, 20.0, 21.0, 22.0, 23.0])[:, None, None]  # 10 (row + 1) + position
    for layer in (0, 3):
        attend(layer, k.expand(6, 2, 1), k, k, layer == 0)
    assert cache.keys[0][:, 0, :, 0].tolist() == [[10.0, 11.0, 0.0], [23.0, 21.0, 22.0]]
    assert cache.advance().tolist() == [2, 4]
    k = torch.tensor([12.0, 24.0])[:, None, None]
    for layer in (0, 3):
        cache(layer, k.expand(2, 2, 1), k, k, layer == 0)
    assert cache.keys[0][:, 0, :, 0].tolist() == [[10.0, 11.0, 12.0], [23.0, 24.0, 22.0]]
    assert cache.keys[3][0, 0, :, 0].tolist() == [10.0, 11.0, 12.0, 0.0, 0.0, 0.0]
    assert cache.keys[3][1, 0, :, 0].tolist() == [20.0, 21.0, 22.0, 23.0, 24.0, 0.0]
    masked = float("-inf")
    ((rows, found),) = cache.blocks
    assert rows == slice(0, 16) and found[True] == (3, None), "three slots, all in both windows"
    keys, mask = found[False]
    assert keys == 5 and mask[:, 0, 0].tolist() == [[0, 0, 0, masked, masked], [0] * 5]


def test_the_cache_has_the_dtype_in_which_attention_computes():
    model = small_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache, _ = cached(model, texts([12]), [6], 6)
    assert {x.dtype for store in (cache.keys, cache.values) for x in store.values()} == {torch.bfloat16}
