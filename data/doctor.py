"""A look at the data before the model sees it: the page that explains most disappointing runs.

`examine` counts, `format_report` writes a page, `brief` a few lines. Nothing here changes the data or stops a run.
"""

import re
from collections import Counter, defaultdict

from data.loader import prompt_of
from data.render import IGNORE_INDEX

EXAMPLES = 3  # ids shown for each finding
QUANTILES = (0, 0.5, 0.9, 0.99, 1)
# UTF-8 that was once read as Latin-1 or Windows-1252 (e acute becomes A tilde, copyright sign), and the replacement character.
# A lead byte looks like A circumflex or tilde (accents), a circumflex (dashes, quotes, euro) or eth (emoji).
_TAIL = re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")) + "\u0080-\u00bf"
MOJIBAKE = re.compile(f"[\u00c2\u00c3][{_TAIL}]|\u00e2[\u20ac\u201a\u0080\u0082]|\u00f0[\u0178\u009f]|\ufffd")

FINDINGS = {
    "duplicates": "exact copies of an earlier sample",
    "empty_prompts": "samples with an empty prompt",
    "contradictions": "samples whose prompt also occurs with another response",
    "overlap": "validation samples whose prompt is also in training",
    "mojibake": "samples that look wrongly decoded (UTF-8 read as Latin-1)",
    "too_long": "documents longer than data.max_length",
    "unsupervised": "documents without a supervised token",
}


def examine(samples, documents=(), validation=(), max_length=None, problems=(), counts=None):
    """Count what is worth knowing about a training set.

    Args:
        samples: list of Sample, as read.
        documents: list of Document, as rendered; () leaves the lengths out.
        validation: list of Sample held out.
        max_length: tokens; documents above it are listed.
        problems: rows that read_samples skipped.
        counts: Counts of render_all, for what was dropped or cut.

    Returns:
        dict: "samples", "validation", "skipped", "roles", "lengths" (quantile -> tokens), "tokens", "supervised_share",
        "dropped", "truncated", and for each of FINDINGS a list of sample ids.
    """
    lengths = sorted(len(document.input_ids) for document in documents)
    supervised = {d.id: len(d.labels) - d.labels.count(IGNORE_INDEX) for d in documents}
    tokens = sum(lengths)
    return {
        "samples": len(samples),
        "validation": len(validation),
        "skipped": len(problems),
        "raw_texts": sum(sample.text is not None for sample in samples),
        "tokens": tokens,
        "lengths": {q: lengths[round(q * (len(lengths) - 1))] for q in QUANTILES} if lengths else {},
        "supervised_share": sum(supervised.values()) / tokens if tokens else 0.0,
        "dropped": counts.dropped + counts.unsupervised if counts else 0,
        "truncated": counts.truncated if counts else 0,
        "duplicates": _duplicates(samples),
        "empty_prompts": [s.id for s in samples if s.text is None and not _prompt_text(s).strip()],
        "contradictions": _contradictions(samples),
        "overlap": _overlap(samples, validation),
        "mojibake": [s.id for s in [*samples, *validation] if MOJIBAKE.search(_all_text(s))],
        "too_long": [d.id for d in documents if max_length and len(d.input_ids) > max_length],
        "unsupervised": [id for id, count in supervised.items() if not count],
    }


def format_report(report):
    """The examination as a page of plain text."""
    lines = [
        f"samples           {report['samples']:,} for training, {report['validation']:,} for validation, {report['skipped']:,} bad rows skipped",
        f"kinds             {report['samples'] - report['raw_texts']:,} conversations, {report['raw_texts']:,} raw texts",
    ]
    if report["lengths"]:
        names = {0: "shortest", 0.5: "median", 0.9: "90%", 0.99: "99%", 1: "longest"}
        lengths = ", ".join(f"{names[q]} {length:,}" for q, length in report["lengths"].items())
        lines += [
            f"tokens            {report['tokens']:,}, of which {report['supervised_share']:.1%} are supervised",
            f"document lengths  {lengths}",
            f"over-long         {report['dropped']:,} dropped, {report['truncated']:,} truncated",
        ]
    return "\n".join(lines + _findings(report) + ([] if _findings(report) else ["no finding"]))


def brief(report):
    """The examination in the lines that a training run prints: sizes, and only what is suspicious."""
    head = f"data: {report['samples']:,} samples, {report['validation']:,} held out"
    if report["lengths"]:
        head += f", {report['tokens']:,} tokens ({report['supervised_share']:.0%} supervised), longest {report['lengths'][1]:,}"
    left_out = {"skipped": "bad rows skipped", "dropped": "samples dropped", "truncated": "samples truncated"}
    return "\n".join([head] + [f"  {report[key]:,} {text}" for key, text in left_out.items() if report[key]] + _findings(report, "  "))


def _findings(report, indent=""):
    lines = []
    for key, text in FINDINGS.items():
        ids = report[key]
        if ids:
            more = ", ..." if len(ids) > EXAMPLES else ""
            lines.append(f"{indent}{len(ids):,} {text}: {', '.join(ids[:EXAMPLES])}{more}")
    return lines


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
