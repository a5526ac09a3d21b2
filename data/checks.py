"""A look at the data before the model sees it: the page that explains most disappointing runs.

`examine` counts, `brief` writes a few lines. Nothing here changes the data or stops a run.
"""

import re
from collections import Counter, defaultdict

from data.loader import prompt_of
from data.render import IGNORE_INDEX

EXAMPLES = 3  # ids shown for each finding
# UTF-8 that was once read as Latin-1 or Windows-1252 (e acute becomes A tilde, copyright sign), and the
# replacement character. A lead byte looks like A circumflex or tilde (accents), a circumflex (dashes, quotes,
# euro) or eth (emoji).
_TAIL = re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")) + "\u0080-\u00bf"
MOJIBAKE = re.compile(f"[\u00c2\u00c3][{_TAIL}]|\u00e2[\u20ac\u201a\u0080\u0082]|\u00f0[\u0178\u009f]|\ufffd")

FINDINGS = {
    "duplicates": "exact copies of an earlier sample",
    "empty_prompts": "samples with an empty prompt",
    "contradictions": "samples whose prompt also occurs with another response",
    "overlap": "validation samples whose prompt is also in training",
    "mojibake": "samples that look wrongly decoded (UTF-8 read as Latin-1)",
}


def examine(samples, documents=(), validation=(), problems=(), counts=None):
    """Count what is worth knowing about a training set.

    Args:
        samples: list of Sample, as read.
        documents: list of Document, as rendered; () leaves the lengths out.
        validation: list of Sample held out.
        problems: rows that read_samples skipped.
        counts: Counts of render_all, for what was dropped or cut.

    Returns:
        dict: "samples", "validation", "skipped", "tokens", "longest" (tokens), "supervised_share",
        "dropped", "truncated", and for each of FINDINGS a list of sample ids.
    """
    tokens = sum(len(d.input_ids) for d in documents)
    supervised = sum(len(d.labels) - d.labels.count(IGNORE_INDEX) for d in documents)
    return {
        "samples": len(samples),
        "validation": len(validation),
        "skipped": len(problems),
        "tokens": tokens,
        "longest": max((len(d.input_ids) for d in documents), default=0),
        "supervised_share": supervised / tokens if tokens else 0.0,
        "dropped": counts.dropped + counts.unsupervised if counts else 0,
        "truncated": counts.truncated if counts else 0,
        "duplicates": _duplicates(samples),
        "empty_prompts": [s.id for s in samples if s.text is None and not _prompt_text(s).strip()],
        "contradictions": _contradictions(samples),
        "overlap": _overlap(samples, validation),
        "mojibake": [s.id for s in [*samples, *validation] if MOJIBAKE.search(_all_text(s))],
    }


def brief(report):
    """The examination in the lines that a training run prints: sizes, and only what is suspicious."""
    head = f"data: {report['samples']:,} samples, {report['validation']:,} held out"
    if report["tokens"]:
        head += f", {report['tokens']:,} tokens ({report['supervised_share']:.0%} supervised), longest {report['longest']:,}"
    left_out = {"skipped": "bad rows skipped", "dropped": "samples dropped", "truncated": "samples truncated"}
    lines = [head] + [f"  {report[key]:,} {text}" for key, text in left_out.items() if report[key]]
    for key, text in FINDINGS.items():
        ids = report[key]
        if ids:
            lines.append(
                f"  {len(ids):,} {text}: {', '.join(ids[:EXAMPLES])}{', ...' if len(ids) > EXAMPLES else ''}"
            )
    return "\n".join(lines)


def _duplicates(samples):
    seen = Counter()
    copies = []
    for sample in samples:
        key = (sample.messages, sample.text)
        if seen[key]:
            copies.append(sample.id)
        seen[key] += 1
    return copies


def _contradictions(samples):
    """Ids of conversations whose prompt has more than one response in the set: no model can learn both."""
    responses, ids = defaultdict(set), defaultdict(list)
    for sample in samples:
        if sample.text is None:
            prompt = sample.messages[:-1]
            responses[prompt].add(sample.messages[-1][1].strip())
            ids[prompt].append(sample.id)
    return [id for prompt, found in responses.items() if len(found) > 1 for id in ids[prompt]]


def _overlap(samples, validation):
    trained = {prompt_of(sample) for sample in samples} if validation else set()
    return [sample.id for sample in validation if prompt_of(sample) in trained]


def _prompt_text(sample):
    return "".join(content for role, content in sample.messages[:-1] if role == "user")


def _all_text(sample):
    return sample.text if sample.text is not None else "\n".join(content for _, content in sample.messages)
