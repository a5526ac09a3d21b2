"""data/token_cache.py: what comes back is what was put there, for the same samples and settings alone, and a
broken file costs nothing but time.
"""

import os
import shutil
import stat
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import token_cache as store
from data.render import IGNORE_INDEX, Counts, Document, render_all
from data.rows import Sample
from model.tokenizer import Tokenizer
from tests.makers import write_tokenizer

__ = IGNORE_INDEX


@pytest.fixture(autouse=True)
def every_row_is_worth_it(monkeypatch):
    monkeypatch.setattr(store, "WORTH", 1)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


def sample(name: str, said: str = "yes") -> Sample:
    return Sample(name, (("user", "is it so?"), ("assistant", said)))


def refuse():
    raise AssertionError("rendered again")


def test_what_is_stored_comes_back(tmp_path, tokenizer):
    samples = [
        sample("a.jsonl:1"),
        sample("a.jsonl:2", "no, it is quite another thing"),
        Sample("b.json:[0]", text="raw text"),
    ]
    first = store.stored(
        tmp_path / "new",
        samples,
        bytes,
        lambda: render_all(samples, tokenizer, max_length=40, on_long="truncate"),
    )
    assert first[1].truncated and first == render_all(samples, tokenizer, max_length=40, on_long="truncate")
    assert store.stored(tmp_path / "new", samples, bytes, refuse) == first


names = st.text(
    st.characters(exclude_characters="\0")
)  # lone surrogates too, as of a file's name that is no UTF-8
documents = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(257, 300_000), st.booleans()), min_size=1, max_size=9), names),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(documents, st.lists(st.integers(0, 2**40), min_size=7, max_size=7))
def test_any_documents_come_back_with_one_object_for_each_id(tmp_path_factory, parts, numbers):
    made = []
    for pairs, name in parts:
        ids = [i for i, _ in pairs]
        labels = [n if on else __ for n, (_, on) in zip(ids[1:], pairs, strict=False)] + [
            __
        ]  # the last position has no next token
        made.append(Document(ids, labels, name))
    folder, samples = tmp_path_factory.mktemp("store"), [sample("x")]
    store.stored(folder, samples, bytes, lambda: (made, Counts(*numbers)))
    found, counts = store.stored(folder, samples, bytes, refuse)
    assert (found, counts) == (made, Counts(*numbers))
    objects = {}
    assert all(objects.setdefault(i, i) is i for d in found for i in d.input_ids)


def test_another_sample_setting_or_order_is_another_file(tmp_path):
    one, two = ([Document([2, 5], [5, __], name)] for name in "ab"), [sample("a"), sample("b")]
    answers = [(next(one), Counts()), (next(one), Counts())]
    assert store.stored(tmp_path, two, lambda: b"x", lambda: answers[0]) == answers[0]
    for samples, others in (
        (two[::-1], b"x"),
        (two, b"y"),
        (two[:1], b"x"),
        ([sample("a"), sample("b", "no")], b"x"),
        ([sample("a"), sample("c")], b"x"),
    ):
        assert store.stored(tmp_path, samples, lambda key=others: key, lambda: answers[1]) == answers[1]
    assert store.stored(tmp_path, two, lambda: b"x", refuse) == answers[0]


def test_few_samples_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WORTH", 2)
    assert store.stored(tmp_path / "new", [sample("a")], bytes, lambda: "rendered") == "rendered"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("harm", ["cut", "emptied", "not one"])
def test_a_broken_file_is_made_anew(tmp_path, harm):
    answer = [Document([2, 5], [5, __], "a")], Counts(kept=1)
    store.stored(tmp_path, [sample("a")], bytes, lambda: answer)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "emptied": b"", "not one": b"PK nonsense"}[harm])
    assert store.stored(tmp_path, [sample("a")], bytes, lambda: answer) == answer
    assert store.stored(tmp_path, [sample("a")], bytes, refuse) == answer and [file] == list(
        tmp_path.iterdir()
    )


def test_where_nothing_can_be_written_nothing_is_stored(tmp_path):
    (tmp_path / "file").touch()
    answer = [Document([2, 5], [5, __], "a")], Counts(kept=1)
    for _ in range(2):
        assert store.stored(tmp_path / "file", [sample("a")], bytes, lambda: answer) == answer


def test_the_one_not_asked_for_the_longest_makes_room(tmp_path, monkeypatch):
    answer = [Document([2, 5], [5, __], "a")], Counts(kept=1)
    for second, key in enumerate((b"1", b"2", b"1", b"3"), 1):
        store.stored(tmp_path, [sample("a")], lambda key=key: key, lambda: answer)
        for file in tmp_path.iterdir():
            if file.stat().st_mtime > 1000:  # the one that this asked for
                os.utime(file, (second, second))
        monkeypatch.setattr(store, "ROOM", 2 * file.stat().st_size)
    assert len(list(tmp_path.iterdir())) == 2
    assert (
        store.stored(tmp_path, [sample("a")], lambda: b"1", refuse)
        == store.stored(tmp_path, [sample("a")], lambda: b"3", refuse)
        == answer
    )


def test_what_would_fill_the_room_or_the_disk_is_not_stored(tmp_path, monkeypatch):
    answer = [Document([2, 5], [5, __], "a")], Counts(kept=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    store.stored(tmp_path, [sample("a")], bytes, lambda: answer)
    monkeypatch.undo()
    monkeypatch.setattr(store, "WORTH", 1)
    monkeypatch.setattr(store, "ROOM", 10)
    store.stored(tmp_path, [sample("a")], bytes, lambda: answer)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_for_its_owner_alone(tmp_path):
    store.stored(
        tmp_path / "new", [sample("a")], bytes, lambda: ([Document([2, 5], [5, __], "a")], Counts(kept=1))
    )
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
