"""data/row_reader.py, data/turns.py: the rows of other tools, and what would be lost or change in silence."""

import json

import pytest

from common.control_tokens import END_OF_TURN, START_OF_TURN
from data.rows import read_prompts, read_samples

USER, MODEL = f"{START_OF_TURN}user\n", f"{START_OF_TURN}model\n"
PAIR = (("user", "2 + 2?"), ("assistant", "Four."))
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]
SYSTEM = ("system", "Be brief.")
DIALOGUE = (("user", "Hi"), ("assistant", "Hello"), *PAIR)


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    return write_rows


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        read_samples(path, **options)
    return str(error.value)


OTHER_TOOLS = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four."}]},
        PAIR,
    ),
    "ShareGPT with system": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "Four."},
            ]
        },
        (SYSTEM, *PAIR),
    ),
    "ShareGPT with system beside": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four."}],
        },
        (SYSTEM, *PAIR),
    ),
    "conversations of messages": ({"conversations": TURNS}, PAIR),
    "completion": ({"prompt": "2 + 2?", "completion": "Four."}, PAIR),
    "messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PAIR),
    "prompt of messages": ({"prompt": TURNS[:1], "response": "Four."}, PAIR),
    "parts": (
        {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
        PAIR,
    ),
    "role model": ({"messages": [TURNS[0], TURNS[1] | {"role": "model"}]}, PAIR),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]},
        (SYSTEM, *PAIR),
    ),
    "system and history": (
        {
            "instruction": "2 + 2?",
            "input": "",
            "output": "Four.",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        (SYSTEM, *DIALOGUE),
    ),
    "context": (
        {"instruction": "Sum?", "context": "2 and 2", "response": "Four.", "category": "sums"},
        (("user", "Sum?\n\n2 and 2"), PAIR[1]),
    ),
    "empty extras": (
        {"prompt": "2 + 2?", "response": "Four.", "system": "", "history": [], "tools": None, "images": []},
        PAIR,
    ),
}


@pytest.mark.fault("formats", "system")
@pytest.mark.parametrize("row, messages", OTHER_TOOLS.values(), ids=OTHER_TOOLS.keys())
def test_a_row_of_another_tool_is_the_conversation_that_it_means(write, capsys, row, messages):
    path = write(row)
    (sample,), _ = read_samples(path)
    assert sample.messages == messages and capsys.readouterr().err == ""
    assert read_prompts(path)[0].messages == messages[:-1]


@pytest.mark.fault("weight")
def test_a_turn_of_weight_0_and_responses_within_a_prompt_are_not_supervised(write):
    turns = [TURNS[0], TURNS[1] | {"weight": 0}, TURNS[0], TURNS[1] | {"weight": 1}]
    rows = [{"messages": turns}, {"prompt": [*TURNS, TURNS[0]], "completion": "4"}]
    rows += [{"prompt": "a", "response": "b", "history": [["c", "d"]]}]
    assert [sample.unsupervised for sample in read_samples(write(*rows))[0]] == [(1,), (1,), ()]
    turns[1] = TURNS[1] | {"weight": 0.5}
    assert 'messages[1]: "weight" must be 0 or 1' in refused(write({"messages": turns}))


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
LOST = [
    ({"tools": [CALL], "messages": TURNS}, ['"tools"']),
    (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        ['"tool_calls"'],
    ),
    ({"messages": [TURNS[0], TURNS[1] | {"function_call": CALL}]}, ['"function_call" of messages[1]']),
    (
        {"messages": [*TURNS, {"role": "tool", "content": "dry", "tool_call_id": "c"}, TURNS[1]]},
        ['role "tool" of messages[2]', '"tool_call_id"'],
    ),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, ['role "function_call"']),
    ({"prompt": "a", "response": "b", "images": ["a.png"]}, ['"images"']),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}, TURNS[1]]},
        ['part "image" of messages[0]'],
    ),
    ({"prompt": "a", "response": "b", "weight": 0.5}, ['"weight" of the whole row']),
]


@pytest.mark.fault("tools")
@pytest.mark.parametrize("row, keys", LOST)
def test_what_text_cannot_hold_is_refused_in_one_line_that_names_the_keys(write, row, keys):
    head, line, _ = refused(write(row)).split("\n")
    assert head.startswith("1 problem") and "would be lost" in line and "remove these rows" in line
    assert all(key in line for key in keys)


@pytest.mark.fault("label", "other keys")
@pytest.mark.parametrize(
    "row, told",
    [
        ({"text": "a", "label": "b"}, 'data.columns = ["prompt=text", "response=label"]'),
        ({"text": "a", "system": "b"}, '"system" would change what is learnt'),
        ({"messages": TURNS, "context": "b"}, '"context" would change what is learnt'),
        ({"prompt": "a", "completion": "b", "label": False}, '"label" says whether the answer is a good one'),
        ({"prompt": "a", "response": "b", "output": "c"}, 'data.columns = ["response=response"]'),
        ({"prompt": "a", "instruction": "b", "response": "c"}, 'data.columns = ["prompt=prompt"]'),
        ({"prompt": "a", "response": "b", "history": "c"}, '"history" must be a list of [user, assistant]'),
        ({"system": ["a"], "prompt": "a", "response": "b"}, '"system" must be a string'),
        ({"question": "a", "answer": "b"}, 'data.columns names other keys, such as "prompt=question"'),
        ({"messages": [{"role": ["user"], "content": "a"}]}, '"role" must be a string, not a list'),
    ],
)
def test_a_key_that_would_change_what_is_learnt_is_an_error_with_the_remedy(write, row, told):
    assert told in refused(write(row))


