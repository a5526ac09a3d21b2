"""data/render.py: which tokens are supervised, the shift of the labels, and samples that are too long."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from common.errors import SHOWN
from data.render import IGNORE_INDEX, Counts, render, render_all, special_token_rows
from data.rows import Sample

BOS, EOS, START_USER, START_MODEL, END, NEWLINE, VOCAB_SIZE = 2, 1, 10, 11, 12, 13, 300


class CharacterTokenizer:
    """Maps each character to an id of at least 20; the ids of control tokens are below 20."""

    bos_id, eos_id, vocab_size = BOS, EOS, VOCAB_SIZE

    def encode_batch(self, texts):
        return [[20 + ord(character) for character in text] for text in texts]

    def render_batch(self, conversations):
        return [self.turns(messages) for messages in conversations]

    def turns(self, messages):
        pieces = []
        for role, content in messages:
            (ids,) = self.encode_batch([content])
            if role == "assistant":
                pieces += [([START_MODEL], False), ([*ids, END], True), ([NEWLINE], False)]
            else:
                pieces += [([START_USER, *ids, END, NEWLINE], False)]
        return pieces


TOKENIZER = CharacterTokenizer()
A, B, C, D = (20 + ord(character) for character in "abcd")
__ = IGNORE_INDEX
CHAT = Sample("t:1", (("user", "ab"), ("assistant", "cd")))
TWO_TURNS = Sample("t:2", (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
TEXT = Sample("t:3", text="abc")


def test_loss_on_response_supervises_the_response_and_the_end_of_its_turn():
    document = render(CHAT, TOKENIZER, "response")
    assert document.input_ids == [BOS, START_USER, A, B, END, NEWLINE, START_MODEL, C, D, END, NEWLINE]
    assert document.labels == [__, __, __, __, __, __, C, D, END, __, __]
    assert document.id == "t:1"


def test_every_response_of_a_conversation_is_supervised():
    document = render(TWO_TURNS, TOKENIZER, "response")
    first = [START_USER, A, END, NEWLINE, START_MODEL, B, END, NEWLINE]
    assert document.input_ids == [BOS, *first, START_USER, C, END, NEWLINE, START_MODEL, D, END, NEWLINE]
    assert document.labels == [__, __, __, __, __, B, END, __, __, __, __, __, __, D, END, __, __]


def test_loss_on_all_supervises_every_token_except_the_first():
    document = render(CHAT, TOKENIZER, "all")
    assert document.labels == [START_USER, A, B, END, NEWLINE, START_MODEL, C, D, END, NEWLINE, __]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_raw_text_is_bos_text_eos_and_supervised_throughout(loss_on):
    document = render(TEXT, TOKENIZER, loss_on)
    assert document.input_ids == [BOS, A, B, C, EOS]
    assert document.labels == [A, B, C, EOS, __]


text = st.text("abc<>", min_size=1)
turns = st.tuples(st.tuples(st.just("user"), st.text("abc<>")), st.tuples(st.just("assistant"), text))
conversations = st.lists(turns, min_size=1, max_size=4).map(lambda pairs: Sample("h", sum(pairs, ())))
samples = st.one_of(conversations, text.map(lambda text: Sample("h", text=text)))
loss_on = st.sampled_from(["response", "last", "all"])


@given(samples, loss_on, st.integers(1, 40))
def test_a_label_is_the_next_token_or_ignored_and_bos_comes_once_and_first(sample, loss_on, max_length):
    whole = render(sample, TOKENIZER, loss_on)
    try:
        (cut,), _ = render_all([sample], TOKENIZER, loss_on, max_length, on_long="truncate")
    except ValueError:  # No token of the response is left.
        cut = whole
    for document in (whole, cut):
        assert document.input_ids.count(BOS) == 1 and document.input_ids[0] == BOS
        assert len(document.input_ids) == len(document.labels)
        for i, label in enumerate(document.labels):
            assert label == IGNORE_INDEX or label == document.input_ids[i + 1]
    assert cut is whole or len(cut.input_ids) <= max_length


@given(st.lists(samples, min_size=1, max_size=8), loss_on)
def test_samples_rendered_together_equal_samples_rendered_alone(samples, loss_on):
    documents, counts = render_all(samples, TOKENIZER, loss_on)
    assert documents == [render(sample, TOKENIZER, loss_on) for sample in samples]
    assert counts.tokens == sum(len(document.input_ids) for document in documents)
    supervised = [label for document in documents for label in document.labels if label != IGNORE_INDEX]
    assert counts.supervised_tokens == len(supervised)


@pytest.mark.fault("special tokens")
def test_control_token_text_in_user_data_never_becomes_a_control_id():
    sample = Sample("t:4", (("user", "<end_of_turn><bos>"), ("assistant", "<eos>")))
    document = render(sample, TOKENIZER)
    control = [i for i in document.input_ids if i < 20]
    assert control == [BOS, START_USER, END, NEWLINE, START_MODEL, END, NEWLINE]


@pytest.mark.fault("long rows")
def test_too_long_is_an_error_with_every_id_and_its_length():
    with pytest.raises(ValueError) as error:
        render_all([CHAT, TWO_TURNS, TEXT], TOKENIZER, max_length=10)
    facts = ("2 samples are longer than data.max_length = 10 tokens", "t:1 (11 tokens)", "t:2 (17 tokens)")
    for fact in (*facts, "data.max_length = 17", 'data.on_long = "drop"'):
        assert fact in str(error.value)
    assert "t:3" not in str(error.value)


def test_a_long_list_of_too_long_samples_is_shortened_and_counted():
    with pytest.raises(ValueError, match=r"\.\.\. and 5 more") as error:
        render_all([CHAT] * (SHOWN + 5), TOKENIZER, max_length=10)
    assert str(error.value).count("t:1 (11 tokens)") == SHOWN


@pytest.mark.fault("long rows")
def test_drop_leaves_out_long_samples_and_counts_them():
    documents, counts = render_all([CHAT, TWO_TURNS, TEXT], TOKENIZER, max_length=11, on_long="drop")
    assert [document.id for document in documents] == ["t:1", "t:3"]
    assert counts == Counts(kept=2, dropped=1, tokens=16, supervised_tokens=7, longest=17)


@pytest.mark.fault("long rows")
def test_truncate_cuts_the_end_and_drops_a_sample_without_a_response_left():
    # At 8 tokens, TWO_TURNS keeps its first response, CHAT one token of its response, the third sample none.
    rows = [CHAT, TWO_TURNS, Sample("t:5", (("user", "abcdabcd"), ("assistant", "a")))]
    documents, counts = render_all(rows, TOKENIZER, max_length=8, on_long="truncate")
    assert documents[0].input_ids == [BOS, START_USER, A, B, END, NEWLINE, START_MODEL, C]
    assert documents[0].labels == [__, __, __, __, __, __, C, __]
    assert documents[1].labels == [__, __, __, __, __, B, END, __]
    tokens = {"tokens": 16, "supervised_tokens": 3, "longest": 17}
    assert counts == Counts(kept=2, truncated=2, unsupervised=1, **tokens)


def test_a_sample_of_exactly_max_length_is_not_truncated():
    _, counts = render_all([CHAT], TOKENIZER, max_length=11)
    assert (counts.kept, counts.longest, counts.truncated) == (1, 11, 0)


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_no_document_left_is_an_error(on_long):
    message = "samples is left.* 5 tokens .data.max_length, or the positions of the model.*longest has 17"
    with pytest.raises(ValueError, match=message):
        render_all([CHAT, TWO_TURNS], TOKENIZER, max_length=5, on_long=on_long)


@pytest.mark.fault("vocabulary")
def test_an_id_outside_the_vocabulary_is_an_error_before_training():
    sample = Sample("t:9", (("user", chr(VOCAB_SIZE - 20)), ("assistant", "a")))  # The character's id is 300.
    with pytest.raises(ValueError, match=r"t:9: token id 300 is outside the model's vocabulary of 300"):
        render_all([sample], TOKENIZER)
    # The model's embedding may have fewer entries than its tokenizer.
    with pytest.raises(ValueError, match="vocabulary of 100"):
        render_all([CHAT], TOKENIZER, vocab_size=100)
    assert len(render_all([sample], TOKENIZER, vocab_size=301)[0]) == 1


def test_equal_ids_share_one_int_object():
    # Python itself shares only the int objects below 257.
    (document,), _ = render_all([Sample("t:6", text=chr(400 - 20) * 2)], TOKENIZER, vocab_size=500)
    assert document.input_ids[1] is document.input_ids[2] is document.labels[0]


def test_the_progress_bar_reaches_the_number_of_samples(monkeypatch):
    bars = []

    def bar(total, *_, **__):
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr("data.render.bar", bar)
    render_all([TEXT] * 2500, TOKENIZER)
    assert [(b.n, b.total) for b in bars] == [(2500, 2500)]


@pytest.mark.fault("weight")
def test_loss_on_last_supervises_the_last_response_alone():
    document = render(TWO_TURNS, TOKENIZER, "last")
    assert document.labels == [__] * 13 + [D, END, __, __]
    assert render(CHAT, TOKENIZER, "last") == render(CHAT, TOKENIZER, "response")


@pytest.mark.fault("weight")
@pytest.mark.parametrize("loss_on, supervised", [("response", [D, END]), ("last", [D, END]), ("all", None)])
def test_an_unsupervised_response_has_no_labels(loss_on, supervised):
    sample = replace(TWO_TURNS, unsupervised=(1,))
    document = render(sample, TOKENIZER, loss_on)
    assert document.input_ids == render(TWO_TURNS, TOKENIZER, loss_on).input_ids
    assert document.labels[5:7] == [__, __]
    assert supervised is None or [label for label in document.labels if label != __] == supervised
    _, counts = render_all([CHAT, replace(CHAT, unsupervised=(1,))], TOKENIZER)
    assert (counts.kept, counts.unsupervised) == (1, 1)


@pytest.mark.fault("special tokens")
def test_rows_that_spell_special_tokens_are_found_by_token():
    rows = [CHAT, Sample("a:1", text="x<eos>"), Sample("a:2", (("user", "<eos><b>"), ("assistant", "<eos>")))]
    assert special_token_rows(rows, ["<eos>", "<b>", "<c>"]) == {"<eos>": ["a:1", "a:2"], "<b>": ["a:2"]}
    assert special_token_rows(rows, []) == {}
