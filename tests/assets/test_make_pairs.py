"""assets/samples: the redaction samples are reproducible, aligned and balanced; sets share no names."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from assets.samples import make_pairs
from assets.samples.make_pairs import Part, aligns, make_set, read_clauses, to_pair, to_row
from assets.samples.values import LANGUAGES, SPLIT_CLASSES, side_of
from tasks.redaction import CLASSES, INSTRUCTION, score, source_text, spans

SAMPLES = Path(make_pairs.__file__).resolve().parent
CLAUSES = """== train
{GIVENNAME} {SURNAME} lives in {CITY}, {STREET} {BUILDINGNUM}, {ZIPCODE}.
Hi {GIVENNAME}, write to {EMAIL} or call {TELEPHONENUM} before {date}.
The {SURNAME} account {ACCOUNTNUM} and the card {CREDITCARDNUMBER} are closed.
{GIVENNAME}, born {DATEOFBIRTH}, logs in as {USERNAME} with {PASSWORD}.
Identity card {IDCARDNUM}, social security {SOCIALNUM}, tax {TAXNUM}, licence {DRIVERLICENSENUM}.
ok tell {GIVENNAME} about it
== unseen
Unseen: {GIVENNAME} of {CITY}.
Unseen: family {SURNAME}, {STREET}.
== neutral
It costs {price}, {percent} off, order {code}.
Since {year} we open at {time}; {number} seats.
== neutral_unseen
Unseen: nothing but {number} cats.
== fields
Postal code | ZIPCODE
Name | GIVENNAME SURNAME
== fields_unseen
Unseen zip | ZIPCODE
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clauses")
    for language in LANGUAGES:
        (path / f"{language}.txt").write_text(CLAUSES, "utf-8")
    return path


@pytest.fixture(scope="module")
def clauses(folder):
    return read_clauses(folder)


@pytest.fixture(scope="module")
def sets(clauses):
    seen, counts = set(), {"train": 360, "val": 120, "val_unseen": 120}
    return {name: make_set(name, count, 7, clauses, seen=seen) for name, count in counts.items()}


def values_of(pairs, classes=CLASSES):
    found = [
        (entity.label, pair.source[entity.start : entity.end]) for pair in pairs for entity in pair.entities
    ]
    return {(label, value.casefold()) for label, value in found if label in classes}


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    counts = "--train 240 --val 12 --unseen 12".split()
    command = [sys.executable, "-B", str(SAMPLES / "make_pairs.py"), "--clauses", str(folder), *counts]
    # The hash seed changes the iteration order of Python's sets, which must not matter.
    for name, seed, hash_seed in (("a", "1", "1"), ("b", "1", "2"), ("c", "2", "1")):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([*command, "--seed", seed, "--out", tmp_path / name], check=True, env=environment)
    for name in ("train", "val", "val_unseen"):
        first, again, other = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in "abc")
        assert first == again != other


def test_number_of_a_label_is_that_of_its_value():
    ann, bo = Part("Ann", "GIVENNAME"), Part("Bo", "GIVENNAME")
    parts = [ann, Part(" met "), bo, Part(" and "), ann, Part(" "), Part("Bo", "SURNAME")]
    pair = to_pair("en", parts)
    assert pair.source == "Ann met Bo and Ann Bo"
    assert pair.redacted == "[GIVENNAME_1] met [GIVENNAME_2] and [GIVENNAME_1] [SURNAME_1]"
    assert to_pair("en", parts, "masked").redacted == "[MASKED] met [MASKED] and [MASKED] [MASKED]"


def test_numbers_start_at_1_and_follow_first_appearance(sets):
    for pair in sets["train"]:
        labels = re.findall(r"\[([A-Z]+)_(\d+)\]", pair.redacted)
        assert [label for label, _ in labels] == [e.label for e in pair.entities]
        values = {}
        for (label, number), entity in zip(labels, pair.entities, strict=False):
            known = values.setdefault(label, [])
            value = pair.source[entity.start : entity.end]
            if value not in known:
                known.append(value)
            assert int(number) == known.index(value) + 1


def test_text_outside_entities_is_the_source(sets):
    for pair in sets["train"] + sets["val_unseen"]:
        kept, at = [], 0
        for entity in pair.entities:
            kept.append(pair.source[at : entity.start])
            at = entity.end
        assert re.split(r"\[[A-Z]+_\d+\]", pair.redacted) == [*kept, pair.source[at:]]


