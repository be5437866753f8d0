"""What early stop hides: how far `censored_std` is off for groups that were stopped, learnt from groups that were not.

Contract: pure. The tail beyond the M shortest is a matter of the model of lengths, which no workload obeys. Groups that
ran to their end show the truth: censored as deeply as early stop censors, their estimate can be compared with it. Our
choice; without it prompts that are stopped would look too even where tails are heavy, and lose their budget for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.history import censored_std

WEIGHT = 0.3
"""Of a new rollout."""
MOST = 4.0
"""The factor lies in [1 / MOST, MOST]: it is a mean over prompts, and single ones are off by chance."""


class StopCorrection:
    """The factor by which stds of stopped groups are corrected: root of the ratio of two moving mean variances.

    Variances, because these are what a history averages: in the mean the corrected ones are those of full groups.

    Example:
        >>> correction = StopCorrection()
        >>> correction.factor
        1.0
    """

    def __init__(self) -> None:
        self._means: tuple[float, float] | None = None  # of the variance in truth, and estimated had it been stopped

    @property
    def factor(self) -> float:
        """Truth over estimate; 1.0 before anything was learnt."""
        if self._means is None or min(self._means) == 0:
            return 1.0
        return float(np.clip(np.sqrt(self._means[0] / self._means[1]), 1 / MOST, MOST))

    def learn(self, groups: Sequence[NDArray[np.int64]], num_keep: int, most: int) -> None:
        """Takes the groups of a rollout that ran to their end.

        A stopped group has `most` candidates and ends after M of them. Full groups have fewer, so they are censored
        after the same share of theirs.

        Args:
            groups: lengths of all candidates of each group.
            num_keep: M, after which a stopped group ends.
            most: M_up, candidates of a group that is stopped.
        """
        pairs = []
        for lengths in groups:
            ended = max(round(len(lengths) * num_keep / most), 2)
            if ended < len(lengths):
                end = np.partition(lengths, ended - 1)[ended - 1]
                pairs.append((lengths.var(), censored_std(np.minimum(lengths, end), lengths > end) ** 2))
        if pairs:
            new = np.mean(pairs, axis=0)
            old = new if self._means is None else np.array(self._means)
            truth, estimate = (old + WEIGHT * (new - old)).tolist()
            self._means = truth, estimate

    def state_dict(self) -> list[float] | None:
        """For JSON."""
        return None if self._means is None else list(self._means)

    def load_state_dict(self, state: Any) -> None:
        """Goes on where `state_dict` was called.

        Raises:
            ValueError: something else.
        """
        if state is not None:
            numbers = isinstance(state, list) and len(state) == 2
            if not (numbers and all(isinstance(v, int | float) and np.isfinite(v) and v >= 0 for v in state)):
                raise ValueError(f"correction={state!r:.80}: must be null or two finite numbers that are not negative.")
        self._means = None if state is None else (float(state[0]), float(state[1]))
