"""How full the engines were: the bubble ratio, counted in decoding steps.

Contract: pure, without a clock, so that it is defined alike for all arms. An engine has as many slots as it can run at
once, at most as many as it was given candidates:

    slots of an engine = min(max_num_seqs, candidates launched on it)
    all slot-steps     = slots of all engines x decoding steps until the rollout's last candidate ends
    idle slot-steps    = all slot-steps - tokens decoded
    bubble ratio       = idle slot-steps / all slot-steps

Every running candidate gets one token per step; what does not find a slot waits, first come, first served, as in
`darts.latency.rollout_time`. So an engine that waits for another one is idle, as is a slot that waits for its engine's
last candidate. An aborted candidate ends with the tokens that it had. Prefill is not counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darts.latency import LatencyCurve, makespan

STEP = LatencyCurve([1, 2], [1.0, 1.0])
"""One second a step, however many sequences run: seconds are steps."""


class SlotSteps(NamedTuple):
    """A rollout's; candidates of 10 and 30 tokens: `SlotSteps(slots=2, steps=30, decoded=40)`, bubble ratio 1/3."""

    slots: int  # of all engines
    steps: int  # until the last candidate ends
    decoded: int  # tokens

    @property
    def whole(self) -> int:
        """All slot-steps."""
        return self.slots * self.steps

    @property
    def idle(self) -> int:
        """Slot-steps without a token."""
        return self.whole - self.decoded


def slot_steps(engines: Sequence[Sequence[int] | NDArray[np.int64]], max_running: int | None = None) -> SlotSteps:
    """The slot-steps of a rollout, of which each engine has the tokens of its candidates in the order of launch.

    Raises:
        ValueError: a negative length, or `max_running` (`max_num_seqs`; None: all run at once) below 1.
    """
    sizes = [len(lengths) for lengths in engines]
    slots = sum(sizes if max_running is None else np.minimum(sizes, max_running))
    return SlotSteps(int(slots), round(makespan(engines, STEP, max_running)), int(sum(map(np.sum, engines))))


def in_turns(token_lengths: NDArray[np.int64], num_engines: int) -> list[NDArray[np.int64]]:
    """Each engine's candidates, dealt out one by one as launched, as `darts.forecast` and `routing=balanced` do."""
    return [token_lengths[engine_number::num_engines] for engine_number in range(num_engines)]
