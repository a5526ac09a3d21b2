"""Looks for common faults in training data, such as duplicates. It only reports: no data is changed."""

import re
from collections.abc import Iterable, Sequence

from data.loader import prompt_of
from data.render import IGNORE_INDEX, Counts, Document
from data.rows import Sample

EXAMPLES = 3  # A summary names this many samples for each finding.
# UTF-8 text that was decoded as Latin-1 or Windows-1252 shows each lead byte as a character of its own (A
# circumflex or tilde for accents, a circumflex for dashes and quotes, eth for emoji) before a trailing byte.
_TAIL = re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")) + "\u0080-\u00bf"
MOJIBAKE = re.compile(f"[\u00c2\u00c3][{_TAIL}]|\u00e2[\u20ac\u201a\u0080\u0082]|\u00f0[\u0178\u009f]|\ufffd")

FINDINGS = {
    "duplicates": "exact copies of an earlier sample",
    "empty_prompts": "samples with an empty prompt",
    "contradictions": "samples whose prompt also occurs with another response",
    "overlap": "validation samples whose prompt is also in training",
    "mojibake": "samples that look wrongly decoded (UTF-8 read as Latin-1)",
}


def examine(
    samples: Sequence[Sample],
    documents: Sequence[Document] = (),
    validation: Sequence[Sample] = (),
    problems: Sequence[str] = (),
    counts: Counts | None = None,
) -> dict:
    """Returns a dict with counts of a training set, and with the ids of suspicious samples.

    Each key of FINDINGS has a list of sample ids. "tokens" and "longest" are numbers of tokens, and
    "supervised_share" is the fraction of tokens that have a label. `documents` and `counts` are the results
    of data.render.render_all, `problems` those of data.rows.read_samples.
    """
    counts = counts or Counts()
    tokens = sum(len(d.input_ids) for d in documents)
    supervised = sum(len(d.labels) - d.labels.count(IGNORE_INDEX) for d in documents)
    conversations = [s for s in samples if s.messages]
    trained = {prompt_of(s) for s in samples} if validation else set()
    return {
        "samples": len(samples),
        "validation": len(validation),
        "skipped": len(problems),
        "tokens": tokens,
        "longest": max((len(d.input_ids) for d in documents), default=0),
        "supervised_share": supervised / tokens if tokens else 0.0,
        "dropped": counts.dropped + counts.unsupervised,
        "truncated": counts.truncated,
        "duplicates": [*copies(samples)],
        "empty_prompts": [s.id for s in conversations if not _user_text(s).strip()],
        "contradictions": [*several_responses(samples)],
        "overlap": [s.id for s in validation if prompt_of(s) in trained],
        "mojibake": [s.id for s in [*samples, *validation] if MOJIBAKE.search(_all_text(s))],
    }


def brief(report: dict) -> str:
    """Returns the dict that examine() made as a short text: its counts, and the faults that were found."""
    head = f"data: {report['samples']:,} samples, {report['validation']:,} held out"
    if report["tokens"]:
        share = f"{report['supervised_share']:.0%} supervised"
        head += f", {report['tokens']:,} tokens ({share}), longest {report['longest']:,}"
    left_out = {"skipped": "bad rows skipped", "dropped": "samples dropped", "truncated": "samples truncated"}
    lines = [head] + [f"  {report[key]:,} {text}" for key, text in left_out.items() if report[key]]
    for key, text in FINDINGS.items():
        if ids := report[key]:
            more = ", ..." if len(ids) > EXAMPLES else ""
            lines.append(f"  {len(ids):,} {text}: {', '.join(ids[:EXAMPLES])}{more}")
    return "\n".join(lines)


def copies(samples: Iterable[Sample]) -> dict[str, str]:
    """Returns {id: note} of the exact copies of an earlier sample."""
    first: dict[object, str] = {}
    found = {}
    for sample in samples:
        key = (sample.messages, sample.text, sample.rejected)
        if (earlier := first.setdefault(key, sample.id)) != sample.id:
            found[sample.id] = f"copy of {earlier}"
    return found


def several_responses(samples: Iterable[Sample]) -> dict[str, str]:
    """Returns {id: note} of the samples whose prompt occurs with two or more different responses.

    Pairs of a chosen and a rejected answer are left out: a prompt may have several of them.
    """
    prompts: dict[object, dict[str, list[str]]] = {}
    for sample in samples:
        if sample.messages and sample.rejected is None:
            prompt, (_, response) = sample.messages[:-1], sample.messages[-1]
            prompts.setdefault(prompt, {}).setdefault(response.strip(), []).append(sample.id)
    found: dict[str, str] = {}
    for responses in (group for group in prompts.values() if len(group) > 1):
        firsts = [ids[0] for ids in responses.values()]
        for ids in responses.values():
            other = next(first for first in firsts if first != ids[0])
            found |= dict.fromkeys(ids, f"another response in {other}")
    return found


def _user_text(sample):
    return "".join(content for role, content in sample.messages[:-1] if role == "user")


def _all_text(sample):
    return sample.text if sample.text is not None else "\n".join(content for _, content in sample.messages)
