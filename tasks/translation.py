"""Translation, measured by chrF (Popovic 2015) and BLEU (Papineni et al. 2002), if sacrebleu is there."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from common.progress import warn
from data.rows import Sample
from tasks.measures import Counts, Metric, exact_counts, exact_match, total
from tasks.text import LEGEND, TITLES, overall, pieces, shown_prompt

__all__ = ["LEGEND", "METRICS", "TITLES", "applies", "counts", "from_counts", "overall", "pieces", "score"]
__all__ += ["shown_prompt"]
METRICS = (
    Metric("chrf", "chrF", percent=False, lower_is_better=False),
    Metric("bleu", "BLEU", percent=False, lower_is_better=False),
)


def applies(samples: list[Sample]) -> bool:
    """Returns whether the first turn of every sample, the system's or the user's, begins with "Translate"."""
    firsts = [s.messages[0][1] if s.messages else "" for s in samples]
    return bool(samples) and all(first.lstrip().startswith("Translate") for first in firsts)


def score(rows: Sequence[tuple[str, str, str]]) -> dict:
    """Returns exact_match (0 to 1) and, if sacrebleu is installed, corpus "chrf" and "bleu" (0 to 100)."""
    if not _metrics():
        warn('chrF and BLEU need sacrebleu: pip install -e ".[translation]"')
    return from_counts(total(counts, rows))


def counts(row: tuple[str, str, str]) -> Counts:
    """Returns what one row adds; (measure, n) is the n-th statistic from which sacrebleu computes it.

    The numbers of shared n-grams add up over the rows; sacrebleu's own significance test does the same.
    """
    _, gold, text = row
    found = exact_counts(gold, text)
    for name, metric in _metrics().items():
        # sacrebleu has no public name for these statistics.
        [statistics] = metric._extract_corpus_statistics([text.strip()], [[gold.strip()]])
        found = {**found, **{(name, n): value for n, value in enumerate(statistics)}}
    return found


def from_counts(sums: Counts) -> dict:
    """Returns the measures of the rows whose counts add up to `sums`."""
    measures = {"exact_match": exact_match(sums)}
    for name, metric in _metrics().items():
        size = sum(isinstance(key, tuple) and key[0] == name for key in sums)
        if size:
            measures[name] = metric._compute_score_from_stats([sums[name, n] for n in range(size)]).score
    return measures


def _metrics() -> dict[str, Any]:
    """Returns sacrebleu's chrF and BLEU by their names, {} if it is not installed."""
    try:
        import sacrebleu
    except ImportError:
        return {}
    return _made(sacrebleu)


@cache
def _made(sacrebleu: ModuleType) -> dict[str, Any]:
    return {"chrf": sacrebleu.CHRF(), "bleu": sacrebleu.BLEU()}