def test_pairs_align_with_their_own_entities(sets):
    pairs = sets["train"] + sets["val"] + sets["val_unseen"]
    assert all(aligns(pair) for pair in pairs)
    exact = sum(spans(pair.source, pair.redacted) == pair.entities for pair in pairs)
    assert exact > 0.9 * len(pairs), "the bounds differ only for adjacent names of several words"
    result = score([(pair.source, pair.redacted, pair.redacted) for pair in pairs])
    assert result["entity_f1"] == result["preserved"] == 1 and result["leak_rate"] == 0


def test_masked_pairs_align_too(clauses):
    pairs = make_set("train", 60, 3, clauses, "masked")
    assert all("_1]" not in pair.redacted and aligns(pair) for pair in pairs)


def test_names_and_places_of_training_are_in_no_validation_set(sets):
    train = values_of(sets["train"], SPLIT_CLASSES)
    assert len(train) > 500
    assert not train & values_of(sets["val"], SPLIT_CLASSES)
    assert not train & values_of(sets["val_unseen"], SPLIT_CLASSES)
    assert all(side_of(label, value) == "train" for label, value in train)


def test_all_classes_occur_and_all_languages_equally(sets):
    assert {label for label, _ in values_of(sets["train"])} == set(CLASSES)
    assert set(Counter(pair.language for pair in sets["train"]).values()) == {360 // 6}


def test_unseen_set_has_clauses_of_its_own(sets):
    assert all("Unseen" in p.source or "unseen" in p.source for p in sets["val_unseen"])
    assert not any("nseen" in p.source for p in sets["train"] + sets["val"])


def test_no_source_is_in_two_sets(sets):
    sources = [pair.source for pairs in sets.values() for pair in pairs]
    assert len(sources) == len(set(sources))


def test_some_texts_have_no_entity_and_some_a_name_twice(sets):
    pairs = sets["train"]
    assert 0.03 < sum(not p.entities for p in pairs) / len(pairs) < 0.15
    assert sum(p.redacted.count("[GIVENNAME_1]") > 1 for p in pairs) > 0.05 * len(pairs)


def test_sources_are_stripped_and_rows_have_the_instruction(sets):
    for pair in sets["val"]:
        assert pair.source == pair.source.strip() and pair.redacted == pair.redacted.strip()
        row = json.loads(to_row(pair))
        assert row["prompt"].startswith(INSTRUCTION + "\n\nText:\n")
        assert source_text(row["prompt"]) == pair.source and list(row) == ["prompt", "response"]


def test_bad_lines_of_clause_files_are_in_one_error(tmp_path, capsys):
    for language in LANGUAGES[1:]:
        (tmp_path / f"{language}.txt").write_text(CLAUSES, "utf-8")
    bad = CLAUSES.replace("{time}", "{hour}").replace("== unseen", "== unsee")
    bad = bad.replace("Postal code | ZIPCODE", "Postal code")
    (tmp_path / "de.txt").write_text(bad, "utf-8")
    with pytest.raises(ValueError) as error:
        read_clauses(tmp_path)
    for fact in ("en.txt: no such file", "de.txt:13: slot {hour}", "de.txt:17: 'Postal code'", "'unsee'"):
        assert fact in str(error.value)
    assert make_pairs.main(["--out", str(tmp_path / "out"), "--clauses", str(tmp_path)]) == 2
    assert "de.txt:13" in capsys.readouterr().err


def test_shipped_clauses_are_well_formed():
    assert set(read_clauses()) == set(LANGUAGES)


def test_shipped_samples_are_aligned_and_share_no_source_and_no_city():
    cities, sources = {}, []
    for name in ("train", "val", "val_unseen"):
        rows = [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text("utf-8").splitlines()]
        cities[name] = set()
        for row in rows:
            source, redacted = source_text(row["prompt"]), row["response"]
            found = spans(source, redacted)
            sources.append(source)
            assert len(found) == len(re.findall(r"\[[A-Z]+_\d+\]", redacted))
            cities[name] |= {source[s.start : s.end] for s in found if s.label == "CITY"}
    assert len(sources) == len(set(sources))
    assert not cities["train"] & (cities["val"] | cities["val_unseen"])
