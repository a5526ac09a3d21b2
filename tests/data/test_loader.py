"""data/loader.py: the order depends on (seed, epoch) only, a resume continues it, splits separate prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loader import Loader, epoch_order, prompt_of, split_validation
from data.render import IGNORE_INDEX, Document
from data.rows import Sample

__ = IGNORE_INDEX


def documents_of(lengths):
    return [Document([2] + [5] * (n - 1), [5] * (n - 1) + [__], f"d{i}") for i, n in enumerate(lengths)]


def chat(prompt, response, id="s"):
    return Sample(id, (("user", prompt), ("assistant", response)))


def ids(batches):
    return [batch.ids for batch in batches]


def test_the_order_is_the_same_on_every_machine():
    # A checkpoint stores the seed and the epoch; its run resumes exactly only while this order holds.
    assert epoch_order(8, seed=3407, epoch=0) == [0, 5, 6, 2, 4, 1, 3, 7]
    assert epoch_order(8, seed=3407, epoch=1) == [4, 7, 0, 2, 5, 3, 6, 1]
    assert epoch_order(8, seed=3407, epoch=1, shuffle=False) == list(range(8))


def test_seed_and_epoch_are_not_summed():
    assert epoch_order(50, seed=1, epoch=2) != epoch_order(50, seed=2, epoch=1)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=1, epoch=1)


def test_unshuffled_micro_batches_have_the_order_of_the_documents():
    loader = Loader(documents_of([3, 4, 5, 6, 7]), batch_size=2, seed=0, shuffle=False)
    assert ids(loader.batches(0)) == [["d0", "d1"], ["d2", "d3"], ["d4"]]
    assert ids(loader.batches(1)) == ids(loader.batches(0))
    assert len(loader) == 3


def test_micro_batches_are_cut_at_max_tokens():
    loader = Loader(documents_of([3, 4, 5, 1, 7, 2, 2]), batch_size=1, seed=0, shuffle=False, max_tokens=8)
    assert ids(loader.batches(0)) == [["d0", "d1"], ["d2", "d3"], ["d4"], ["d5", "d6"]]
    assert len(loader) == 4


loaders = st.builds(
    lambda lengths, **options: Loader(documents_of(lengths), **options),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    batch_size=st.integers(1, 25),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
    max_tokens=st.one_of(st.none(), st.integers(9, 40)),
)


@given(loaders, st.integers(0, 3))
def test_an_epoch_has_every_document_once_in_len_micro_batches(loader, epoch):
    batches = ids(loader.batches(epoch))
    assert len(batches) == len(loader)
    assert sorted(id for batch in batches for id in batch) == sorted(d.id for d in loader.documents)


@given(loaders, st.integers(0, 3), st.data())
def test_resumed_epoch_equals_the_rest_of_an_uninterrupted_one(loader, epoch, data):
    start = data.draw(st.integers(0, len(loader)))
    uninterrupted = ids(loader.batches(epoch))
    assert ids(loader.batches(epoch, start=start)) == uninterrupted[start:]


@given(loaders, st.integers(1, 4))
def test_strides_divide_an_epoch_without_overlap(loader, processes):
    shares = [ids(loader.batches(0, start=rank, stride=processes)) for rank in range(processes)]
    assert sorted(batch for share in shares for batch in share) == sorted(ids(loader.batches(0)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(9, 40), st.booleans())
def test_no_micro_batch_exceeds_max_tokens(lengths, max_tokens, shuffle):
    loader = Loader(documents_of(lengths), batch_size=1, seed=0, shuffle=shuffle, max_tokens=max_tokens)
    assert all(batch.num_tokens <= max_tokens for epoch in (0, 1) for batch in loader.batches(epoch))


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_shuffling_differs_between_epochs(max_tokens):
    loader = Loader(documents_of([4] * 40), batch_size=2, seed=0, max_tokens=max_tokens)
    assert ids(loader.batches(0)) != ids(loader.batches(1))


@pytest.mark.fault("few rows")
def test_fewer_documents_than_a_batch_make_one_short_batch():
    loader = Loader(documents_of([3, 4]), batch_size=8, seed=0)
    assert len(loader) == 1
    assert [batch.num_tokens for batch in loader.batches(0)] == [7]


def test_no_documents_a_batch_size_of_0_and_a_too_long_document_are_refused():
    with pytest.raises(ValueError, match="no document"):
        Loader([], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size = 0"):
        Loader(documents_of([3]), batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"d1 has 9 tokens.*max_tokens = 8"):
        Loader(documents_of([3, 9]), batch_size=1, seed=0, max_tokens=8)


def test_split_keeps_the_order_and_holds_out_the_fraction():
    samples = [chat(f"p{i}", "r", f"s{i:02}") for i in range(20)]
    train, validation = split_validation(samples, 0.2, seed=0)
    assert (len(train), len(validation)) == (16, 4)
    assert [s.id for s in train] == sorted(s.id for s in train)
    assert sorted(train + validation, key=lambda s: s.id) == samples
    assert split_validation(samples, 0.2, seed=0) == (train, validation)
    assert split_validation(samples, 0.2, seed=1) != (train, validation)
    assert split_validation(samples, 0, seed=0) == (samples, [])


prompts_and_responses = st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"))


@pytest.mark.fault("few rows")
@given(st.lists(prompts_and_responses, min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_no_set_is_empty_and_no_prompt_is_in_both(pairs, fraction, seed):
    samples = [chat(prompt, response, f"s{i}") for i, (prompt, response) in enumerate(pairs)]
    if len({prompt for prompt, _ in pairs}) == 1:
        with pytest.raises(ValueError, match="cannot be split"):
            split_validation(samples, fraction, seed)
        return
    train, validation = split_validation(samples, fraction, seed)
    assert train and validation
    assert {s.id for s in train} | {s.id for s in validation} == {s.id for s in samples}
    assert not {prompt_of(s) for s in train} & {prompt_of(s) for s in validation}


UNSPLITTABLE = {"one": [chat("p", "r")], "copies": [chat("p", "r")] * 5}
UNSPLITTABLE["one prompt"] = [chat("p", "r"), chat(" p\n", "other")]


@pytest.mark.fault("few rows")
@pytest.mark.parametrize("samples", UNSPLITTABLE.values(), ids=UNSPLITTABLE.keys())
def test_a_set_that_cannot_be_split_is_an_error_with_the_remedy(samples):
    with pytest.raises(ValueError, match=r"1 distinct prompt.*data.validation, or set the fraction to 0"):
        split_validation(samples, 0.1, seed=0)
    assert split_validation(samples, 0, seed=0) == (samples, [])


def test_a_fraction_outside_zero_and_one_is_refused():
    for fraction in (-0.1, 1, 2):
        with pytest.raises(ValueError, match="data.validation_fraction"):
            split_validation([chat("a", "r"), chat("b", "r")], fraction, seed=0)


def test_adding_rows_moves_few_others_to_the_other_set():
    samples = [chat(f"p{i}", "r", f"s{i}") for i in range(200)]
    before = {s.id for s in split_validation(samples, 0.2, seed=0)[1]}
    after = {s.id for s in split_validation([chat("new", "r", "n"), *samples], 0.2, seed=0)[1]}
    assert len(before ^ after) <= 2


def test_prompt_of_a_sample_is_what_precedes_the_first_response():
    assert prompt_of(Sample("s", text=" a ")) == "'a'"
    assert prompt_of(chat("p ", "r")) == prompt_of(chat("p", "other")) == "[('user', 'p')]"


@pytest.mark.parametrize("limits", [{"batch_size": 2}, {"batch_size": 0, "max_tokens": 40}])
def test_documents_of_one_sample_stay_together_and_in_order(limits):
    documents = documents_of([3, 9] * 7)
    loader = Loader(documents, seed=1, per_sample=2, **limits)
    for epoch in range(3):
        plan = loader.plan(epoch)
        assert all(
            i % 2 == 0 and j == i + 1 for group in plan for i, j in zip(group[::2], group[1::2], strict=True)
        )
        assert sorted(i for group in plan for i in group) == list(range(14))
        assert len(plan) == len(loader)
