"""Chooses the task that suits a set of samples. A task is a module with

applies(samples)      returns whether the samples belong to this task
score(rows)           returns {measure: value} for tasks.measures.Rows; with labels also "per_label"
counts(row)           returns what one row adds to the counts from which the measures are computed
from_counts(sums)     returns {measure: value} of the sums: score(rows) = from_counts(sum of counts(row))
METRICS               the measures that the report shows, besides the loss and exact_match
overall(measures)     returns precision, recall and F1 over all labels; None for a task without labels
shown_prompt(prompt)  returns the part of a prompt that the report shows
pieces                splits a response into (kind, text) pairs, which the report marks by kind
LEGEND, TITLES        the report's {kind: explanation} and {part of an example: heading}
"""

from collections.abc import Callable
from types import ModuleType

from data.rows import Sample
from tasks import classification, redaction, text, translation
from tasks.measures import EXACT_MATCH, LOSS, MARGIN, PREFERRED, REWARD

TASKS = {"redaction": redaction, "translation": translation, "classification": classification, "text": text}
OF_OBJECTIVES = (LOSS, PREFERRED, MARGIN, REWARD)  # measured by the method of training, whatever the task
ALL_METRICS = (*OF_OBJECTIVES, EXACT_MATCH, *(m for task in TASKS.values() for m in task.METRICS))
# Maps a name that `generate.py --instruction` knows to the function that makes a prompt of a text.
PROMPTS: dict[str, Callable[[str], str]] = {"redact": redaction.prompt_for}


def name_of(task: ModuleType) -> str:
    """Returns the name of a task in TASKS."""
    return next(name for name, module in TASKS.items() if module is task)


def choose_task(name: str, samples: list[Sample]) -> ModuleType:
    """Returns the task called `name`; for "auto", the first task in TASKS that applies to the samples."""
    if name != "auto":
        return TASKS[name]
    return next(task for task in TASKS.values() if task.applies(samples))
