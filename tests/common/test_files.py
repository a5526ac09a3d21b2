"""common/files.py: a path has its whole old or whole new content, whatever happens during a write."""

import os
from types import SimpleNamespace

import pytest

from common.files import (
    lock,
    making,
    moved,
    need_space,
    read_json,
    recover,
    replacing,
    sha256,
    write_together,
)


def content(path):
    """Returns {relative path: bytes} of all files in a folder."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def write(path, folder, text):
    if folder:
        path.mkdir()
    (path / "a" if folder else path).write_text(text)


def test_sha256_of_the_example_in_fips_180_2(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # Example B.1.
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("folder", [False, True])
def test_a_path_has_its_old_content_until_replacing_ends_and_then_the_new(tmp_path, folder):
    path, name = tmp_path / "x", "x/a" if folder else "x"
    write(path, folder, "old")
    with replacing(path) as part:
        write(part, folder, "new")
        assert content(tmp_path)[name] == b"old"
    assert content(tmp_path) == {name: b"new"} and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("step", ["block", "fsync", "replace"])
def test_a_write_that_fails_does_not_change_the_old_content(tmp_path, monkeypatch, folder, step):
    path = tmp_path / "x"
    write(path, folder, "old")
    before, work = content(tmp_path), os.replace

    def fail(source, *rest):
        if step == "fsync" or str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        return work(source, *rest)

    with monkeypatch.context() as patch:
        if step != "block":
            patch.setattr(os, step, fail)
        with pytest.raises(OSError), replacing(path) as part:
            write(part, folder, "half")
            if step == "block":
                raise OSError
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_never_becomes_a_file_nor_a_file_a_folder(tmp_path, folder):
    write(tmp_path / "x", folder, "old")
    before = content(tmp_path)
    with pytest.raises((IsADirectoryError, NotADirectoryError)), replacing(tmp_path / "x") as part:
        write(part, not folder, "new")
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["x"]


def test_a_folder_appears_whole_and_the_first_of_two_makers_wins(tmp_path):
    with making(tmp_path / "cache" / "x") as late:
        (late / "a").write_text("late")
        assert not (tmp_path / "cache" / "x").exists()
        with making(tmp_path / "cache" / "x") as early:
            (early / "a").write_text("early")
    assert (tmp_path / "cache" / "x" / "a").read_text() == "early"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["x"]


def test_a_folder_that_could_not_be_made_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), making(tmp_path / "x") as part:
        (part / "a").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []


def test_recover_restores_a_folder_whose_replacement_is_missing_and_removes_the_rest(tmp_path):
    write(tmp_path / ".x.old", True, "old")
    write(tmp_path / ".x.part", True, "half")
    recover(tmp_path / "x")
    assert content(tmp_path) == {"x/a": b"old"}
    write(tmp_path / ".x.old", True, "older")
    recover(tmp_path / "x")
    assert content(tmp_path) == {"x/a": b"old"}


def test_write_together_changes_all_files_or_none(tmp_path):
    write_together(tmp_path, {"a": [b"1", b"2"], "b": [b"3"]})
    assert content(tmp_path) == {"a": b"12", "b": b"3"}

    def pieces():
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_together(tmp_path, {"a": [b"new"], "b": pieces()})
    assert content(tmp_path) == {"a": b"12", "b": b"3"}


def test_a_file_has_one_lock_holder_and_a_removed_file_has_none(tmp_path):
    with open(tmp_path / "a", "w") as first, open(tmp_path / "a", "w") as second:
        assert lock(first) and not lock(second)
        first.close()
        assert lock(second)
    with open(tmp_path / "a", "w") as file:
        (tmp_path / "a").unlink()
        assert not lock(file)


def test_too_little_space_is_an_error_with_both_sizes_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    need_space(tmp_path / "new" / "x", 5 * 2**20, "the run", "set run.dir")
    with pytest.raises(ValueError) as error:
        need_space(tmp_path / "new" / "x", 6 * 2**20, "the run", "set run.dir")
    for fact in (str(tmp_path), "the run", "6 MiB", "5 MiB", "set run.dir"):
        assert fact in str(error.value)


BAD_JSON = [(None, "no such file"), ("", "JSON"), ("{", "JSON"), ("\x00", "JSON"), ("[1]", "object")]


@pytest.mark.parametrize("text, reason", BAD_JSON)
def test_a_json_file_is_an_object_or_an_error_with_the_path_the_reason_and_the_remedy(tmp_path, text, reason):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_json(path, "download it again")
    assert all(fact in str(error.value) for fact in (str(path), reason, "download it again"))
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(path, "") == {"a": "ü"}


def test_an_old_path_of_our_own_files_is_found_at_its_new_place_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert moved("model/tiny") == "model/tiny", "nothing lies at the new place"
    (tmp_path / "assets" / "tiny").mkdir(parents=True)
    assert moved("model/tiny", "--model: ") == "assets/tiny"
    assert "--model: model/tiny is now assets/tiny" in capsys.readouterr().err
    (tmp_path / "model" / "tiny").mkdir(parents=True)
    assert moved("model/tiny") == "model/tiny", "a folder of the user's own comes first"
    assert (moved("elsewhere"), moved(3), capsys.readouterr().err) == ("elsewhere", 3, "")
