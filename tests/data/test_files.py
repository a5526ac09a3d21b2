"""data/files.py: the same rows from every kind of file, and one line for a file that cannot be read."""

import gzip
import json
import os
import sys

import pytest

from data.rows import read_prompts, read_samples

ROWS = [{"prompt": "What colour is the sky?", "response": "Blue."}, {"prompt": "2 + 2?", "response": "Four."}]
JSONL = "\n".join(map(json.dumps, ROWS))
CSV = 'prompt,response\n"What colour is the sky?","Blue."\n"2 + 2?","Four."\n'
# Each file, and the ids of its two rows.
FILES = {
    "pretty.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS), [":1", ":5"]),
    "pretty.json": (json.dumps(ROWS, indent=2), [":[0]", ":[1]"]),
    "nested.json": (json.dumps({"version": 1, "data": ROWS}, indent=2), [":[0]", ":[1]"]),
    "flat.json": (json.dumps({"data": ROWS}), [":[0]", ":[1]"]),
    "d.csv": (CSV, [":2", ":3"]),
    "semicolons.csv": (CSV.replace(",", ";"), [":2", ":3"]),
    "excel.CSV": ("\ufeff" + CSV.replace("\n", "\r\n"), [":2", ":3"]),
    "d.tsv": (CSV.replace(",", "\t"), [":2", ":3"]),
    "rows.txt": (JSONL, [":1", ":2"]),
    "d.jsonl.gz": (gzip.compress(JSONL.encode(), mtime=0), [":1", ":2"]),
    "d.csv.gz": (gzip.compress(CSV.encode(), mtime=0), [":2", ":3"]),
}


@pytest.fixture
def write(tmp_path):
    def write_bytes(content, name):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_bytes


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        read_samples(path, **options)
    return str(error.value)


@pytest.mark.fault("formats")
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_samples_and_prompts(write, name):
    content, ids = FILES[name]
    path = write(content, name)
    samples, problems = read_samples(path)
    assert not problems and [sample.id.removeprefix(name) for sample in samples] == ids
    pairs = [(("user", row["prompt"]), ("assistant", row["response"])) for row in ROWS]
    assert [sample.messages for sample in samples] == pairs
    if name != "rows.txt":  # each line of a text is a prompt
        assert [sample.messages for sample in read_prompts(path)] == [pair[:1] for pair in pairs]


def test_parquet_is_read_with_pyarrow(write):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = write("", "d.parquet")
    rows = [*ROWS, {"prompt": "x", "response": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    samples, problems = read_samples(path, on_bad="skip")
    assert [sample.id for sample in samples] == ["d.parquet:[0]", "d.parquet:[1]"]
    assert problems == ['d.parquet: row [2]: "response" must be a string, not null']
    cut = write(path.read_bytes()[:100], "cut.parquet")
    assert "cut.parquet: damaged parquet data" in refused(cut)


@pytest.mark.fault("formats")
def test_parquet_without_pyarrow_says_how_to_get_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install -e ".[parquet]"' in refused(write(b"PAR1 and so on", "d.parquet"))


@pytest.mark.fault("formats")
def test_a_paragraph_of_a_text_is_a_sample_and_may_begin_with_a_bracket(write):
    text = "[1] The sky is blue.\r\nTwo and two\r\n\r\n \r\n  A new paragraph.\r\n"
    samples, _ = read_samples(write(text, "corpus.txt"))
    found = [(sample.id, sample.text) for sample in samples]
    assert found == [
        ("corpus.txt:1", "[1] The sky is blue.\nTwo and two"),
        ("corpus.txt:5", "  A new paragraph."),
    ]
    assert [sample.text for sample in read_samples(write("a\n\nb", "x"), format="txt")[0]] == ["a", "b"]


@pytest.mark.fault("nested")
def test_rows_inside_an_object_are_said_and_several_lists_of_them_are_refused(write, capsys):
    read_samples(write(json.dumps({"version": 1, "data": ROWS}), "nested.json"))
    assert 'the rows are those of the key "data"' in capsys.readouterr().err
    both = refused(write(json.dumps({"train": ROWS, "test": ROWS}), "both.json"))
    assert 'both.json:1: one object, whose keys "train" and "test" hold rows; save each list' in both
    one = {"prompt": "a", "response": "b", "spans": [{"start": 0}]}
    assert len(read_samples(write(json.dumps(one), "one.json"))[0]) == 1


@pytest.mark.fault("nested")
def test_a_fault_in_pretty_printed_objects_is_one_error_with_its_line_even_under_skip(write):
    text = FILES["pretty.jsonl"][0].replace('"2 + 2?",', '"2 + 2?"')
    error = refused(write(text, "pretty.jsonl"), on_bad="skip")
    assert "pretty.jsonl:7: not JSON" in error and "after 1 whole" in error and error.count("\n") == 1


@pytest.mark.fault("formats")
@pytest.mark.parametrize(
    "content, told",
    [
        ("prompt,response\na,b\nc\n", "d.csv:3: 1 fields, but the first line has 2"),
        ("prompt,response\na,b,c\n", "d.csv:2: 3 fields"),
        ('prompt,response\na,b\n"c,d\n', "d.csv:3: not CSV"),
        ("prompt,prompt\na,b\n", "d.csv:1: the same column twice"),
        (b"prompt,response\na,caf\xe9\n", "d.csv:2: not UTF-8: byte 0xe9"),
        ("prompt,response\na,\n", 'd.csv:2: empty response ("response")'),
        ("prompt,response\n", "no sample in d.csv"),
    ],
)
def test_a_fault_in_csv_has_its_line(write, content, told):
    assert told in refused(write(content, "d.csv"))


def test_a_csv_field_may_have_lines_and_more_than_128_kib(write):
    long = "a\n" * 70_000
    samples, _ = read_samples(write(f'prompt,response\n"{long}",b\nc,d\n', "d.csv"))
    assert [sample.id for sample in samples] == ["d.csv:2", "d.csv:70003"]
    assert samples[0].messages[0] == ("user", long)


@pytest.mark.parametrize(
    "content, told",
    [
        (gzip.compress(JSONL.encode(), mtime=0)[:-9], "damaged gzip data"),
        (b"\x1f\x8bno gzip", "damaged gzip data"),
        (gzip.compress(bytes(10**8), mtime=0), "over 200 times its size"),
        (b"PK\x03\x04\x00\x00", "is no text"),
    ],
)
def test_a_file_that_holds_no_text_is_refused_in_one_line(write, content, told):
    error = refused(write(content, "d.jsonl.gz"), on_bad="skip")
    assert told in error and error.count("\n") == 1


@pytest.mark.fault("no file")
def test_a_pipe_or_a_device_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/stdin", "/dev/zero"):
        error = refused(path)
        assert "is a pipe or a device" in error and "save the rows in a file" in error


@pytest.mark.fault("deep JSON")
@pytest.mark.parametrize("value", ["[" * 10**5, '{"a":' * 10**5, "[" * 980 + "]" * 980, "1" * 5000])
@pytest.mark.parametrize(
    "row", ['{"prompt": %s, "response": "r"}', '[{"text": %s}]', '{"data": [{"a": %s}]}']
)
def test_deep_nesting_and_endless_numbers_are_a_problem_and_no_traceback(write, value, row):
    assert "deep.json" in refused(write(row % value, "deep.json"))
