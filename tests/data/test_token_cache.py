"""data/token_cache.py: equal samples and settings give the stored documents; a damaged file is made again."""

import os
import shutil
import stat
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import token_cache
from data.render import IGNORE_INDEX, Counts, Document, render_all
from data.rows import Sample
from data.token_cache import load_or_render
from model.tokenizer import Tokenizer
from tests.makers import write_tokenizer

__ = IGNORE_INDEX
RENDERED = [Document([2, 5], [5, __], "a")], Counts(kept=1)


@pytest.fixture(autouse=True)
def every_set_is_large_enough(monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_SAMPLES", 1)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


def sample(name: str, response: str = "yes") -> Sample:
    return Sample(name, (("user", "is it so?"), ("assistant", response)))


def refuse():
    raise AssertionError("rendered again")


def test_stored_documents_are_read_without_rendering(tmp_path, tokenizer):
    samples = [sample("a.jsonl:1"), sample("a.jsonl:2", "no, it is quite another thing")]
    samples.append(Sample("b.json:[0]", text="raw text"))
    expected = render_all(samples, tokenizer, max_length=40, on_long="truncate")
    first = load_or_render(tmp_path / "new", samples, bytes, lambda: expected)
    assert first[1].truncated and first == expected
    assert load_or_render(tmp_path / "new", samples, bytes, refuse) == first


# They include lone surrogates, as in the name of a file that is not UTF-8.
names = st.text(st.characters(exclude_characters="\0"))
ids_and_supervised = st.lists(st.tuples(st.integers(257, 300_000), st.booleans()), min_size=1, max_size=9)
documents = st.lists(st.tuples(ids_and_supervised, names), min_size=1, max_size=5)


@settings(deadline=None)
@given(documents, st.lists(st.integers(0, 2**40), min_size=7, max_size=7))
def test_stored_documents_have_one_object_for_each_id(tmp_path_factory, parts, numbers):
    made = []
    for pairs, name in parts:
        ids = [i for i, _ in pairs]
        # The last position has no next token.
        labels = [n if on else __ for n, (_, on) in zip(ids[1:], pairs, strict=False)] + [__]
        made.append(Document(ids, labels, name))
    folder, samples = tmp_path_factory.mktemp("store"), [sample("x")]
    load_or_render(folder, samples, bytes, lambda: (made, Counts(*numbers)))
    found, counts = load_or_render(folder, samples, bytes, refuse)
    assert (found, counts) == (made, Counts(*numbers))
    objects = {}
    assert all(objects.setdefault(i, i) is i for d in found for i in d.input_ids)


def test_another_sample_or_setting_or_order_has_another_file(tmp_path):
    two = [sample("a"), sample("b")]
    first, second = (([Document([2, 5], [5, __], name)], Counts()) for name in "ab")
    assert load_or_render(tmp_path, two, lambda: b"x", lambda: first) == first
    assert load_or_render(tmp_path, two, lambda: b"y", lambda: second) == second
    for samples in (two[::-1], two[:1], [two[0], sample("b", "no")], [two[0], sample("c")]):
        assert load_or_render(tmp_path, samples, lambda: b"x", lambda: second) == second
    assert load_or_render(tmp_path, two, lambda: b"x", refuse) == first


def test_few_samples_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_SAMPLES", 2)
    assert load_or_render(tmp_path / "new", [sample("a")], bytes, lambda: "rendered") == "rendered"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "no archive"])
def test_a_damaged_file_is_written_again(tmp_path, damage):
    load_or_render(tmp_path, [sample("a")], bytes, lambda: RENDERED)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "no archive": b"PK nonsense"}
    file.write_bytes(contents[damage])
    assert load_or_render(tmp_path, [sample("a")], bytes, lambda: RENDERED) == RENDERED
    assert load_or_render(tmp_path, [sample("a")], bytes, refuse) == RENDERED
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_stores_nothing(tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert load_or_render(tmp_path / "file", [sample("a")], bytes, lambda: RENDERED) == RENDERED


def test_the_least_recently_used_file_is_removed(tmp_path, monkeypatch):
    for second, key in enumerate((b"1", b"2", b"1", b"3"), 1):
        load_or_render(tmp_path, [sample("a")], lambda key=key: key, lambda: RENDERED)
        for file in tmp_path.iterdir():
            if file.stat().st_mtime > 1000:  # This call wrote or used the file.
                os.utime(file, (second, second))
        monkeypatch.setattr(token_cache, "MAX_BYTES", 2 * file.stat().st_size)
    assert len(list(tmp_path.iterdir())) == 2
    for key in (b"1", b"3"):
        assert load_or_render(tmp_path, [sample("a")], lambda key=key: key, refuse) == RENDERED


def test_a_file_too_large_for_the_limit_or_the_disk_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    load_or_render(tmp_path, [sample("a")], bytes, lambda: RENDERED)
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "MIN_SAMPLES", 1)
    monkeypatch.setattr(token_cache, "MAX_BYTES", 10)
    load_or_render(tmp_path, [sample("a")], bytes, lambda: RENDERED)
    assert not list(tmp_path.iterdir())


def test_only_the_owner_can_read_the_folder(tmp_path):
    load_or_render(tmp_path / "new", [sample("a")], bytes, lambda: RENDERED)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
