"""Translation, measured by chrF (Popovic 2015) and BLEU (Papineni et al. 2002), if sacrebleu is there."""

from common.progress import warn
from data.rows import Sample
from tasks.measures import Metric, Row, exact_match
from tasks.text import LEGEND, TITLES, overall, pieces, shown_prompt

__all__ = ["LEGEND", "METRICS", "TITLES", "applies", "overall", "pieces", "score", "shown_prompt"]
METRICS = (
    Metric("chrf", "chrF", percent=False, lower_is_better=False),
    Metric("bleu", "BLEU", percent=False, lower_is_better=False),
)


def applies(samples: list[Sample]) -> bool:
    """Returns whether the first turn of every sample, the system's or the user's, begins with "Translate"."""
    firsts = [s.messages[0][1] if s.messages else "" for s in samples]
    return bool(samples) and all(first.lstrip().startswith("Translate") for first in firsts)


def score(rows: list[Row]) -> dict:
    """Returns exact_match (0 to 1) and, if sacrebleu is installed, corpus "chrf" and "bleu" (0 to 100)."""
    measures = {"exact_match": exact_match(rows)}
    try:
        import sacrebleu
    except ImportError:
        warn('chrF and BLEU need sacrebleu: pip install -e ".[translation]"')
        return measures
    texts, golds = [row.text.strip() for row in rows], [[row.gold.strip() for row in rows]]
    chrf, bleu = sacrebleu.corpus_chrf(texts, golds), sacrebleu.corpus_bleu(texts, golds)
    return measures | {"chrf": chrf.score, "bleu": bleu.score}
