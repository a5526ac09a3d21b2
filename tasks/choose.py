"""The tasks, and the choice of one for a set of rows.

A task is a module with

    applies(samples)         whether the samples are of this task
    score(rows)              {measure: value} of one or more rows; of a task with labels also "per_label"
    METRICS                  the measures that the report shows besides the loss and exact_match
    overall(measures)        precision, recall and F1 over all labels, None for a task without labels
    shown_prompt, pieces     what the report shows of a prompt and of a response
    LEGEND, TITLES           {kind of piece: its text in the report}, {part of an example: its heading}
"""

from collections.abc import Callable
from types import ModuleType

from data.rows import Sample
from tasks import classification, redaction, text, translation
from tasks.measures import EXACT_MATCH, LOSS

TASKS = {"redaction": redaction, "translation": translation, "classification": classification, "text": text}
ALL_METRICS = (LOSS, EXACT_MATCH, *(metric for task in TASKS.values() for metric in task.METRICS))
# Maps a name that `generate.py --instruction` knows to the function that makes a prompt of a text.
PROMPTS: dict[str, Callable[[str], str]] = {"redact": redaction.prompt_for}


def choose_task(name: str, samples: list[Sample]) -> ModuleType:
    """Returns the named task, or for "auto" the first that applies to the samples."""
    if name != "auto":
        return TASKS[name]
    return next(task for task in TASKS.values() if task.applies(samples))
