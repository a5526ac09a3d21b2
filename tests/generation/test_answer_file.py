"""The file of answers: in order, going on where it broke off, and never over a file of something else."""

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


def test_answers_that_come_out_of_order_are_written_in_order_as_soon_as_they_can_be(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, PROMPTS, "m") as file:
        file.add(1, "B", "length")
        assert path.read_bytes() == b""
        assert (
            (tmp_path / "out.jsonl.waiting").read_bytes()
            == b"""1\t{"prompt": "two \\"2\\"", "response": "B", "stop_reason": "length", "made_by": "m"}\n"""
        )
        file.add(0, "A", "stop")
        assert rows(path) == [("one", "A", "stop", "m"), ('two "2"', "B", "length", "m")]
        file.add(2, "C", "stop")
    assert [list(json.loads(line)) for line in path.read_bytes().splitlines()] == [KEYS] * 3
    assert rows(path)[2] == (PROMPTS[2], "C", "stop", "m") and list(tmp_path.iterdir()) == [path]


def test_wherever_a_file_breaks_off_it_is_finished_to_the_same_bytes(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "part.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert (
            write(path, missing=[0, 1, 2][whole[:cut].count(b"\n") :]).read_bytes() == whole
            and not (tmp_path / "part.jsonl.waiting").exists()
        )


def test_an_answer_that_waits_for_an_earlier_row_is_there_for_the_next_run_wherever_it_breaks_off(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    path, beside = tmp_path / "part.jsonl", tmp_path / "part.jsonl.waiting"
    with AnswerFile(path, PROMPTS, "m") as file:
        for number in (2, 1):
            file.add(number, f"answer to {PROMPTS[number]}", "stop")
    waiting = beside.read_bytes()
    assert path.read_bytes() == b"" and waiting.count(b"\n") == 2
    for cut in range(len(waiting) + 1):
        path.write_bytes(b"")
        beside.write_bytes(waiting[:cut])
        assert (
            write(path, missing=[[0, 1, 2], [0, 1], [0]][waiting[:cut].count(b"\n")]).read_bytes() == whole
            and not beside.exists()
        )


def test_a_run_that_was_killed_between_an_answer_and_those_that_waited_for_it_leaves_none_out(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    first, *_ = whole.split(b"\n")
    path, beside = tmp_path / "part.jsonl", tmp_path / "part.jsonl.waiting"
    path.write_bytes(first + b"\n")
    beside.write_bytes(b"".join(b"%d\t%b\n" % (i, line) for i, line in enumerate(whole.split(b"\n")[:3])))
    assert write(path, missing=[]).read_bytes() == whole and not beside.exists()


def test_whoever_interrupts_a_row_that_is_being_written_loses_no_answer(tmp_path, monkeypatch):
    """Row 1 waits for row 0, whose line is written, and the line of row 1 is not."""
    path, left = tmp_path / "out.jsonl", [1]

    def interrupted(lines, line, add=_LineFile.append):
        if lines.path == path and not left:
            raise KeyboardInterrupt
        add(lines, line)
        if lines.path == path:
            left.pop()

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt), AnswerFile(path, PROMPTS, "m") as file:
        m.setattr("generation.answer_file._LineFile.append", interrupted)
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


def test_rows_that_the_input_gained_are_answered_too(tmp_path):
    path = write(tmp_path / "out.jsonl", PROMPTS[:2])
    assert write(path).read_bytes() == write(tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out.jsonl", "a note without an end", "does not answer row 1 of"),
        ("out.jsonl", '{"prompt": "one", "response": "my own", "label": 3}\n', "was made by another"),
        ("out.jsonl", '{"prompt": "another"', "does not answer row 1 of"),
        ("out.jsonl", '{"prompt":"one"}\n', "does not answer row 1 of"),
        ("out.jsonl", "\n", "was made by another"),
        ("out.jsonl.waiting", "a note without an end", "answers none of the input's 3 rows"),
        ("out.jsonl.waiting", '3\t{"prompt": "one"', "answers none of the input's 3 rows"),
        ("out.jsonl.waiting", '1\t{"prompt": "one"', "does not answer row 2 of"),
        ("out.jsonl.waiting", "2\n", "was made by another"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"line 1 of {path} {message}"):
        AnswerFile(tmp_path / "out.jsonl", PROMPTS, "m")
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("prompts", "made_by", "message"),
    [
        (["zero", *PROMPTS[1:]], "m", "line 1 of .* does not answer row 1"),
        (PROMPTS[:2], "m", "line 3 of .* answers none of the input's 2 rows"),
        (PROMPTS, "n", "line 1 of .* was made by another model"),
    ],
)
def test_the_answers_of_another_run_are_refused_and_left_alone(tmp_path, prompts, made_by, message):
    path = write(tmp_path / "out.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswerFile(path, prompts, made_by)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_and_one_in_the_place_of_the_file_are_told(tmp_path):
    with pytest.raises(ValueError, match="no/out.jsonl cannot be written: No such file"):
        write(tmp_path / "no" / "out.jsonl")
    (tmp_path / "out.jsonl.waiting").mkdir()
    with pytest.raises(ValueError, match="out.jsonl.waiting cannot be read: Is a directory"):
        write(tmp_path / "out.jsonl")


def test_what_to_remove_is_named_with_what_waits_beside_it(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, PROMPTS, "m") as file:
        file.add(2, "C", "stop")
        file.add(0, "A", "stop")
    with pytest.raises(ValueError, match=f"or remove {path} and {path}.waiting$"):
        AnswerFile(path, PROMPTS, "n")