@pytest.mark.fault("other keys")
def test_keys_that_are_not_used_are_counted_and_said_once_and_metadata_never(write, capsys):
    row = {
        "prompt": "a",
        "response": "b",
        "id": 1,
        "source": "c",
        "prompt_id": "d",
        "note": "e",
        "none": None,
    }
    named = {"messages": [TURNS[0] | {"name": "Ana"}, TURNS[1]], "prompt": "a"}
    read_samples(write(row, row, named))
    assert capsys.readouterr().err == (
        'warning: keys of the rows that are not used: "note" (2 times), "prompt" (1 times), '
        '"messages[].name" (1 times)\n'
    )


@pytest.mark.fault("formats")
@pytest.mark.parametrize(
    "row, columns",
    [
        ({"question": "2 + 2?", "answer": "Four."}, ["prompt=question", "response = answer"]),
        ({"text": "2 + 2?", "label": "Four."}, ["prompt=text", "response=label"]),
        ({"dialog": TURNS, "prompt": "x"}, ["messages=dialog"]),
        ({"prompt": "2 + 2?", "response": "a", "output": "Four."}, ["response=output"]),
    ],
)
def test_columns_name_the_rows_own_keys(write, row, columns):
    assert read_samples(write(row), columns=columns)[0][0].messages == PAIR


def test_who_names_the_texts_key_trains_on_the_text_whatever_else_there_is(write):
    assert read_samples(write({"text": "a", "label": "b"}), columns=["text=text"])[0][0].text == "a"


def test_a_row_without_a_named_column_is_told_its_name(write):
    told = refused(write({"question": "a"}), columns=["prompt=question", "response=answer"])
    assert 'missing key "response" (data.columns: it is called "answer")' in told


@pytest.mark.parametrize(
    "columns, told",
    [
        (["promt=a"], "'promt' is no key of rows; did you mean 'prompt'?"),
        (["prompt"], "write prompt=question"),
        (["prompt=a", "prompt=b"], "'prompt' is named twice"),
        (["prompt=a", "response=a"], "'a' is named twice"),
    ],
)
def test_a_wrong_column_is_named(write, columns, told):
    assert told in refused(write({"text": "a"}), columns=columns)


ENDED = f"Four.{END_OF_TURN}"
SPELLED = [
    {"text": f"<bos>{USER}2 + 2?{END_OF_TURN}\n{MODEL}Four.{END_OF_TURN}\n"},
    {"text": f"{USER}2 + 2?{END_OF_TURN}\n{MODEL}Four.{END_OF_TURN}\n<eos>"},
    {"text": f"{USER}2 + 2?{END_OF_TURN}\n{MODEL}Four."},
    {"prompt": f"{USER}2 + 2?{END_OF_TURN}\n{MODEL}", "response": ENDED},
    {"prompt": f"<bos>{USER}2 + 2?{END_OF_TURN}\n", "response": "Four."},
    {"prompt": f"{USER}2 + 2?{END_OF_TURN}", "completion": f"{MODEL}{ENDED}"},
    {"prompt": "2 + 2?", "response": f"{ENDED}\n<eos>"},
    {"messages": [TURNS[0], TURNS[1] | {"content": ENDED}]},
]


@pytest.mark.fault("turns")
@pytest.mark.parametrize("row", SPELLED)
def test_gemmas_turns_spelled_as_text_are_read_as_messages_and_said_once(write, capsys, row):
    samples, _ = read_samples(write(row, row))
    assert [sample.messages for sample in samples] == [PAIR, PAIR]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "2 rows" in err and "the first is rows.jsonl:1" in err


@pytest.mark.fault("turns")
def test_turns_spelled_in_a_prompt_are_a_conversation_of_which_the_response_alone_is_supervised(write):
    prompt = f"{USER}Hi{END_OF_TURN}\n{MODEL}Hello{END_OF_TURN}\n{USER}2 + 2?{END_OF_TURN}\n{MODEL}"
    (sample,), _ = read_samples(write({"prompt": prompt, "response": "Four."}))
    assert (sample.messages, sample.unsupervised) == (DIALOGUE, (1,))
    (pair,), _ = read_samples(write({"prompt": prompt, "chosen": ENDED, "rejected": "Five."}))
    assert (pair.messages, pair.rejected) == (DIALOGUE, "Five.")
    assert read_prompts(write({"prompt": prompt}))[0].messages == DIALOGUE[:-1]


@pytest.mark.fault("turns")
def test_text_about_turns_stays_text(write, capsys):
    text = f"A turn begins with {START_OF_TURN} and ends with {END_OF_TURN}, as Gemma has it."
    samples, _ = read_samples(write({"text": text}, {"prompt": text, "response": text}))
    assert samples[0].text == text and samples[1].messages == (("user", text), ("assistant", text))
    assert capsys.readouterr().err == ""
    (ended,), _ = read_samples(write({"text": "<bos>Once upon a time<eos>"}))
    assert ended.text == "Once upon a time" and "control tokens" in capsys.readouterr().err
