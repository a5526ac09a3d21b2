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

from collections.abc import Callable, Sequence
from types import ModuleType

from common.progress import warn
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


def choose_task(name: str, samples: list[Sample], labels: Sequence[str] = ()) -> ModuleType:
    """Returns the task called `name`; for "auto", the first task in TASKS that applies to the samples.

    If the user names labels, "auto" is classification.
    """
    if name != "auto":
        return TASKS[name]
    return classification if labels else next(task for task in TASKS.values() if task.applies(samples))


def choose_labels(
    task: ModuleType,
    samples: Sequence[Sample],
    training: Sequence[Sample],
    named: Sequence[str],
    key: str,
) -> list[str]:
    """Returns the labels whose log-probabilities are compared: those named, or else found in the samples.

    If the training samples are a classification too, their labels count as found. Returns [] for any other
    task, and with a warning for more than classification.MAX_LABELS labels that were found.

    Args:
        named: the labels in the config key or the option `key`.
    """
    if task is not classification:
        return []
    known = [*samples, *(training if classification.applies([*training]) else ())]
    labels = classification.labels_of(samples if named else known, named)
    if not named and len(labels) > classification.MAX_LABELS:
        warn(f"{len(labels)} different responses are too many to compare as labels; name the labels in {key}")
        return []
    return labels
