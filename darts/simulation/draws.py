"""The prompts of a trace as a dataset, whose candidates can be drawn again and again.

Contract: pure; the same seed gives the same draws to every strategy, so that strategies are compared in pairs.

1. Row r of the dataset is the trace's r-th prompt; beyond the last, the data begin again (the next epoch).
2. Candidates of a launch are a permutation of the recorded ones, another for each epoch and each time that a prompt
   comes again; with seed 0, the first launch in the first epoch takes them as they were recorded.
3. Candidates beyond the recorded ones are drawn from these with replacement: `resampled` says which share that is.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darts.simulation.trace import LengthTrace

CACHED = 8
"""Draws of the whole dataset that are held."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnCandidates:
    """Candidates of some prompts; arrays have the shape [num_prompts, width]."""

    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    reward: NDArray[np.float64]


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
        self._seed = seed
        self._counts = np.array([len(prompt.lengths) for prompt in trace.prompts])
        column_shape = len(self.keys), int(self._counts.max())
        self._lengths = np.zeros(column_shape, dtype=np.int64)
        self._truncated = np.zeros(column_shape, dtype=bool)
        self._reward = np.full(column_shape, np.nan)
        for row, prompt in enumerate(trace.prompts):
            count = len(prompt.lengths)
            self._lengths[row, :count] = prompt.lengths
            self._truncated[row, :count] = prompt.truncated
            self._reward[row, :count] = prompt.reward
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def resampled(self) -> float:
        """Share of `width` candidates per prompt that are drawn with replacement."""
        return float(np.maximum(self.width - self._counts, 0).sum() / (self.width * len(self)))

    def key(self, row: int) -> str:
        """The prompt of a row, in any epoch."""
        return self.keys[row % len(self)]

    def draw(self, rows: Sequence[int], launches: Sequence[int]) -> DrawnCandidates:
        """Candidates of prompts.

        Args:
            rows: of the dataset; row + len(self) is the same prompt in the next epoch.
            launches: how often each was launched before, in its epoch.
        """
        prompt_places = np.array([row % len(self) for row in rows], dtype=np.int64)
        drawn_pairs = [(row // len(self), row_launch) for row, row_launch in zip(rows, launches, strict=True)]
        candidate_order = np.empty((len(prompt_places), self.width), dtype=np.int64)
        for epoch_launch in sorted(set(drawn_pairs)):
            same_pair = np.array([row_pair == epoch_launch for row_pair in drawn_pairs])
            candidate_order[same_pair] = self._order(*epoch_launch)[prompt_places[same_pair]]
        rows_of = prompt_places[:, None]
        return DrawnCandidates(
            lengths=self._lengths[rows_of, candidate_order],
            truncated=self._truncated[rows_of, candidate_order],
            reward=self._reward[rows_of, candidate_order],
        )

    def _order(self, epoch: int, launch: int) -> NDArray[np.int32]:
        """Which recorded candidates a launch gets, of each row of the dataset; shape [len(self), width]."""
        drawn_order = self._orders.pop((epoch, launch), None)
        if drawn_order is None:
            rng = np.random.default_rng([self._seed, epoch, launch])
            most_recorded = self._lengths.shape[1]
            if (self._seed, epoch, launch) == (0, 0, 0):
                first_order = np.broadcast_to(np.arange(most_recorded), (len(self), most_recorded))
            else:
                shuffled = rng.random((len(self), most_recorded))
                shuffled[np.arange(most_recorded) >= self._counts[:, None]] = np.inf  # what was not recorded comes last
                first_order = np.argsort(shuffled, axis=1, kind="stable")
            more_draws = rng.integers(0, self._counts[:, None], (len(self), self.width))
            drawn_order = np.where(
                np.arange(self.width) < self._counts[:, None],
                np.pad(first_order, ((0, 0), (0, self.width)))[:, : self.width],
                more_draws,
            ).astype(np.int32)
        self._orders[epoch, launch] = drawn_order
        while len(self._orders) > CACHED:
            self._orders.popitem(last=False)
        return drawn_order
