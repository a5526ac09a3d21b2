"""Chat and raw text: what is no other task."""

from data.rows import Sample
from tasks.measures import EXACT_MATCH, LOSS, Row, differences, exact_match

METRICS = (LOSS, EXACT_MATCH)
LEGEND = {"wrong": "not in the expected text", "missing": "missing from the answer"}
TITLES = {"source": "Prompt", "gold": "Expected"}


def applies(samples: list[Sample]) -> bool:
    """Every sample is text."""
    return True


def score(rows: list[Row]) -> dict:
    """Returns {"exact_match": share of responses that equal the gold one}, {} without rows."""
    return {"exact_match": exact_match(rows)} if rows else {}


def shown_prompt(prompt: str) -> str:
    """Returns what the report shows of a prompt."""
    return prompt


def pieces(text: str, gold: str, prompt: str) -> list[tuple[str, str]]:
    """Returns the response in pieces with their kinds, which LEGEND explains."""
    return differences(text, gold)


def overall(measures: dict) -> dict | None:
    """Returns precision, recall and F1 over all labels; None for a task without labels."""
    return None
