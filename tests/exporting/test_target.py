"""exporting/target.py: an export appears whole or not at all, and replaces only an earlier export."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from exporting.target import need_space, new_path, refuse_existing
from ggml.container import GGUFFile, write_gguf
from tests.folders import ROOT


def test_the_name_appears_at_the_end_of_the_block_and_not_before(tmp_path):
    with new_path(tmp_path / "a" / "b.gguf") as part:
        part.write_bytes(b"GGUF")
        assert not (tmp_path / "a" / "b.gguf").exists()
    assert (tmp_path / "a" / "b.gguf").read_bytes() == b"GGUF" and [
        p.name for p in (tmp_path / "a").iterdir()
    ] == ["b.gguf"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path, folder):
    out = tmp_path / "out"
    if folder:
        out.mkdir()
        (out / "config.json").write_text("old")
    else:
        out.write_text("old")
    with pytest.raises(RuntimeError), new_path(out) as part:
        part.mkdir() if folder else part.write_text("half")
        raise RuntimeError
    assert (out / "config.json" if folder else out).read_text() == "old" and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(ValueError, match="cannot be written .No space left on device.; make room there"),
        new_path(tmp_path / "new" / "x") as part,
    ):
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_read_only_is_one_line(tmp_path, monkeypatch):
    """On such a disk, removing a file that does not exist fails too."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with (
        pytest.raises(ValueError, match="cannot be written .Read-only file system."),
        new_path(tmp_path / "x.gguf"),
    ):
        pass


@pytest.mark.fault("kill in an export")
def test_what_a_killed_export_left_is_swept_away_by_the_next(tmp_path):
    (tmp_path / ".x.gguf.part").write_text("half")
    (tmp_path / ".x.gguf.lock").write_text("")  # the lock itself went with the process
    with new_path(tmp_path / "x.gguf") as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_second_export_to_the_same_name_is_refused_and_does_not_touch_the_firsts_file(tmp_path):
    out = tmp_path / "new" / "x.gguf"
    with new_path(out) as part:
        part.write_text("first")
        with (
            pytest.raises(
                ValueError,
                match="x.gguf: another export is writing it now; wait for it, or give another --out",
            ),
            new_path(out),
        ):
            pass
        with new_path(out.with_name("y.gguf")) as other:
            other.write_text("another name")
        assert part.read_text() == "first"
    assert out.read_text() == "first" and {p.name for p in out.parent.iterdir()} == {"x.gguf", "y.gguf"}


def test_only_an_earlier_export_of_the_same_kind_is_replaced(tmp_path):
    (tmp_path / "letter.gguf").write_text("Dear Ann")
    (tmp_path / "downloaded.gguf").write_bytes(b"GGUF...")
    write_gguf(tmp_path / "model.gguf", {"loupe.version": ("str", "1")}, [], lambda name: [])
    refuse_existing(tmp_path / "model.gguf", True, folder=False)
    for out, folder in (
        (tmp_path / "letter.gguf", False),
        (tmp_path / "downloaded.gguf", False),
        (tmp_path, False),
        (tmp_path / "model.gguf", True),
    ):
        with pytest.raises(ValueError, match="no earlier export"):
            refuse_existing(out, True, folder=folder)
    with pytest.raises(ValueError, match="--force"):
        refuse_existing(tmp_path / "model.gguf", False, folder=False)


def test_a_name_that_is_too_long_is_refused_and_so_is_one_that_leaves_no_room_for_the_temporary_ones(
    tmp_path,
):
    with pytest.raises(ValueError, match="cannot be written .File name too long.; give another --out"):
        refuse_existing(tmp_path / ("x" * 256), False, folder=False)
    with (
        pytest.raises(ValueError, match="cannot be written .File name too long."),
        new_path(tmp_path / ("x" * 252)),
    ):
        pass


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(1000 * 2**20))
    need_space(tmp_path / "a" / "x", 984 * 2**20)  # and 16 MiB for small files
    with pytest.raises(ValueError, match=r"needs 2,000 MiB, but .* has 1,000 MiB free"):
        need_space(tmp_path / "a" / "x", 1984 * 2**20)


@pytest.mark.fault("full disk")
def test_a_real_disk_that_fills_up_leaves_nothing(tmp_path):
    """A limit on the size of files has the same effect as a full disk: a write fails, here with EFBIG."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000,) * 2); "
        "import export; sys.exit(export.main(sys.argv[1:]))"
    )
    words = ["--model", "tiny", "--to", "gguf", "--quant", "f16", "--out", str(tmp_path / "x.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "cannot be written (File too large)" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("kill in an export")
def test_a_kill_at_any_moment_leaves_no_file_that_is_not_whole(tmp_path):
    out, part = tmp_path / "x.gguf", tmp_path / ".x.gguf.part"
    words = ["--model", "tiny", "--to", "gguf", "--quant", "q8_0", "--force", "--out", str(out)]

    def writing() -> subprocess.Popen:
        """Starts an export and returns when it has begun to write."""
        command = [sys.executable, str(ROOT / "export.py"), *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while not part.exists() and process.poll() is None:
            time.sleep(0.01)
        return process

    process, start = writing(), time.monotonic()
    assert process.wait() == 0
    seconds, rng, seen = time.monotonic() - start, random.Random(1), 0
    for _ in range(20):
        out.unlink(missing_ok=True)
        process = writing()
        time.sleep(rng.uniform(0, 1.1) * seconds)
        with contextlib.suppress(ProcessLookupError):  # it ended first
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen += part.exists()
        part.unlink(missing_ok=True)
        if out.exists():
            GGUFFile(out)
    assert seen  # some were killed while they wrote


@pytest.mark.fault("kill in an export")
@pytest.mark.parametrize("force", [True, False])
def test_an_export_that_was_killed_between_its_two_renames_is_back_at_the_next_start(tmp_path, force):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "config.json").write_text("{}")
    (tmp_path / ".out.part").mkdir()
    with pytest.raises(ValueError, match="--force"):
        refuse_existing(tmp_path / "out", force, folder=True)
    assert (tmp_path / "out" / "config.json").exists() and os.listdir(tmp_path) == ["out"]


@pytest.mark.fault("user's files")
@pytest.mark.parametrize("name", ["notes.txt", "photos/one.jpg", "pytorch_model.bin", "blobs/sha256/short"])
def test_force_names_what_no_export_wrote_and_replaces_nothing(tmp_path, name):
    (tmp_path / "README.md").write_text("a model, written by Loupe.")
    (tmp_path / "config.json").write_text("{}")
    refuse_existing(tmp_path, True, folder=True)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"holds .*{name}, which no export wrote"):
        refuse_existing(tmp_path, True, folder=True)


@pytest.mark.fault("user's files")
def test_force_replaces_no_model_folder_of_the_users(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("My model")
    with pytest.raises(ValueError, match="is no earlier export"):
        refuse_existing(tmp_path, True, folder=True)
