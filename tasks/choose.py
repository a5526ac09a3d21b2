"""Which task the rows are."""

from types import ModuleType

from data.rows import Sample
from tasks import classification, redaction, text, translation

TASKS = {"redaction": redaction, "translation": translation, "classification": classification, "text": text}
ALL_METRICS = tuple(dict.fromkeys(metric for task in TASKS.values() for metric in task.METRICS))


def choose_task(name: str, samples: list[Sample]) -> ModuleType:
    """Returns the named task, or for "auto" the first that applies to the samples."""
    if name != "auto":
        return TASKS[name]
    return next(task for task in TASKS.values() if task.applies(samples))
