"""tasks/rewards.py: each reward by hand, and no default sum that an answer could earn without redacting."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import Sample
from tasks.alignment import LABEL
from tasks.choose import TASKS
from tasks.redaction import source_text
from tasks.rewards import (
    DEFAULTS,
    REWARDS,
    ended,
    entity_f1,
    exact_match,
    format_reward,
    label_match,
    leak,
    over_mask,
    preserved,
)
from tests.folders import ROOT
from training.objectives.rewards import default_rewards

SOURCE = "Ann Lee, call 555-01 now."
GOLD = "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now."
# 12 entity characters: Ann 3, Lee 3, 555-01 6. 13 others: " ", ", call ", " now."
PLAIN = "All is well."  # 12 characters, no entity
REDACTION = (leak, preserved, entity_f1, over_mask)
ROWS = [
    json.loads(line) for line in (ROOT / "assets/samples/val.jsonl").read_text("utf-8").splitlines()[:100]
]


def values(completion, source=SOURCE, gold=GOLD):
    """Returns leak, preserved, entity_f1 and over_mask."""
    return tuple(reward(source, completion, gold) for reward in REDACTION)


def total(prompt, completion, gold, stopped=True):
    """Returns the default sum of the rewards of a redaction."""
    return sum(
        weight * (ended(stopped) if name == "ended" else REWARDS[name](prompt, completion, gold))
        for name, weight in DEFAULTS["redaction"].items()
    )


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOLD, (1, 1, 1, 1)),
        (f"\n{GOLD} ", (1, 1, 1, 1)),
        ("[GIVENNAME_7] [SURNAME_2], call [TELEPHONENUM_3] now.", (1, 1, 1, 1)),  # The index is ignored.
        ("[GIVENNAME_1] Lee, call [TELEPHONENUM_1] now.", (9 / 12, 1, 4 / 5, 1)),  # Lee leaks.
        ("[GIVENNAME_1] [CITY_1], call [TELEPHONENUM_1] now.", (1, 1, 2 / 3, 1)),  # a wrong class
        ("[GIVENNAME_1] Moo, call [TELEPHONENUM_1] now.", (9 / 12, 0, 4 / 5, 1)),  # Lee is lost.
        ("[GIVENNAME_1] [SURNAME_1], [CITY_1] [TELEPHONENUM_1] now.", (1, 0, 6 / 7, 9 / 13)),  # call
        ("[GIVENNAME_1] [SURNAME_1], [TELEPHONENUM_1] now.", (1, 0, 4 / 6, 8 / 13)),  # over "call 555-01"
        ("[GIVENNAME_1] [SURNAME_1], call", (6 / 12, 0, 4 / 5, 7 / 13)),  # It ends too early.
        (SOURCE, (0, 1, 0, 1)),
        ("", (0, 0, 0, 0)),
        (" \n", (0, 0, 0, 0)),
        ("[MASKED]", (1, 0, 0, 0)),
        ("[A_1] [B_1], call [C_1] now.", (1, 1, 0, 1)),  # invented classes
        (f"{GOLD}\n{GOLD}", (1, 0, 6 / 9, 1)),
        (f"{GOLD}\n{SOURCE}", (0, 0, 0, 1)),  # aligned to the second
        (f"{GOLD} I hope this helps.", (1, 0, 1, 1)),
    ],
)
def test_redaction_rewards_by_hand(completion, expected):
    assert values(completion) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (PLAIN, (1, 1, 1, 1)),
        ("", (0, 0, 0, 0)),
        ("All", (3 / 12, 0, 3 / 12, 3 / 12)),  # Nothing can leak, so the share that is not lost counts.
        ("[MASKED]", (1, 0, 0, 0)),
        (f"{PLAIN}{PLAIN}", (1, 0, 1, 1)),
    ],
)
def test_rewards_of_a_text_without_entities_by_hand(completion, expected):
    assert values(completion, PLAIN, PLAIN) == pytest.approx(expected, abs=1e-12)


def test_a_text_that_is_one_entity_rewards_nothing_but_its_label():
    gold = "[GIVENNAME_1]"
    assert values(gold, "Ann", gold) == (1, 1, 1, 1)
    assert values("", "Ann", gold) == values(".", "Ann", gold) == (0, 0, 0, 0)
    assert values("Ann", "Ann", gold) == (0, 1, 0, 1)


def test_text_after_a_last_entity_is_not_preserved():
    """The alignment takes such text for a part of the entity."""
    gold = "Write to [GIVENNAME_1] [SURNAME_1]"
    assert values(gold, "Write to Ann Lee", gold) == (1, 1, 1, 1)
    assert preserved("Write to Ann Lee", f"{gold} I hope this helps", gold) == 0


def test_a_label_in_doubt_leaves_a_text_preserved_up_to_a_fifth_of_it():
    source = "Ann called us on a day in March and again in April, from home."
    gold = source.replace("Ann", "[GIVENNAME_1]")  # 59 characters are outside entities
    eleven = gold.replace("March", "[CITY_1]").replace("called", "[CITY_2]")
    assert values(eleven, source, gold) == pytest.approx((1, 1, 2 / 4, 48 / 59))
    assert values(eleven.replace("us", "[CITY_3]"), source, gold) == pytest.approx((1, 0, 2 / 5, 46 / 59))
    assert preserved(source, eleven.replace("April", "Apirl"), gold) == 0


def test_rewards_of_other_tasks_by_hand():
    assert exact_match("", " a b\n", "a b") == 1 and exact_match("", "a B", "a b") == 0
    assert label_match("", " Positive\n", "positive") == 1
    assert label_match("", "positive positive", "positive") == label_match("", "", "positive") == 0
    assert ended(True) == 1 and ended(False) == 0


def test_format_matches_the_whole_stripped_completion():
    reward = format_reward(r"<answer>\d+</answer>")
    assert reward(" <answer>42</answer>\n") == 1
    assert reward("so <answer>42</answer>") == reward("<answer>42</answer>.") == reward("") == 0


@pytest.mark.parametrize(("pattern", "words"), [("", "empty"), ("(a", r"'\(a'.*missing \)")])
def test_format_refuses_a_pattern_that_is_none(pattern, words):
    with pytest.raises(ValueError, match=words):
        format_reward(pattern)


def test_default_weights_add_up_to_1_for_every_task_and_leak_is_the_heaviest():
    assert DEFAULTS.keys() <= TASKS.keys()
    for weights in DEFAULTS.values():
        assert sum(weights.values()) == pytest.approx(1, abs=1e-12) and weights.keys() <= REWARDS.keys()
        assert min(weights.values()) > 0
    redaction = dict(DEFAULTS["redaction"])
    heaviest = redaction.pop("leak")
    assert heaviest > max(redaction.values())


# {answer that earns nothing honestly: function of (source, gold)}
GAMES = {
    "empty": lambda source, gold: "",
    "a dot": lambda source, gold: ".",
    "refusal": lambda source, gold: "I cannot help with that.",
    "echo": lambda source, gold: source,
    "one label": lambda source, gold: "[MASKED]",
    "one known label": lambda source, gold: "[GIVENNAME_1]",
    "a label a word": lambda source, gold: " ".join("[MASKED]" for _ in source.split()),
    "labels alone": lambda source, gold: " ".join(LABEL.findall(gold)),
    "labels left out": lambda source, gold: LABEL.sub("", gold),
    "invented labels": lambda source, gold: LABEL.sub("[SECRET_1]", gold),
    "more labels": lambda source, gold: f"{gold} [SECRET_1] and [CITY_9]",
    "gold twice": lambda source, gold: f"{gold}\n{gold}",
    "gold twice, without a break": lambda source, gold: gold + gold,
    "gold, then rambling": lambda source, gold: f"{gold} I hope this helps you.",
    "gold, then the source": lambda source, gold: f"{gold}\n{source}",
    "half of the gold": lambda source, gold: gold[: len(gold) // 2],
}


@pytest.mark.parametrize("game", GAMES)
def test_no_gaming_answer_comes_near_the_gold_on_100_rows(game):
    tried = 0
    for row in ROWS:
        prompt, gold = row["prompt"], row["response"]
        answer = GAMES[game](source_text(prompt), gold)
        if answer != gold:  # A text without entities is its own redaction.
            tried += 1
            assert total(prompt, answer, gold) <= 0.75 + 1e-9, (answer, gold)
    assert tried > 85


def test_the_default_rewards_of_a_run_are_the_sum_that_is_tested_here():
    samples = [
        Sample(str(n), (("user", row["prompt"]), ("assistant", row["response"])))
        for n, row in enumerate(ROWS[:8])
    ]
    prompts, golds = [row["prompt"] for row in ROWS[:8]], [row["response"] for row in ROWS[:8]]
    texts = [gold[: len(gold) // 2] for gold in golds[:4]] + golds[4:]
    found, _ = default_rewards("auto", samples)(prompts, texts, golds, [True, False] * 4)
    rows = zip(prompts, texts, golds, [True, False] * 4, strict=True)
    assert found == pytest.approx([total(*row) for row in rows], abs=1e-12)
    assert len(set(found)) > 2


@pytest.mark.parametrize("game", ["empty", "a dot", "refusal"])
def test_an_answer_without_text_of_the_source_earns_next_to_nothing_on_100_rows(game):
    for row in ROWS:
        answer = GAMES[game](source_text(row["prompt"]), row["response"])
        assert total(row["prompt"], answer, row["response"]) <= 0.1, row["response"]


def test_an_empty_answer_gets_0_of_every_reward_but_ended_on_100_rows():
    for row in ROWS:
        found = {n: f(row["prompt"], "", row["response"]) for n, f in REWARDS.items() if n != "ended"}
        assert set(found.values()) == {0.0}, found


def test_the_gold_gets_1_of_every_reward_on_100_rows():
    for row in ROWS:
        gold = row["response"]
        found = {n: f(row["prompt"], gold, gold) for n, f in REWARDS.items() if n != "ended"}
        assert set(found.values()) == {1.0}, found


@settings(max_examples=150)
@given(
    st.text(max_size=40),
    st.text(max_size=40),
    st.lists(st.sampled_from(["[CITY_1]", "Ann", " ", "x", "[FOO]"]), max_size=12),
)
def test_rewards_of_any_answer_lie_between_0_and_1(source, gold, pieces):
    for name, reward in REWARDS.items():
        if name != "ended":
            assert 0 <= reward(source, "".join(pieces), gold) <= 1


@pytest.mark.parametrize("text", ["a" * 3000, "the " * 600, "a e " * 700, ". " * 1500, "[MASKED]" * 300])
def test_a_degenerate_answer_takes_no_time(text):
    """A model that is being trained may repeat itself up to its last token."""
    row = max(ROWS, key=lambda row: len(row["prompt"]))
    start = time.process_time()
    assert leak(row["prompt"], text, row["response"]) <= 1
    assert time.process_time() - start < 2  # "aaa..." took 10 s; 0.2 s at most on an idle core
