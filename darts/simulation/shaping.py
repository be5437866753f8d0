"""A MODEL of how a strategy moves the lengths of later steps, relative to plain verl. Off by default.

Contract: pure. Whatever is computed with it is marked `MODEL` where it is shown.

1. At quantile q of length, a step of training under the strategy multiplies lengths by exp(drift(q)), beside what plain
   training does (our choice): one number for each of `QUANTILES`, linear between, constant beyond.
2. Each drift is the least-squares slope, through the origin, of log(quantile of the strategy / quantile of plain) over
   the steps of two runs that began with the same weights and saw the same prompts.
3. The model is not drawn out: from the last step of the fit on, nothing moves any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darts.simulation import SimulationError
from darts.simulation.trace import LengthTrace

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShapingModel:
    """Example: `ShapingModel(drift=(0.0, 0.0, -0.001, -0.004, -0.01), steps=100, lengths=...)`."""

    drift: Sequence[float]  # log of the factor per step, at QUANTILES
    steps: int  # of the fit
    lengths: NDArray[np.int64]  # of the trace that is replayed, sorted: where a length lies

    def __call__(self, lengths: NDArray[np.int64], done: int) -> NDArray[np.int64]:
        """Lengths after so many steps of training; same shape, at least 1."""
        length_rank = np.searchsorted(self.lengths, lengths, side="right") / len(self.lengths)
        factor = np.exp(np.interp(length_rank, QUANTILES, self.drift) * min(done, self.steps))
        return np.maximum(np.rint(lengths * factor), 1).astype(np.int64)

    def __str__(self) -> str:
        moved = ", ".join(f"p{q * 100:g} {np.expm1(d):+.2%}" for q, d in zip(QUANTILES, self.drift, strict=True))
        return f"MODEL of shaping, per step, for {self.steps} steps: {moved}"


def fit(plain: LengthTrace, shaped: LengthTrace, replayed: LengthTrace) -> ShapingModel:
    """The model from two runs.

    Args:
        plain: of a run of plain verl.
        shaped: of the strategy's.
        replayed: the trace that it will be applied to.

    Raises:
        SimulationError: the runs have fewer than two steps in common.
    """
    common = sorted(set(plain.steps) & set(shaped.steps))
    if len(common) < 2:
        raise SimulationError(
            f"{plain.name} and {shaped.name} have {len(common)} steps in common: a drift needs at least 2; give two "
            "runs of the same steps."
        )
    quantiles = []
    for trace in (plain, shaped):
        by_step = [[prompt.lengths for prompt in trace.prompts if prompt.step == step] for step in common]
        quantiles.append(np.array([np.quantile(np.concatenate(lengths), QUANTILES) for lengths in by_step]))
    steps_passed = np.array(common, dtype=np.float64) - common[0]
    drift = steps_passed @ np.log(quantiles[1] / quantiles[0]) / (steps_passed @ steps_passed)
    lengths = np.sort(np.concatenate([prompt.lengths for prompt in replayed.prompts]))
    return ShapingModel(drift=drift.tolist(), steps=int(steps_passed[-1]), lengths=lengths)
