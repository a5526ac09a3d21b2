"""assets/tiny/recipe: responses are right, the corpus has no redaction labels, and texts can be decoded."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "assets" / "tiny"
sys.path.insert(0, str(TINY / "recipe"))

import exercises
import make_corpus
import make_tokenizer
import values

TEXT = [
    ("Dear ", None), ("Ann", "first"), (" ", None), ("Lee", "last"), (" of ", None), ("York", "city"),
    (", ask ", None), ("Bo", "first"), (" or ", None), ("Ann", "first"), (".", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def english():
    return make_corpus.load()["en"]


@pytest.fixture(scope="module")
def stages():
    rng, languages = random.Random(5), make_corpus.load()
    return {stage: [make_corpus.sample(languages, rng, True, stage) for _ in range(1500)] for stage in (1, 2)}


@pytest.fixture(scope="module")
def rows(stages):
    return stages[1] + stages[2]


def answer(monkeypatch, maker, language, kinds):
    monkeypatch.setattr(exercises, "pick_kinds", lambda *_, **__: kinds)
    monkeypatch.setattr(exercises, "symbol", lambda *_: "[X]")
    return maker(TEXT, language, random.Random(0))[1]


def test_number_kind_numbers_by_value_in_order_of_appearance(monkeypatch, english):
    response = answer(monkeypatch, exercises.number_kind, english, ["first"])
    assert response == "Dear [X_1] Lee of York, ask [X_2] or [X_1]."


def test_hide_kind_hides_the_members_of_a_group_and_nothing_else(monkeypatch, english):
    response = answer(monkeypatch, exercises.hide_kind, english, ["person"])
    assert response == "Dear [X] [X] of York, ask [X] or [X]."


def test_hide_kind_without_such_values_copies_the_text(monkeypatch, english):
    assert answer(monkeypatch, exercises.hide_kind, english, ["card"]) == exercises.plain(TEXT)


def test_extract_lists_values_line_by_line_and_says_none_if_there_are_none(monkeypatch, english):
    assert answer(monkeypatch, exercises.extract, english, ["first", "city"]) == "Ann\nYork\nBo\nAnn"
    assert answer(monkeypatch, exercises.extract, english, ["person"]) == "Ann Lee\nBo\nAnn"
    assert answer(monkeypatch, exercises.extract, english, ["card"]) == english.tasks["none"][0]


def test_mark_numbers_by_value_within_a_kind(english):
    answers = {exercises.mark(TEXT, english, random.Random(seed))[1] for seed in range(100)}
    assert answers >= {
        "Dear Ann (first name) Lee (last name) of York (city), ask Bo (first name) or Ann (first name).",
        "Dear <first name_1> <last name_1> of <city_1>, ask <first name_2> or <first name_1>.",
        "Dear <first name> <last name> of <city>, ask <first name> or <first name>.",
    }


def test_label_replaces_all_kinds_or_those_that_the_instruction_names(english):
    made = [exercises.label(TEXT, english, random.Random(seed)) for seed in range(3000)]
    assert {answer for _, answer in made} >= {
        "Dear <first name_1> <last name_1> of <city_1>, ask <first name_2> or <first name_1>.",
        "Dear [1_FIRST NAME] [1_LAST NAME] of [1_CITY], ask [2_FIRST NAME] or [1_FIRST NAME].",
        "Dear Ann <Last Name> of York, ask Bo or Ann.",
    }
    named = [(order, answer) for order, answer in made if "York" in answer]
    assert named and not any("cities" in order for order, _ in named)


def test_echoed_puts_words_of_instructions_into_a_text_and_keeps_values(english):
    item = [("Dear neighbour, the contract of ", None), ("Ann Contract", "first"), (" is here. ", None)] * 40
    found = make_corpus.echoed(item, english.order_words, random.Random(0))
    words = {word for part, slot in found if not slot for word in re.findall(r"\w{3,}", part)}
    new = words - {"Dear", "neighbour", "the", "contract", "here"}
    assert new and new <= set(english.order_words)
    assert "text" in english.order_words and "kinds" not in english.order_words
    assert all(part == "Ann Contract" for part, slot in found if slot)


def test_hiding_a_word_keeps_longer_words(monkeypatch, english):
    monkeypatch.setattr(exercises, "pick_word", lambda *_: "Ann")
    monkeypatch.setattr(exercises, "symbol", lambda *_: "***")
    _, response = exercises.hide_word([("Ann, Anna, Ann-Marie", None)], english, random.Random(0))
    assert response == "***, Anna, ***-Marie"


def test_removing_a_word_leaves_no_double_space(monkeypatch, english):
    monkeypatch.setattr(exercises, "pick_word", lambda *_: "very")
    _, response = exercises.remove([("very good, very, very bad", None)], english, random.Random(0))
    assert response == "good,, bad"


def test_numbers_go_inside_the_bracket():
    signs = [exercises.numbered(sign, 2) for sign in ("[X]", "<A>", "***", "X", "{{x}}")]
    assert signs == ["[X_2]", "<A_2>", "***_2", "X_2", "{{x}}_2"]


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_jobs(tmp_path):
    for jobs in (1, 2):
        make_corpus.write(tmp_path / f"{jobs}.jsonl", "7/train", 1200, jobs)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_no_sample_has_a_word_or_a_label_of_the_redaction_task(rows):
    for row in rows:
        text = row.get("text", "") + row.get("prompt", "") + row.get("response", "")
        assert not re.search(r"\b(redact|pii\b|mask)", text, re.IGNORECASE)
        assert not re.search(r"\[(GIVENNAME|SURNAME|CITY|STREET|EMAIL|PASSWORD|USERNAME)", text)


def test_the_responses_of_copy_are_in_their_prompts(rows):
    copies = [row for row in rows if row["task"] == "copy"]
    assert len(copies) > 150 and all(row["response"] in row["prompt"] for row in copies)


def test_every_task_and_language_occurs_and_no_placeholder_is_left(stages, rows):
    for stage, drawn in stages.items():
        assert {row["task"] for row in drawn} == {"text", *exercises.SHARES[stage]}
        assert {row["language"] for row in drawn} == set(values.LANGUAGES)
    # Symbols and passwords may look like <x>, but not like the plural and counted placeholders.
    placeholder = re.compile(r"<kinds2?>|<x2>|\{(first|last|city|word|rand)\}")
    assert not [row for row in rows if placeholder.search(row.get("prompt", ""))]


def test_a_text_without_its_marks_is_the_text_of_the_prompt(rows):
    kinds = {singular for language in make_corpus.load().values() for singular, _ in language.kinds.values()}
    marked = [row for row in rows if row["task"] == "mark" and not re.search(r"[\[<]", row["response"])]
    assert marked
    for row in marked:
        text = re.sub(r" \(([^()]*)\)", lambda m: "" if m[1] in kinds else m[0], row["response"])
        assert text in row["prompt"]


@pytest.mark.parametrize("language", values.LANGUAGES)
def test_half_of_the_names_are_not_in_a_list(language):
    rng, known = random.Random(1), make_corpus.load()[language].known()
    listed = {name for names in values._LAST.values() for name in names}
    names = [values.last(language, rng, known) for _ in range(2000)]
    assert 0.35 < sum(name in listed for name in names) / len(names) < 0.65 and len(set(names)) > 1000
    assert len(set(values._FIRST[language])) >= 200 and len(set(values._LAST[language])) >= 200
    assert len(set(values._CITY[language])) >= 80


def test_all_bad_lines_of_a_language_file_are_in_one_error(tmp_path):
    path = tmp_path / "xx.txt"
    path.write_text("== clauses\nHello {firts}\n== fields\nName\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        make_corpus.read_language(path)
    assert all(fact in str(error.value) for fact in ("xx.txt:2", "xx.txt:4", "no section 'copy'"))


@pytest.fixture(scope="module")
def shipped():
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_control_tokens_have_the_ids_of_gemma_3(shipped):
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n")
    assert [shipped.token_to_id(name) for name in names] == [0, 1, 2, 3, 4, 105, 106, 107]
    assert shipped.encode("a").ids[0] == 2


SPACES = ["  two   three" + " " * 40 + "forty ", "\n\n\n\n\t x\t\t\r\n"]
SIGNS = ["naïve 😀🇪🇺 漢字 \u200b Ω\u00a0", "[GLAMBOR_12], x=3.14;{ok} </p>"]


@pytest.mark.parametrize("text", SPACES + SIGNS)
def test_decoding_the_tokens_of_a_text_gives_the_text(shipped, text):
    assert shipped.decode(shipped.encode(text).ids) == text


def test_a_digit_is_a_piece_and_upper_case_letters_are_at_most_three_in_a_row(shipped):
    learned = [piece for piece, i in shipped.get_vocab().items() if i > 107 and not piece.startswith("<0x")]
    assert not [piece for piece in learned if len(piece) > 1 and re.search(r"\d", piece)]
    assert not [piece for piece in learned if make_tokenizer.has_long_capitals(piece)]


def test_a_word_has_the_same_tokens_in_every_sentence(shipped):
    def tokens_of(text):
        return shipped.encode(text, add_special_tokens=False).tokens

    word = tokens_of(" Glambor")
    for text in ("ask Glambor, now", "(x) Glambor.", "a\n Glambor</p>", "3 Glambor\n"):
        tokens = tokens_of(text)
        assert any(tokens[i : i + len(word)] == word for i in range(len(tokens)))


def test_chat_template_is_gemmas():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = (("system", " S "), ("user", " hi\n"), ("assistant", "yo"), ("user", "go"))
    turns = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\n S \n\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
        "<start_of_turn>user\ngo<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="turns must go"):
        tokenizer.apply_chat_template(turns[1:2] * 2, tokenize=False)
    assert tokenizer("a  b 😀").input_ids == tokenizer.backend_tokenizer.encode("a  b 😀").ids
    assert len(tokenizer) == json.loads((TINY / "config.json").read_text())["vocab_size"]
