"""Looks for defects of rows, before a run is spent on them (train.py --check-data). Changes no data.

data/checks.py has what every run prints at its start; here is what takes seconds, and says why for each row.
Each function returns {kind: {id of a sample: note}}, with the kinds of KINDS.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.checks import MOJIBAKE, copies, several_responses
from data.loader import prompt_of
from data.near_duplicates import near_duplicates, often, shingles, word_hashes
from data.rows import Sample

Found = dict[str, dict[str, str]]

# {kind: (what the rows are, the share of all rows above which they spoil a run)}. With a share of 0, one row
# does: a figure would be wrong, or the run would be refused. With 1 they never do.
ANY, MANY, NEVER = 0.0, 0.05, 1.0
KINDS: dict[str, tuple[str, float]] = {
    "bad_rows": ("rows that cannot be read", ANY),
    "overlap": ("validation rows whose prompt is also in training", ANY),
    "overlap_normalised": ("the same, but for case, punctuation and white space", ANY),
    "overlap_near": ("validation rows that nearly repeat a training row", MANY),
    "duplicates": ("exact copies of an earlier row", MANY),
    "near_duplicates": ("rows that nearly repeat an earlier row", MANY),
    "several_responses": ("rows whose prompt occurs with another response", MANY),
    "same_response": ("rows with a response that many prompts share", MANY),
    "empty_prompts": ("rows with an empty prompt", MANY),
    "placeholders": ("responses without content, such as N/A or ...", MANY),
    "echoes": ("responses that repeat the prompt", MANY),
    "repetitions": ("responses that repeat themselves", MANY),
    "template_marks": ("rows with the marks of a chat template as text", MANY),
    "mojibake": ("rows that look wrongly decoded (UTF-8 read as Latin-1)", MANY),
    "control_characters": ("rows with invisible control characters", MANY),
    "trailing_space": ("raw texts that end in blanks", NEVER),
    "too_long": ("rows longer than data.max_length", MANY),
    "cut_prompts": ("rows whose prompt alone fills data.max_length", ANY),
    "unsupervised": ("rows without a supervised token", MANY),
    "long_rows": ("rows far longer than the others", NEVER),
}
PLACEHOLDERS = set("n/a na none null nil nan todo tbd fixme undefined unknown test xxx lorem [] {} -".split())
# Blanks, line feeds and the joiners of emoji and of Persian are no control characters.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff0-\uffff]"
)
TEMPLATE_MARKS = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos)>"
    r"|^### (?:Instruction|Response|Input):"
    r"|^(?:Human|Assistant|USER|ASSISTANT): ",
    re.MULTILINE,
)
SHARED, SHARED_SHARE = 5, 0.05  # A response is shared by many prompts from so many and such a share on.
LABEL_WORDS = 3  # Shorter responses (yes, no) are shared by many prompts of a good file too.
LOOP_SHINGLES, LOOP = 30, 0.5  # In a loop, half of 30 shingles or more are repetitions.
OUTLIER = 20  # A row is far longer than the others if it has so many times the median's characters.
NOTE = 60  # characters of a row in a note


@dataclass
class Finding:
    """The rows of a kind of defect: {id of a sample: a note on it}."""

    kind: str
    what: str
    spoils: bool
    rows: dict[str, str] = field(default_factory=dict)


def findings(found: Found, count: int, limits: dict[str, tuple[str, float]]) -> list[Finding]:
    """Returns what was found, what spoils a run first; `count` is the number of all rows."""
    made = [
        Finding(kind, what, len(found[kind]) > share * count, found[kind])
        for kind, (what, share) in limits.items()
        if found.get(kind)
    ]
    return sorted(made, key=lambda finding: not finding.spoils)


def prompt_and_response(sample: Sample) -> tuple[str, str]:
    """Returns the text before the last message, and the last message; raw text is a response."""
    if sample.text is not None:
        return "", sample.text
    messages = sample.messages or (("", ""),)
    return "\n".join(content for _, content in messages[:-1]), messages[-1][1]


def row_defects(train: Sequence[Sample], validation: Sequence[Sample], is_classification: bool) -> Found:
    """Returns the defects that rows of any task may have."""
    samples = [*train, *validation]
    prompts, responses = zip(*map(prompt_and_response, samples), strict=True)
    prompt_words, response_words = word_hashes(prompts), word_hashes(responses)
    found = texts_defects(samples, prompts, responses)
    found |= {"duplicates": copies(train), "several_responses": several_responses(train)}
    whole = [np.concatenate(both) for both in zip(prompt_words, response_words, strict=True)]
    found |= _overlap(train, validation, [words.tobytes() for words in prompt_words])
    found |= _near(train, validation, whole, found)
    found["repetitions"] = {
        s.id: f"only {distinct:.0%} of its word triples are different"
        for s, words in zip(samples, response_words, strict=True)
        if len(words) >= LOOP_SHINGLES and (distinct := _distinct(words)) <= LOOP
    }
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    median = sorted(sizes)[len(sizes) // 2]
    found["long_rows"] = {
        s.id: f"{size:,} characters, the median has {median:,}"
        for s, size in zip(samples, sizes, strict=True)
        if size > OUTLIER * median
    }
    if not is_classification:
        found["same_response"] = _shared(train, prompt_words, response_words, responses)
    return found


def texts_defects(samples: Sequence[Sample], prompts: Sequence[str], responses: Sequence[str]) -> Found:
    """Returns the defects that a row's text shows by itself."""
    found: Found = {kind: {} for kind in KINDS}
    for sample, prompt, response in zip(samples, prompts, responses, strict=True):
        for kind, pattern in PATTERNS.items():
            if match := pattern.search(prompt) or pattern.search(response):
                found[kind][sample.id] = repr(match.string[max(0, match.start() - 20) : match.end() + 20])
        bare = response.strip()
        if sample.text is not None:
            if response.rstrip("\n") != response.rstrip():
                found["trailing_space"][sample.id] = repr(response[-NOTE:])
            continue
        if not any(text.strip() for role, text in (sample.messages or ())[:-1] if role == "user"):
            found["empty_prompts"][sample.id] = ""
        # A row of prompts alone, for rewards, has the response "".
        if bare and (bare.casefold() in PLACEHOLDERS or not any(map(str.isalnum, bare))):
            found["placeholders"][sample.id] = repr(bare[:NOTE])
        elif bare and bare == prompt.strip():
            found["echoes"][sample.id] = repr(bare[:NOTE])
    return found


