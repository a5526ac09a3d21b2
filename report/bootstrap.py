"""Confidence intervals of the difference between two runs, by the paired bootstrap (Efron 1979, Koehn 2004).

A draw takes as many rows as there are, with replacement, the same rows for each run. Each measure is computed
anew from the drawn rows: from the sums of their counts, because a measure such as F1 is no mean over rows.

R, N and K are the numbers of runs, rows and counts.
"""

import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tasks.measures import Counts, total

DRAWS, SEED, LEVEL = 1000, 3407, 0.95

Rows = Sequence[tuple[str, str, str]]


def paired(
    runs: Sequence[Rows], task: ModuleType, draws: int = DRAWS
) -> tuple[list[dict], list[dict[str, list[float]]]]:
    """Returns the measures of each run, and the interval of each run's difference to the first run.

    Args:
        runs: for each run its rows (prompt, gold, response); row n has the same prompt and gold in all runs.
        task: a module of tasks/, whose counts add up to its measures.
        draws: the number of bootstrap draws.

    Returns:
        ([{measure: value}], [{measure: [low, high]}]), an element a run. The interval holds the middle 95% of
        the draws; it has the measures that are numbers.
    """
    import numpy as np

    n = len(runs[0])
    measures = [task.from_counts(total(task.counts, rows)) for rows in runs]
    keys, tables = _tables(runs, task)
    times = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, N)
    drawn = [_measures(keys, times @ table, task) for table in tables]  # R x draws
    intervals = []
    for own in drawn:
        found = {}
        for key in [key for key, value in measures[0].items() if isinstance(value, int | float)]:
            differences = [b[key] - a[key] for a, b in zip(drawn[0], own, strict=True)]
            tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
            found[key] = [float(edge) for edge in np.quantile(differences, tails)]
        intervals.append(found)
    return measures, intervals


def mean_difference(
    a: Sequence[float], b: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Returns the interval of mean(a) - mean(b), where a[i] and b[i] belong to the same row."""
    rng, n = random.Random(seed), len(a)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(draws))
    tail = (1 - LEVEL) / 2
    return means[round(tail * (draws - 1))], means[round((1 - tail) * (draws - 1))]


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


def _measures(keys: list[Any], sums: Any, task: ModuleType) -> list[dict]:
    """Returns the measures of each draw from the draws' sums (draws, K)."""
    return [task.from_counts(dict(zip(keys, row, strict=True))) for row in sums.tolist()]
