"""generation/answer_file.py: rows in order, a resume after any interruption, foreign files not changed."""

import json

import pytest

from generation.answer_file import AnswerFile, _LineFile

KEYS = ["prompt", "response", "stop_reason", "made_by"]
PROMPTS = ["one", 'two "2"', "drei\n\u2028 \U0001f689"]


def rows(path) -> list[tuple]:
    return [tuple(json.loads(line).values()) for line in path.read_bytes().splitlines()]


def write(path, prompts=PROMPTS, missing=None):
    with AnswerFile(path, prompts, "m") as file:
        assert missing in (None, file.missing)
        for number in reversed(file.missing):
            file.add(number, f"answer to {prompts[number]}", "stop")
    return path


def test_answers_that_arrive_out_of_order_are_written_in_order_as_early_as_possible(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, PROMPTS, "m") as file:
        file.add(1, "B", "length")
        assert path.read_bytes() == b""
        waiting = b'1\t{"prompt": "two \\"2\\"", "response": "B", "stop_reason": "length", "made_by": "m"}\n'
        assert (tmp_path / "out.jsonl.waiting").read_bytes() == waiting
        file.add(0, "A", "stop")
        assert rows(path) == [("one", "A", "stop", "m"), ('two "2"', "B", "length", "m")]
        file.add(2, "C", "stop")
    assert [list(json.loads(line)) for line in path.read_bytes().splitlines()] == [KEYS] * 3
    assert rows(path)[2] == (PROMPTS[2], "C", "stop", "m") and list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("lost answer")
def test_a_file_truncated_at_any_byte_is_completed_to_the_same_bytes(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "part.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert write(path, missing=[0, 1, 2][whole[:cut].count(b"\n") :]).read_bytes() == whole
        assert not (tmp_path / "part.jsonl.waiting").exists()


def test_the_next_run_reads_the_waiting_answers_of_a_file_truncated_at_any_byte(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    path, waiting_path = tmp_path / "part.jsonl", tmp_path / "part.jsonl.waiting"
    with AnswerFile(path, PROMPTS, "m") as file:
        for number in (2, 1):
            file.add(number, f"answer to {PROMPTS[number]}", "stop")
    waiting = waiting_path.read_bytes()
    assert path.read_bytes() == b"" and waiting.count(b"\n") == 2
    for cut in range(len(waiting) + 1):
        path.write_bytes(b"")
        waiting_path.write_bytes(waiting[:cut])
        missing = [[0, 1, 2], [0, 1], [0]][waiting[:cut].count(b"\n")]
        assert write(path, missing=missing).read_bytes() == whole and not waiting_path.exists()


@pytest.mark.fault("lost answer")
def test_a_run_killed_between_a_row_and_the_rows_that_waited_for_it_loses_none(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines()
    path, waiting_path = tmp_path / "part.jsonl", tmp_path / "part.jsonl.waiting"
    path.write_bytes(lines[0] + b"\n")
    waiting_path.write_bytes(b"".join(b"%d\t%b\n" % (i, line) for i, line in enumerate(lines)))
    assert write(path, missing=[]).read_bytes() == whole and not waiting_path.exists()


def test_an_interrupt_between_two_lines_loses_no_answer(tmp_path, monkeypatch):
    """Row 1 waits for row 0; the interrupt comes after the line of row 0 and before that of row 1."""
    path, written = tmp_path / "out.jsonl", []

    def append(lines, line, original=_LineFile.append):
        if lines.path == path and written:
            raise KeyboardInterrupt
        original(lines, line)
        if lines.path == path:
            written.append(line)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt), AnswerFile(path, PROMPTS, "m") as file:
        m.setattr("generation.answer_file._LineFile.append", append)
        file.add(1, f"answer to {PROMPTS[1]}", "stop")
        file.add(0, f"answer to {PROMPTS[0]}", "stop")
    assert len(rows(path)) == 1
    assert write(path, missing=[2]).read_bytes() == write(tmp_path / "whole.jsonl").read_bytes()


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, PROMPTS, "m") as file:
        file.add(1, f"answer to {PROMPTS[1]}", "stop")
        with pytest.raises(ValueError, match="another process is writing"):
            AnswerFile(path, PROMPTS, "m").__enter__()
    assert write(path, missing=[0, 2]).read_bytes() == write(tmp_path / "whole.jsonl").read_bytes()


def test_rows_appended_to_the_input_are_answered(tmp_path):
    path = write(tmp_path / "out.jsonl", PROMPTS[:2])
    assert write(path).read_bytes() == write(tmp_path / "whole.jsonl").read_bytes()


FOREIGN = [
    ("out.jsonl", "a note without an end", "does not answer row 1 of"),
    ("out.jsonl", '{"prompt": "one", "response": "my own", "label": 3}\n', "was made by another"),
    ("out.jsonl", '{"prompt": "another"', "does not answer row 1 of"),
    ("out.jsonl", '{"prompt":"one"}\n', "does not answer row 1 of"),
    ("out.jsonl", "\n", "was made by another"),
    ("out.jsonl.waiting", "a note without an end", "answers none of the input's 3 rows"),
    ("out.jsonl.waiting", '3\t{"prompt": "one"', "answers none of the input's 3 rows"),
    ("out.jsonl.waiting", '1\t{"prompt": "one"', "does not answer row 2 of"),
    ("out.jsonl.waiting", "2\n", "was made by another"),
]


@pytest.mark.parametrize("name, content, message", FOREIGN)
def test_a_foreign_file_is_refused_and_not_changed(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"line 1 of {path} {message}"):
        AnswerFile(tmp_path / "out.jsonl", PROMPTS, "m")
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


OTHER_RUNS = [
    (["zero", *PROMPTS[1:]], "m", "line 1 of .* does not answer row 1"),
    (PROMPTS[:2], "m", "line 3 of .* answers none of the input's 2 rows"),
    (PROMPTS, "n", "line 1 of .* was made by another model"),
]


@pytest.mark.parametrize("prompts, made_by, message", OTHER_RUNS)
def test_the_answers_of_another_run_are_refused_and_not_changed(tmp_path, prompts, made_by, message):
    path = write(tmp_path / "out.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswerFile(path, prompts, made_by)
    assert path.read_bytes() == before


def test_a_missing_folder_and_a_folder_instead_of_the_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no/out.jsonl cannot be written: No such file"):
        write(tmp_path / "no" / "out.jsonl")
    (tmp_path / "out.jsonl.waiting").mkdir()
    with pytest.raises(ValueError, match="out.jsonl.waiting cannot be read: Is a directory"):
        write(tmp_path / "out.jsonl")


def test_the_error_names_the_file_and_the_waiting_file_to_remove(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, PROMPTS, "m") as file:
        file.add(2, "C", "stop")
        file.add(0, "A", "stop")
    with pytest.raises(ValueError, match=f"or remove {path} and {path}.waiting$"):
        AnswerFile(path, PROMPTS, "n")
