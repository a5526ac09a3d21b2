"""training/objectives/objective.py: which of two evaluations an objective calls the better one."""

import pytest

from training.config import GRPO
from training.objectives.dpo import DirectPreferenceOptimization
from training.objectives.grpo import GroupRelativePolicyOptimization
from training.objectives.sft import SupervisedFineTuning

NAN, INFINITE = float("nan"), float("inf")


def of(metric: str, method: str):
    if method == "grpo":
        return GroupRelativePolicyOptimization(GRPO(metric_for_best_model=metric))
    kind = SupervisedFineTuning if method == "sft" else DirectPreferenceOptimization
    return kind(metric_for_best_model=metric)


@pytest.mark.parametrize(
    "method, metric, higher",
    [
        ("sft", "loss", False),
        ("sft", "token_accuracy", True),
        ("dpo", "loss", False),
        ("dpo", "rewards/accuracies", True),
        ("dpo", "rewards/margins", True),
        ("grpo", "loss", False),
        ("grpo", "reward", True),
    ],
)
def test_a_lower_loss_and_a_higher_reward_accuracy_or_margin_is_kept(method, metric, higher):
    objective, (low, high) = of(metric, method), ({metric: 0.2}, {metric: 0.3})
    assert (objective.better(high, low), objective.better(low, high)) == (higher, not higher)
    assert not objective.better(low, low)
    for lost in ({metric: NAN}, {metric: INFINITE}):
        assert objective.better(low, lost) and not objective.better(lost, low)
        assert not objective.better(lost, lost)
