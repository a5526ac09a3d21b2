"""data/packing.py: a packed stream by hand, unpacking, and parity with transformers' collator."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import MIN_PREFIX_TOKENS, pack
from data.render import IGNORE_INDEX, Document

__ = IGNORE_INDEX


def make_document(tokens, supervised, id="d"):
    """Returns a document whose token i is supervised if supervised[i]."""
    labels = [tokens[i + 1] if i + 1 < len(tokens) and supervised[i + 1] else __ for i in range(len(tokens))]
    return Document(tokens, labels, id)


tokens_and_supervised = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9)
document = tokens_and_supervised.map(lambda pairs: make_document(*map(list, zip(*pairs, strict=True))))
documents = st.lists(document, min_size=1, max_size=6)


def test_two_documents_make_the_stream_of_an_example_by_hand():
    batch = pack([Document([2, 5, 6, 7], [__, 6, 7, __], "a:1"), Document([2, 8, 9], [8, 9, __], "a:2")])
    assert batch.tokens.tolist() == [2, 5, 6, 7, 2, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.target_positions.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [6, 7, 8, 9]
    assert batch.ids == ["a:1", "a:2"]
    assert (batch.num_tokens, batch.num_targets) == (7, 4)
    for tensor in (batch.tokens, batch.position_ids, batch.target_positions, batch.targets):
        assert tensor.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


@given(documents)
def test_splitting_the_stream_at_cu_seqlens_gives_the_documents(documents):
    batch = pack(documents)
    labels = torch.full_like(batch.tokens, IGNORE_INDEX).scatter(0, batch.target_positions, batch.targets)
    bounds = batch.cu_seqlens.tolist()
    for document, start, end in zip(documents, bounds[:-1], bounds[1:], strict=True):
        assert batch.tokens[start:end].tolist() == document.input_ids
        assert labels[start:end].tolist() == document.labels
        assert batch.position_ids[start:end].tolist() == list(range(end - start))


@given(documents)
def test_no_target_is_a_token_of_the_next_document(documents):
    batch = pack(documents)
    last = batch.cu_seqlens[1:].long() - 1
    assert not torch.isin(batch.target_positions, last).any()
    assert torch.equal(batch.targets, batch.tokens[batch.target_positions + 1])


def test_stream_equals_that_of_transformers_flattening_collator():
    import transformers

    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [([2, 5, 6, 7], [0, 0, 1, 1]), ([2, 8], [0, 1]), ([2, 4, 4, 4, 1], [0, 1, 1, 1, 1])]
    ours = pack([make_document(tokens, supervised) for tokens, supervised in rows])
    labels = [[t if on else __ for t, on in zip(*row, strict=True)] for row in rows]
    theirs = collate([{"input_ids": t, "labels": row} for (t, _), row in zip(rows, labels, strict=True)])
    assert torch.equal(ours.tokens, theirs["input_ids"][0])
    assert torch.equal(ours.position_ids, theirs["position_ids"][0])
    assert torch.equal(ours.cu_seqlens, theirs["cu_seq_lens_q"])
    shifted = theirs["labels"][0, 1:]  # transformers shifts labels in its loss, data/render.py shifts them.
    assert torch.equal(ours.target_positions, (shifted != __).nonzero().squeeze(1))
    assert torch.equal(ours.targets, shifted[shifted != __])


def test_a_batch_without_targets_has_empty_target_tensors():
    batch = pack([Document([2, 3], [__, __], "d")])
    assert batch.num_targets == 0
    assert (batch.targets.shape, batch.targets.dtype) == ((0,), torch.int64)


def test_to_moves_every_tensor_except_cu_seqlens():
    batch = pack([Document([2, 5], [5, __], "d")])
    moved = batch.to("meta", non_blocking=True)
    for name in ("tokens", "position_ids", "target_positions", "targets"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.cu_seqlens is batch.cu_seqlens, "reading it from a GPU would wait for it"
    assert (moved.ids, moved.num_tokens) == (["d"], 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU's driver")
def test_pinned_batch_is_pinned_and_equal():
    batch = pack([Document([2, 5], [5, __], "d")])
    assert batch.pin_memory().tokens.is_pinned()
    assert torch.equal(batch.pin_memory().tokens, batch.tokens)


@pytest.mark.parametrize("documents", [[], [Document([], [], "d")]])
def test_packing_nothing_or_an_empty_document_fails(documents):
    with pytest.raises(AssertionError):
        pack(documents)


def test_a_prefix_that_two_documents_share_is_packed_once():
    start = list(range(10, 10 + MIN_PREFIX_TOKENS))
    a = Document([*start, 5, 6], [*[__] * MIN_PREFIX_TOKENS, 6, __], "a")
    c = Document([*start, 7], [__] * (MIN_PREFIX_TOKENS + 1), "c")
    batch = pack([a, Document([3, 4], [4, __], "b"), c], share_prefix=True)
    assert batch.tokens.tolist() == [*start, 5, 6, 7, 3, 4]
    assert batch.position_ids.tolist() == [*range(MIN_PREFIX_TOKENS + 2), MIN_PREFIX_TOKENS, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, *(MIN_PREFIX_TOKENS + n for n in (0, 2, 3, 5))]
    assert batch.shared_prefix == [-1, 0, 0, -1]
    assert batch.target_positions.tolist() == [MIN_PREFIX_TOKENS, MIN_PREFIX_TOKENS + 3]
    assert batch.targets.tolist() == [6, 4]
    assert (batch.num_tokens, batch.ids) == (2 * MIN_PREFIX_TOKENS + 5, ["a", "c", "b"])


# Which prefix, its tokens, the document's own tokens, the first supervised token.
lengths = (st.integers(0, n) for n in (2, MIN_PREFIX_TOKENS + 4, 4, 30))


@given(st.lists(st.tuples(*lengths), min_size=1, max_size=6))
def test_documents_joined_with_their_shared_prefixes_are_the_documents(parts):
    rows = []
    for number, (kind, shared, own, first) in enumerate(parts):
        tokens = [50 * kind + i for i in range(shared)] + [200 + number] * (1 + own)
        rows.append(make_document(tokens, [i >= first for i in range(len(tokens))], str(number)))
    batch = pack(rows, share_prefix=True)
    bounds = batch.cu_seqlens.tolist()
    shared_prefix = batch.shared_prefix or [-1] * (len(bounds) - 1)
    labels = torch.full_like(batch.tokens, __).scatter(0, batch.target_positions, batch.targets)
    columns = (x.tolist() for x in (batch.tokens, labels, batch.position_ids))
    stream = list(zip(*columns, strict=True))
    pieces = [stream[a:b] for a, b in pairwise(bounds)]
    joined = [(pieces[p] if p >= 0 else []) + piece for piece, p in zip(pieces, shared_prefix, strict=True)]
    documents = [document for d, document in enumerate(joined) if d not in shared_prefix]
    expected = [list(zip(row.input_ids, row.labels, range(len(row.input_ids)), strict=True)) for row in rows]
    assert sorted(documents) == sorted(expected)
    assert batch.num_tokens == sum(map(len, expected))


@given(documents)
def test_documents_shorter_than_min_prefix_tokens_make_the_plain_stream(documents):
    shared, plain = pack(documents, share_prefix=True), pack(documents)
    assert shared.shared_prefix is None
    for name in ("tokens", "position_ids", "cu_seqlens", "target_positions", "targets"):
        assert torch.equal(getattr(shared, name), getattr(plain, name))


def answered(prompt, answer, id):
    """Returns a document whose answer is supervised."""
    return make_document([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), id)


def test_documents_with_one_prompt_share_all_of_it_and_others_what_they_have_in_common():
    """Two answers to a prompt of 30 tokens, and two prompts that begin with the same 20 tokens."""
    prompt, other = list(range(30)), list(range(20))
    documents = [
        answered(prompt, [71, 72], "a"),
        answered([*other, 50], [51], "c"),
        answered(prompt, [73], "b"),
        answered([*other, 60], [61], "d"),
    ]
    batch = pack(documents, share_prefix=True)
    assert batch.shared_prefix == [-1, 0, 0, -1, 3, 3]
    assert batch.cu_seqlens.diff().tolist() == [29, 3, 2, 20, 2, 2]
    assert batch.ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize("share", [True, False])
def test_sums_and_repeat_are_over_the_supervised_positions_of_each_document(share):
    prompt = list(range(20))
    documents = [answered(prompt, [31, 32, 33], "a"), answered(prompt, [41], "b")]
    batch = pack(documents, share_prefix=share)
    assert batch.target_counts == [3, 1]
    assert batch.sums(torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == [7.0, 8.0]
    assert batch.repeat(torch.tensor([5.0, 6.0])).tolist() == [5.0, 5.0, 5.0, 6.0]