PATTERNS = {"mojibake": MOJIBAKE, "control_characters": CONTROL, "template_marks": TEMPLATE_MARKS}


def length_defects(lengths: dict[str, tuple[int, int]], max_length: int) -> Found:
    """Returns the rows that are too long: {id: (tokens, tokens before the first supervised one)}."""
    longer = {id: both for id, both in lengths.items() if both[0] > max_length}
    cut = {id: f"a prompt of {p:,} tokens" for id, (_, p) in longer.items() if p >= max_length}
    return {
        "too_long": {id: f"{tokens:,} tokens" for id, (tokens, _) in longer.items() if id not in cut},
        "cut_prompts": cut,
        "unsupervised": {id: "" for id, (tokens, prompt) in lengths.items() if prompt >= tokens},
    }


def percentiles(lengths: Sequence[int], shares: Sequence[int] = (0, 10, 50, 90, 99, 100)) -> dict[int, int]:
    """Returns {percentile: tokens of the row below which such a per cent of the rows lie}; {} of no rows."""
    ordered = sorted(lengths)
    return {p: ordered[round(p / 100 * (len(ordered) - 1))] for p in shares} if ordered else {}


def without_instruction(samples: Sequence[Sample]) -> list[str]:
    """Returns the texts of samples without the lines that very many prompts share."""
    parts = [prompt_and_response(sample) for sample in samples]
    lines = [prompt.split("\n") for prompt, _ in parts]
    counts = Counter(line for row in lines for line in set(row))
    limit = often(len(samples))
    own = ["\n".join(line for line in row if counts[line] <= limit) for row in lines]
    return [f"{text}\n{response}" for text, (_, response) in zip(own, parts, strict=True)]


def _overlap(train: Sequence[Sample], validation: Sequence[Sample], keys: Sequence[bytes]) -> Found:
    """Returns validation samples whose prompt is in training, exactly or as normalised text (`keys`)."""
    exact = {prompt_of(sample): sample.id for sample in reversed(train)}
    alike = {key: sample.id for key, sample in zip(keys, train, strict=False) if key}
    found: Found = {"overlap": {}, "overlap_normalised": {}}
    for key, sample in zip(keys[len(train) :], validation, strict=True):
        if there := exact.get(prompt_of(sample)):
            found["overlap"][sample.id] = f"as {there}"
        elif there := alike.get(key):
            found["overlap_normalised"][sample.id] = f"as {there}"
    return found


def _near(
    train: Sequence[Sample], validation: Sequence[Sample], whole: Sequence[np.ndarray], found: Found
) -> Found:
    """Returns training rows that nearly repeat an earlier one, and validation rows that do a training row.

    Rows of the `found` copies are left out.
    """
    ids = [sample.id for sample in [*train, *validation]]
    pairs = near_duplicates(whole)
    first: dict[bytes, int] = {}
    for at, words in enumerate(whole):  # Short texts have too few shingles, but may be equal.
        if len(words) and (earlier := first.setdefault(words.tobytes(), at)) != at:
            pairs.setdefault(at, earlier)
    known = {*found["duplicates"], *found["overlap"], *found["overlap_normalised"]}
    notes = {ids[b]: f"nearly {ids[a]}" for b, a in sorted(pairs.items()) if a < len(train)}
    held_out = {sample.id for sample in validation}
    return {
        "near_duplicates": {i: n for i, n in notes.items() if i not in known and i not in held_out},
        "overlap_near": {i: n for i, n in notes.items() if i not in known and i in held_out},
    }


def _shared(
    train: Sequence[Sample],
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    texts: Sequence[str],
) -> dict[str, str]:
    """Returns the training samples whose response, of more than a few words, many different prompts have."""
    groups: dict[bytes, list[int]] = {}
    for at, sample in enumerate(train):
        if sample.messages and len(responses[at]) >= LABEL_WORDS:
            groups.setdefault(responses[at].tobytes(), []).append(at)
    found: dict[str, str] = {}
    for group in groups.values():
        distinct = len({prompts[at].tobytes() for at in group})
        if distinct >= max(SHARED, SHARED_SHARE * len(train)):
            note = f"{distinct:,} prompts have {texts[group[0]].strip()[:NOTE]!r}"
            found |= {train[at].id: note for at in group}
    return found


def _distinct(words: np.ndarray) -> float:
    triples = shingles(words)
    return len(np.unique(triples)) / len(triples)
