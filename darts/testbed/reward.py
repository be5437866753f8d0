"""The rule-based reward, in the form that verl's reward loop calls.

Configure it with ``reward.custom_reward_function.path=pkg://darts.testbed.reward`` (or the path of
this file) and ``reward.custom_reward_function.name=compute_score``.
"""

from typing import Any

from darts.testbed.task import score


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Scores one decoded response: 1.0 for the right answer at its very end, else 0.0.

    A response cut off by the length limit has no answer at its end and scores 0.0; only one cut
    exactly between its answer and the end-of-sequence token, which the text cannot tell, does not.

    Args:
        data_source: Not read, as `extra_info` and `kwargs`, which verl passes to every reward.
        solution_str: The response without special tokens.
        ground_truth: The right total, in decimal.
    """
    value = score(solution_str, int(ground_truth))
    return {"score": value, "acc": value}
