"""The prompts of a trace as a dataset, whose candidates can be drawn again and again.

Contract: pure; the same seed gives the same draws to every strategy, so that strategies are compared in pairs.

1. Row r of the dataset is the trace's r-th prompt; beyond the last, the data begin again (the next epoch).
2. Candidates of a launch are a permutation of the recorded ones, another for each epoch and each time that a prompt
   comes again; with seed 0, the first launch in the first epoch takes them as they were recorded.
3. Candidates beyond the recorded ones are drawn from these with replacement: `resampled` says which share that is.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from darts.simulation.trace import LengthTrace

CANDIDATE = np.dtype([("lengths", np.int64), ("truncated", np.bool_), ("reward", np.float64)], align=True)
CACHED = 8
"""Draws of the whole dataset that are held."""


class Dataset:
    """Draws candidates of the trace's prompts.

    Args:
        trace: at least one prompt.
        width: candidates per prompt that a launch may need.
        seed: of the draws.
    """

    def __init__(self, trace: LengthTrace, width: int, seed: int = 0) -> None:
        self.keys = [prompt.key for prompt in trace.prompts]
        self.width = width
        self.seed = seed
        self._counts = np.array([len(prompt.lengths) for prompt in trace.prompts])
        self._recorded = np.zeros((len(self.keys), self._counts.max()), dtype=CANDIDATE)
        for prompt, count, row in zip(trace.prompts, self._counts, self._recorded, strict=True):
            for column in CANDIDATE.names:
                row[column][:count] = getattr(prompt, column)
        self._order = lru_cache(CACHED)(self._draw_order)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def resampled(self) -> float:
        """Share of `width` candidates per prompt that are drawn with replacement."""
        return float(np.maximum(self.width - self._counts, 0).sum() / (self.width * len(self)))

    def draw(self, rows: Sequence[int], launches: Sequence[int]) -> np.recarray:
        """Candidates of prompts: `lengths`, `truncated` and `reward`, each of shape [num_prompts, width].

        Args:
            rows: of the dataset; row + len(self) is the same prompt in the next epoch.
            launches: how often each was launched before, in its epoch.
        """
        epochs, places = np.divmod(np.array(rows, dtype=np.int64), len(self))
        drawn_pairs = list(zip(epochs.tolist(), launches, strict=True))
        orders = {epoch_launch: self._order(*epoch_launch) for epoch_launch in sorted(set(drawn_pairs))}
        drawn_order = np.array([orders[pair][place] for pair, place in zip(drawn_pairs, places, strict=True)])
        return self._recorded[places[:, None], drawn_order].view(np.recarray)

    def _draw_order(self, epoch: int, launch: int) -> NDArray[np.int32]:
        """Which recorded candidates a launch gets, of each row of the dataset; shape [len(self), width]."""
        rng = np.random.default_rng([self.seed, epoch, launch])
        most_recorded = self._recorded.shape[1]
        if (self.seed, epoch, launch) == (0, 0, 0):
            first_order = np.broadcast_to(np.arange(most_recorded), self._recorded.shape)
        else:
            shuffled = rng.random(self._recorded.shape)
            shuffled[np.arange(most_recorded) >= self._counts[:, None]] = np.inf  # what was not recorded comes last
            first_order = np.argsort(shuffled, axis=1, kind="stable")
        more_draws = rng.integers(0, self._counts[:, None], (len(self), self.width))
        first_order = np.pad(first_order, ((0, 0), (0, self.width)))[:, : self.width]
        return np.where(np.arange(self.width) < self._counts[:, None], first_order, more_draws).astype(np.int32)
