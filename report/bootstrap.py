"""Confidence intervals of the difference between two runs, by the paired bootstrap (Efron 1979, Koehn 2004).

A draw takes as many rows as there are, with replacement, the same rows for each run. Each measure is computed
anew from the drawn rows: from the sums of their counts, because a measure such as F1 is no mean over rows.

R, N and K are the numbers of runs, rows and counts.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from tasks import classification
from tasks.measures import Counts, total

DRAWS, SEED, LEVEL = 1000, 3407, 0.95

Rows = Sequence[tuple[str, str, str]]


def paired(
    runs: Sequence[Rows], task: ModuleType, draws: int = DRAWS, labels: Sequence[str] = ()
) -> tuple[list[dict], list[dict[str, list[float]]]]:
    """Returns the measures of each run, and the interval of each run's difference to the first run.

    Args:
        runs: for each run its rows (prompt, gold, response); row n has the same prompt and gold in all runs.
        task: a module of tasks/, whose counts add up to its measures.
        draws: the number of bootstrap draws.
        labels: those of a classification; default: the gold responses of all rows.

    Returns:
        ([{measure: value}], [{measure: [low, high]}]), an element a run. The interval holds the middle LEVEL
        of the draws; it has the measures that are numbers.
    """
    from_counts = task.from_counts
    if task is classification:  # whether a response is a label does not depend on the rows that are drawn
        from_counts = partial(from_counts, labels=labels or [gold for _, gold, _ in runs[0]])
    measures = [from_counts(total(task.counts, rows)) for rows in runs]
    keys, tables = _tables(runs, task)
    times = _times(len(runs[0]), draws)
    sums = [(times @ table).tolist() for table in tables]  # R x (draws, K)
    drawn = [[from_counts(dict(zip(keys, row, strict=True))) for row in own] for own in sums]  # R x draws
    intervals = []
    for own in drawn:
        found = {}
        for key in [key for key, value in measures[0].items() if isinstance(value, int | float)]:
            found[key] = _middle([b[key] - a[key] for a, b in zip(drawn[0], own, strict=True)])
        intervals.append(found)
    return measures, intervals


def mean_difference(a: Sequence[float], b: Sequence[float], draws: int = DRAWS) -> tuple[float, float]:
    """Returns the interval of mean(a) - mean(b), where a[i] and b[i] belong to the same row."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    low, high = _middle(_times(len(differences), draws) @ differences / len(differences))
    return low, high


def _times(n: int, draws: int) -> Any:
    """Returns how often each draw takes each of n rows (draws, N)."""
    import numpy as np

    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=draws)


def _middle(values: Any) -> list[float]:
    """Returns the ends of the interval that holds the middle LEVEL of the values."""
    import numpy as np

    return [float(edge) for edge in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _tables(runs: Sequence[Rows], task: ModuleType) -> tuple[list[Any], list[Any]]:
    """Returns the K keys of all counts, and for each run its counts as a matrix (N, K)."""
    import numpy as np

    known: dict[tuple[str, str, str], Counts] = {}  # runs often agree on a row
    counts = [[known.get(row) or known.setdefault(row, task.counts(row)) for row in rows] for rows in runs]
    keys = list(dict.fromkeys(key for rows in counts for row in rows for key in row))
    place = {key: at for at, key in enumerate(keys)}
    tables = [np.zeros((len(rows), len(keys)), dtype=np.int64) for rows in runs]
    for table, rows in zip(tables, counts, strict=True):
        for at, row in enumerate(rows):
            table[at, [place[key] for key in row]] = list(row.values())
    return keys, tables
