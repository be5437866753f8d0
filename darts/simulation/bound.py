"""The least seconds that a rollout can take, whoever schedules it and whatever they know.

Contract: pure. The oracle knows all lengths before it starts, launches only what it keeps, and splits work over engines
without loss.

Claim. Take what was kept, n sequences of lengths l_1 >= l_2 >= ... that were generated to their end on E engines with
at most S sequences each. Then for every k the rollout takes at least (l_1 + ... + l_k) / R(k), where R(k) = E g(k / E)
and g is the smallest concave, non-decreasing function on [0, S] with g(0) = 0 and g(b) >= b / PTL(b).

Proof. At any moment let j_e <= S of the k run on engine e, beside others; it makes a step in at least PTL(j_e), for PTL
does not fall, so those k grow by at most sum_e j_e / PTL(j_e) <= sum_e g(j_e) <= E g(sum_e j_e / E) <= E g(k / E)
tokens a second, by concavity (Jensen) and since g does not fall. They need l_1 + ... + l_k.

k = 1 is the longest kept response at the speed of its own engine, k = n all work at the highest throughput. A strategy
that keeps any M candidates of each prompt has, for every k, at least the k longest of the M shortest: `shortest` of all
candidates that could be drawn gives a bound for every strategy that trains on these prompts in one rollout.

A strategy that may also choose which prompts come together in a rollout can do better over several of them: long
prompts together end as soon as one of them alone. Over B rollouts of N prompts each, the rollout whose longest response
is the j-th longest has one of at least the ((j - 1) N + 1)-th longest of all prompts' (the j - 1 others hold (j - 1) N
prompts at most). The sum of these, at the speed of an engine of their own, and all work at R of a whole rollout, are
two bounds of the sum of seconds: `Throughput.least_seconds_of`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darts.latency import LatencyCurve


def shortest(lengths: NDArray[np.int64], num_keep: int) -> NDArray[np.int64]:
    """The `num_keep` shortest candidates of each prompt: lengths [num_prompts, width] -> [num_prompts, num_keep]."""
    return np.partition(lengths, num_keep - 1, axis=1)[:, :num_keep]


class Throughput:
    """R(k): the most tokens a second that k sequences can get.

    Args:
        curve: PTL of an engine.
        engines: E.
        slots: S, `max_num_seqs` of an engine.
    """

    def __init__(self, curve: LatencyCurve, engines: int, slots: int) -> None:
        self._engines = engines
        batch_sizes = np.arange(slots + 1)
        batch_speeds = np.concatenate([[0.0], batch_sizes[1:] / curve(batch_sizes[1:])])
        hull_corners = [0]  # of the upper concave hull
        for right in range(1, slots + 1):
            while len(hull_corners) > 1:
                left, middle = hull_corners[-2:]
                rise = (batch_speeds[right] - batch_speeds[left]) * (middle - left) / (right - left)
                if batch_speeds[left] + rise < batch_speeds[middle]:
                    break
                hull_corners.pop()  # the line from left to right passes above it, or through it
            hull_corners.append(right)
        peak_corner = int(np.argmax(batch_speeds[hull_corners]))  # from there on it does not fall
        self._sizes = np.array(hull_corners[: peak_corner + 1], dtype=np.float64)
        self._speeds = batch_speeds[hull_corners[: peak_corner + 1]]

    def __call__(self, sequences: ArrayLike) -> NDArray[np.float64]:
        """Tokens a second, shape of `sequences`."""
        per_engine = np.asarray(sequences, dtype=np.float64) / self._engines
        return self._engines * np.interp(per_engine, self._sizes, self._speeds)

    def least_seconds(self, kept_lengths: ArrayLike) -> float:
        """The bound for kept lengths, of any shape; 0.0 for none."""
        lengths = np.sort(np.asarray(kept_lengths, dtype=np.float64), axis=None)[::-1]
        if not len(lengths):
            return 0.0
        return float((np.cumsum(lengths) / self(np.arange(1, len(lengths) + 1))).max())

    def least_seconds_of(self, kept_lengths: NDArray[np.int64], num_prompts: int) -> float:
        """The bound for several rollouts of so many prompts each, that share out prompts as they like.

        Args:
            kept_lengths: of all prompts, shape [rollouts * num_prompts, M].
        """
        longest_alone_s = np.sort(kept_lengths.max(axis=1))[::-1][::num_prompts].sum() / self(1)
        return float(max(longest_alone_s, kept_lengths.sum() / self(num_prompts * kept_lengths.shape[1])))
