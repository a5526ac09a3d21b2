"""data/rows.py: each kind of row by hand, and the error of each bad row, with its file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SHOWN
from data.rows import Sample, read_samples

GOOD = '{"prompt": "p", "response": "r"}'


@pytest.fixture
def write(tmp_path):
    def write_bytes(content, name="train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_bytes


def problem_of(path, **options):
    with pytest.raises(ValueError) as error:
        read_samples(path, **options)
    return str(error.value)


def test_each_kind_of_row_becomes_the_sample_of_an_example_by_hand(write):
    path = write(
        '{"prompt": "Mask this", "response": "[CITY_1]"}\n'
        '{"instruction": "Translate", "input": "chat", "output": "cat", "source": "a key of their own"}\n'
        '{"instruction": "Greet", "output": "Hi"}\n'
        '{"instruction": "Greet", "input": "", "output": "Hello"}\n'
        "\n"
        '{"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, '
        '{"role": "assistant", "content": "d"}]}\n'
        '{"text": "Once upon a time"}\n'
    )
    samples, problems = read_samples([path])
    assert problems == []
    assert samples == [
        Sample("train.jsonl:1", (("user", "Mask this"), ("assistant", "[CITY_1]")), None),
        Sample("train.jsonl:2", (("user", "Translate\n\nchat"), ("assistant", "cat")), None),
        Sample("train.jsonl:3", (("user", "Greet"), ("assistant", "Hi")), None),
        Sample("train.jsonl:4", (("user", "Greet"), ("assistant", "Hello")), None),
        Sample(
            "train.jsonl:6",
            (("system", "Be brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            None,
        ),
        Sample("train.jsonl:7", None, "Once upon a time"),
    ]


def test_an_array_is_recognized_by_its_content_and_numbered_by_element(write):
    path = write('\n [\n  {"prompt": "p",\n "response": "r"},\n  {"text": "t"}\n]\n', "lab.jsonl")
    assert [sample.id for sample in read_samples(path)[0]] == ["lab.jsonl:[0]", "lab.jsonl:[1]"]


text = st.text(st.characters(codec="utf-8"))


@given(st.lists(st.tuples(text, text), min_size=1), st.booleans())
def test_array_and_jsonl_of_the_same_rows_give_the_same_samples(tmp_path_factory, pairs, ascii_only):
    rows = [{"prompt": prompt, "response": "r" + response} for prompt, response in pairs]
    folder = tmp_path_factory.mktemp("pair")
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    for name, content in (("a.json", array), ("b.jsonl", lines)):
        (folder / name).write_bytes(content.encode())
        messages = [sample.messages for sample in read_samples(folder / name)[0]]
        assert messages == [(("user", row["prompt"]), ("assistant", row["response"])) for row in rows]


@pytest.mark.fault("BOM")
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_bom_and_crlf_change_nothing(write, start, end):
    # U+2028 does not end a line.
    rows = ['{"prompt": "\u00e9 \u2028", "response": "r"}'.encode(), b'{"prompt": "q", "response": "s"}']
    lines, array = end.join(rows) + end, b"[" + (b"," + end).join(rows) + b"]" + end
    for name, content in (("a.jsonl", lines), ("a.json", array)):
        samples, _ = read_samples(write(start + content, name))
        texts = [tuple(content for _, content in sample.messages) for sample in samples]
        assert texts == [("\u00e9 \u2028", "r"), ("q", "s")]


@pytest.mark.fault("BOM")
def test_a_bom_between_joined_files_is_ignored(write):
    assert len(read_samples(write(f"\ufeff{GOOD}\n\ufeff{GOOD}\n"))[0]) == 2


BAD_ROWS = {
    "bad JSON": (b'{"prompt": "p", "response": }', "not JSON: Expecting value at column 29"),
    "endless number": (
        b'{"prompt": "p", "response": ' + b"1" * 5000 + b"}",
        "not JSON: nested too deeply, or an endless number",
    ),
    "a key twice": (
        b'{"prompt": "p", "prompt": "q", "response": "r"}',
        'the same key twice in one object: "prompt"',
    ),
    "two rows on a line": (b'{"text": "a"}{"text": "b"}', "not JSON: Extra data at column 14"),
    "bad UTF-8": (b'{"prompt": "caf\xe9", "response": "r"}', "not UTF-8: byte 0xe9 at character 16"),
    "half a pair": (rb'{"prompt": "\ud83d", "response": "r"}', '"prompt" has half a surrogate pair'),
    "missing key": (b'{"prompt": "p"}', 'missing key "response"'),
    "missing output": (b'{"instruction": "p", "input": "i"}', 'missing key "output"'),
    "empty response": (b'{"prompt": "p", "response": ""}', 'empty response ("response")'),
    "blank response": (b'{"prompt": "p", "response": " \\n"}', 'empty response ("response")'),
    "response is a number": (
        b'{"prompt": "p", "response": 5}',
        '"response" must be a string, not a number (5)',
    ),
    "response is null": (b'{"prompt": "p", "response": null}', '"response" must be a string, not null'),
    "input is a list": (
        b'{"instruction": "p", "input": ["i"], "output": "r"}',
        '"input" must be a string, not a list (["i"])',
    ),
    "input is zero": (
        b'{"instruction": "p", "input": 0, "output": "r"}',
        '"input" must be a string, not a number (0)',
    ),
    "unknown row": (b'{"question": "p", "answer": "r"}', 'unknown row, its keys are: "question", "answer"'),
    "no object": (b'"just text"', 'a row must be an object, not a string ("just text")'),
    "empty text": (b'{"text": " "}', 'empty text ("text")'),
    "no turns": (b'{"messages": []}', '"messages" must be a list of turns, not an empty list'),
    "turn without content": (b'{"messages": [{"role": "user"}]}', 'messages[0]: missing key "content"'),
    "turn is a string": (b'{"messages": ["hi"]}', 'messages[0] must be an object, not a string ("hi")'),
    "empty answer": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        "messages[1]: empty response",
    ),
    "ends with user": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "ending with assistant; got user",
    ),
    "late system": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
        b'{"role": "assistant", "content": "c"}]}',
        "got user, system, assistant",
    ),
    "foreign role": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}',
        "got user, narrator",
    ),
}


@pytest.mark.fault("bad row")
@pytest.mark.parametrize("row,message", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_an_error_with_file_and_line_or_a_counted_skip(write, row, message):
    path = write(GOOD.encode() + b"\r\n" + row + b"\r\n" + GOOD.encode())
    error = problem_of(path)
    assert "train.jsonl:2: " in error and message in error and 'data.on_bad = "skip"' in error
    samples, (problem,) = read_samples(path, on_bad="skip")
    assert [sample.id for sample in samples] == ["train.jsonl:1", "train.jsonl:3"]
    assert problem.startswith("train.jsonl:2: ")


@pytest.mark.fault("bad row")
def test_a_bad_array_element_is_reported_with_line_and_element(write):
    path = write(b'[\n{"text": "a"},\n{"text": "caf\xe9"},\n\n{"text": 1}]', "lab.json")
    samples, problems = read_samples(path, on_bad="skip")
    assert [sample.id for sample in samples] == ["lab.json:[0]"]
    assert problems == [
        "lab.json:3: element [1]: not UTF-8: byte 0xe9 at character 14",
        'lab.json:5: element [2]: "text" must be a string, not a number (1)',
    ]


@pytest.mark.fault("bad row")
def test_the_problems_of_all_files_are_in_one_error_of_bounded_length(write):
    first, second = write("{}\n" * 15, "a.jsonl"), write("[]\n" + "{}\n" * 14, "b.jsonl")
    error = problem_of([first, second], format="jsonl")
    assert error.startswith("30 problems in the data:\n  a.jsonl:1: ")
    assert "a.jsonl:15: " in error
    assert "b.jsonl:1: a row must be an object, not an empty list" in error
    assert f"... and {30 - SHOWN} more" in error
    assert len(error.splitlines()) == SHOWN + 3


@pytest.mark.parametrize("content", [b"", b" \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_problem_and_never_an_empty_set(write, content):
    empty, good = write(content, "empty.jsonl"), write(GOOD, "good.jsonl")
    assert "empty.jsonl:1: the file is empty" in problem_of([empty, good])
    samples, problems = read_samples([empty, good], on_bad="skip")
    assert (len(samples), problems) == (1, ["empty.jsonl:1: the file is empty"])
    assert "no sample in empty.jsonl" in problem_of(empty, on_bad="skip")


def test_a_repeated_key_is_a_problem_of_its_own_element_only(write):
    path = write('[{"text": "a", "text": "b"},\n{"text": "c"}]', "twice.json")
    samples, (problem,) = read_samples(path, on_bad="skip")
    assert [sample.text for sample in samples] == ["c"]
    assert problem == 'twice.json:1: element [0]: the same key twice in one object: "text"'


@pytest.mark.fault("deep JSON")
def test_an_endless_number_in_an_array_is_reported_with_its_line_and_the_other_problems(write):
    error = problem_of(write('[{"text": ""},\n{"text": ' + "1" * 5000 + "}]", "long.json"))
    assert "long.json:2: not JSON: nested too deeply, or an endless number, after 1 whole element(s)" in error
    assert 'long.json:1: element [0]: empty text ("text")' in error


@pytest.mark.parametrize("end", [', {"te', "", ",]", "] more"])
def test_a_broken_array_is_an_error_even_under_skip(write, end):
    error = problem_of(write('[{"text": "a"}' + end, "cut.json"), on_bad="skip")
    assert "cut.json:1: not JSON" in error and "after 1 whole" in error


def test_a_file_that_is_not_a_complete_array_is_an_error(write):
    assert "Expecting [" in problem_of(write(GOOD), format="json")
    assert "Expecting , or ]" in problem_of(write('[{"text": "a"}', "open.json"))
    assert "not JSON" in problem_of(write("[", "bare.json"))
    assert "no sample in none.json" in problem_of(write("[ ]", "none.json"))


@pytest.mark.fault("no file")
def test_files_that_cannot_be_read_are_all_named(write, tmp_path):
    utf16 = write("\ufeff{}".encode("utf-16-le"), "wide.jsonl")
    error = problem_of([tmp_path / "missing.jsonl", tmp_path, utf16], on_bad="skip")
    assert "missing.jsonl: cannot be read: No such file" in error
    assert "cannot be read: Is a directory" in error
    assert "wide.jsonl:1: the file is UTF-16" in error


def test_ids_stay_unique_when_two_folders_hold_the_same_name(write):
    paths = [write(GOOD, "a/train.jsonl"), write(GOOD, "b/train.jsonl")]
    assert [sample.id for sample in read_samples(paths)[0]] == [f"{path}:1" for path in paths]


# --- preferences


CHOSEN, REJECTED = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
USER = {"role": "user", "content": "Is it?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it?", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"chosen": "Is it? yes", "rejected": "Is it? no"},
    ],
    ids=["strings", "messages", "mixed", "implicit prompt of messages", "implicit prompt of words"],
)
def test_trls_preference_rows_give_the_prompt_and_both_answers(write, row):
    (sample,), _ = read_samples(write(json.dumps(row)))
    assert sample.messages == (("user", "Is it?"), ("assistant", "yes"))
    assert sample.rejected == "no"


@pytest.mark.parametrize(
    "chosen, rejected", [("Berlin", "Bern"), ("Bern", "Bern now"), ("Bern now", "Bern")], ids=str
)
def test_an_implicit_prompt_ends_between_words(write, chosen, rejected):
    row = {"chosen": f"The capital is {chosen}", "rejected": f"The capital is {rejected}"}
    (sample,), _ = read_samples(write(json.dumps(row)))
    assert sample.messages == (("user", "The capital is"), ("assistant", chosen))
    assert sample.rejected == rejected


def test_prompts_that_differ_in_white_space_at_their_ends_are_the_same_prompt(write):
    row = {"chosen": [USER, CHOSEN], "rejected": [USER | {"content": "Is it? "}, REJECTED]}
    assert read_samples(write(json.dumps(row)))[0][0].rejected == "no"


@pytest.mark.parametrize(
    "row, told",
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": None},
            '"rejected": the answer must be a string or a list of messages, not null',
        ),
        ({"prompt": "q", "chosen": "a"}, 'missing key "rejected"'),
        ({"rejected": "so is it"}, 'missing key "chosen"'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "a \n"}, "are the same answer"),
        ({"chosen": "the same words", "rejected": "the same words"}, "are the same answer"),
        ({"chosen": "so ", "rejected": "so it is"}, "empty response"),
        (
            {"prompt": {"q": 1}, "chosen": "a", "rejected": "b"},
            "the prompt must be a string or a list of messages",
        ),
        (
            {"chosen": [USER, CHOSEN], "rejected": [USER | {"content": "So?"}, REJECTED]},
            "must share the prompt",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, '"chosen": roles must be'),
        ({"chosen": "yes", "rejected": "no"}, 'add the key "prompt"'),
    ],
)
def test_a_faulty_preference_row_is_an_error_that_names_the_key(write, row, told):
    assert told in problem_of(write(json.dumps(row)))


@pytest.mark.parametrize(
    "row", [{"prompt": "q"}, {"messages": [USER | {"content": "q"}]}, {"instruction": "q"}]
)
def test_a_prompt_alone_is_a_sample_only_where_no_response_is_needed(write, row):
    file = write(json.dumps(row))
    (sample,), _ = read_samples(file, needs_response=False)
    assert sample.messages == (("user", "q"), ("assistant", ""))
    assert problem_of(file)


def test_a_row_with_its_response_keeps_it_where_none_is_needed(write):
    file = write(json.dumps({"prompt": "q", "response": "a"}))
    assert read_samples(file, needs_response=False) == read_samples(file)
