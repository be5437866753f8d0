"""The cost model: seconds of a decoding step, of an engine's rollout, and of the slowest of several engines.

Contract: pure Python and NumPy; lengths and measured times in, seconds out. `python -m darts.engines profile` measures
a curve: `darts.engines.command` starts an engine, `darts.engines.measure` drives it, `darts.evidence.profile` is the
file.

1. A `LatencyCurve` is PTL(tp, b) of the paper for one engine (model, device, tensor-parallel size): seconds of a
   decoding step with b running sequences. It never falls as b grows, whatever was measured.
2. `rollout_time` is the paper's T = sum_j (l_j - l_(j-1)) * PTL(B - j + 1), exactly: all sequences start together, each
   gets one token per step. Sequences beyond `max_running` wait for a free slot, first come, first served. Prefill,
   preemption and the growth of attention with the context are not modelled.
3. `LatencyCurve.refined` moves a curve towards what running engines showed, which `StepTimes` collects.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

HALF_TRUST_STEPS = 100
"""Engine steps at which an observation counts half of its weight (our choice)."""
LARGEST_RATIO = 4.0
"""What is observed counts as at most this factor off the curve, whatever a suspended machine reports (our choice)."""


class LatencyCurve:
    """PTL(b): seconds of one decoding step of an engine that runs b sequences.

    What was measured is made non-decreasing by the isotonic least-squares fit (pool adjacent violators; our choice):
    a step with more sequences is not faster, so a dip is noise. Linear between the points.

    Args:
        batch_sizes: Running sequences, at least two different ones, in any order.
        seconds: Of a step, for each batch size.

    Raises:
        ValueError: fewer than two points, unequal numbers of both, what is not a finite number, a batch size below 1 or
            given twice, or seconds that are not positive.

    Example:
        >>> curve = LatencyCurve([1, 32, 64], [0.002, 0.003, 0.005])
        >>> curve(48)
        0.004
    """

    __slots__ = ("_batch_sizes", "_seconds")

    def __init__(self, batch_sizes: ArrayLike, seconds: ArrayLike) -> None:
        sizes, times = _numbers("batch_sizes", batch_sizes), _numbers("seconds", seconds)
        if len(sizes) != len(times):
            raise ValueError(f"seconds: {len(times)} for {len(sizes)} batch_sizes; one for each is needed.")
        if len(sizes) < 2:
            raise ValueError(f"batch_sizes={sizes.tolist()}: a curve needs at least 2 points.")
        _refuse("batch_sizes", sizes, sizes < 1, "a batch size must be at least 1.")
        _refuse("seconds", times, times <= 0, "a step must take more than 0 s.")
        size_order = np.argsort(sizes, kind="stable")
        self._batch_sizes = sizes[size_order]
        is_repeated = np.diff(self._batch_sizes, prepend=0.0) == 0
        _refuse("batch_sizes", self._batch_sizes, is_repeated, "each batch size must be given once.")
        self._seconds = _isotonic(times[size_order])

    @overload
    def __call__(self, batch_size: float) -> float: ...
    @overload
    def __call__(self, batch_size: Sequence[float] | NDArray) -> NDArray[np.float64]: ...
    def __call__(self, batch_size: ArrayLike) -> float | NDArray[np.float64]:
        """Seconds of a step with `batch_size` running sequences; for an array, an array of its shape.

        0.0 where nothing runs: an idle engine makes no step. Below the first point its value. Beyond the last point
        linear, with the slope of the last segment, but not steeper than from the origin to the last point (our
        choice): twice the sequences cost at most two steps, and noise in one segment must not be drawn out.

        Raises:
            ValueError: a negative or non-finite batch size.
        """
        sizes = np.asarray(batch_size, dtype=np.float64)
        _refuse("batch_size", sizes, ~np.isfinite(sizes) | (sizes < 0), "must be finite and not negative.")
        (size_before, last_size), (seconds_before, last_seconds) = self._batch_sizes[-2:], self._seconds[-2:]
        slope = min((last_seconds - seconds_before) / (last_size - size_before), last_seconds / last_size)
        seconds = np.interp(sizes, self._batch_sizes, self._seconds) + slope * np.maximum(sizes - last_size, 0.0)
        seconds = np.where(sizes == 0, 0.0, seconds)
        return seconds if seconds.ndim else float(seconds)

    @property
    def batch_sizes(self) -> tuple[float, ...]:
        """The points' batch sizes, increasing."""
        return tuple(self._batch_sizes.tolist())

    @property
    def seconds(self) -> tuple[float, ...]:
        """The points' seconds of a step, non-decreasing."""
        return tuple(self._seconds.tolist())

    def refined(self, observed: "StepTimes", weight: float) -> "LatencyCurve":
        """The curve with its points moved towards what running engines showed (our choice throughout).

        For each observed batch size the ratio of observed to expected seconds is blended with 1, as an exponential
        moving average with `weight`; observations of fewer than some `HALF_TRUST_STEPS` engine steps count less. The
        points are scaled by these ratios, linear in log(batch size) between the observed ones and constant beyond, so
        that what was not observed keeps its shape. Then the fit of the class applies.

        Args:
            observed: Since the last time. Empty changes nothing.
            weight: Of what was observed, in [0, 1].

        Raises:
            ValueError: `weight` outside [0, 1].
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight}: must lie in [0, 1].")
        points = observed.points()
        if not points:
            return self
        sizes, seconds, steps = np.array(points).T
        engine_steps = steps / sizes  # every running sequence reports the same step
        point_trust = weight * engine_steps / (engine_steps + HALF_TRUST_STEPS)
        observed_ratio = np.clip(seconds / self(sizes), 1 / LARGEST_RATIO, LARGEST_RATIO)
        point_scale = np.interp(np.log(self._batch_sizes), np.log(sizes), 1 + point_trust * (observed_ratio - 1))
        return LatencyCurve(self._batch_sizes, self._seconds * point_scale)

    def to_dict(self) -> dict[str, list[float]]:
        """For JSON, e.g. `{"batch_sizes": [1.0, 32.0], "seconds": [0.002, 0.003]}`."""
        return {"batch_sizes": list(self.batch_sizes), "seconds": list(self.seconds)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "LatencyCurve":
        """The curve that `to_dict` described; a `ValueError` on other keys, or as the class raises it."""
        if not isinstance(state, Mapping) or set(state) != {"batch_sizes", "seconds"}:
            raise ValueError(f"latency curve={state!r}: must have the keys batch_sizes and seconds, and no other.")
        return cls(state["batch_sizes"], state["seconds"])

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, LatencyCurve) else NotImplemented

    def __repr__(self) -> str:
        points = ", ".join(f"{b:g}: {s * 1e3:.3g} ms" for b, s in zip(self.batch_sizes, self.seconds, strict=True))
        return f"LatencyCurve({points})"


@dataclass(slots=True)
class StepTimes:
    """Decoding steps that were seen on running engines: how long, at how many running sequences.

    Sums in bins of powers of two, so it stays small however much is added.

    Example:
        >>> times = StepTimes()
        >>> times.add(running=12, seconds=0.064, steps=16)
        >>> times.points()
        [(12.0, 0.004, 16)]
    """

    # exponent of two -> [sum of steps * running, seconds, steps]; running lies in [2**exponent, 2**(exponent + 1))
    _bins: dict[int, list[float]] = field(default_factory=dict)

    def add(self, running: float, seconds: float, steps: int) -> None:
        """One sequence got `steps` tokens in `seconds`, while its engine ran `running` sequences on average.

        Raises:
            ValueError: fewer than 1 running, seconds that are not positive and finite, or fewer than 1 step.
        """
        if not 1 <= running < math.inf:
            raise ValueError(f"running={running}: must be finite and at least 1.")
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds={seconds}: must be finite and positive.")
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1.")
        self._add(math.frexp(running)[1] - 1, steps * running, seconds, steps)

    def merge(self, other: "StepTimes") -> None:
        """Adds what another one has seen."""
        for exponent, sums in other._bins.items():
            self._add(exponent, *sums)

    def points(self) -> list[tuple[float, float, int]]:
        """`(mean batch size, seconds per step, steps)` per bin, by increasing batch size."""
        bins = (self._bins[exponent] for exponent in sorted(self._bins))
        return [(running / steps, seconds / steps, int(steps)) for running, seconds, steps in bins]

    def _add(self, exponent: int, *sums: float) -> None:
        old_sums = self._bins.get(exponent, (0.0, 0.0, 0))
        self._bins[exponent] = [old + new for old, new in zip(old_sums, sums, strict=True)]

    def __bool__(self) -> bool:
        return bool(self._bins)


def rollout_time(lengths: ArrayLike, curve: LatencyCurve, max_running: int | None = None) -> float:
    """Seconds in which an engine decodes sequences that all start together (paper, section on the cost model).

    With the lengths sorted, l_1 <= ... <= l_B, B - j + 1 sequences run between the (j-1)-th and the j-th end, so
    T = sum_j (l_j - l_(j-1)) * PTL(B - j + 1). Sequences beyond `max_running` wait for a free slot in the order given,
    as in vLLM's queue; as long as one waits, `max_running` run.

    Args:
        lengths: Tokens of each sequence; an expectation need not be whole. Empty: 0.0.
        curve: PTL of the engine.
        max_running: `max_num_seqs` of the engine; None: all run at once.

    Raises:
        ValueError: a negative or non-finite length, or `max_running` below 1.

    Example:
        >>> rollout_time([10, 30], LatencyCurve([1, 2], [0.5, 1.0]))
        20.0
    """
    tokens = _numbers("lengths", lengths)
    _refuse("lengths", tokens, tokens < 0, "a length must not be negative.")
    if max_running is not None and max_running < 1:
        raise ValueError(f"max_running={max_running}: must be at least 1.")
    return float(decode_seconds(tokens, curve, max_running))


def decode_seconds(
    tokens: NDArray[np.float64], curve: LatencyCurve, max_running: int | None = None
) -> NDArray[np.float64]:
    """`rollout_time` of many engines at once, unchecked: shape [..., sequences] -> [...].

    A sequence of 0 tokens takes no time, so engines with fewer sequences have such ones at their end.
    """
    num_sequences = tokens.shape[-1]
    waited_steps: float | NDArray[np.float64] = 0.0
    if max_running is not None and num_sequences > max_running:
        queued_engines = [_queued(engine, max_running) for engine in tokens.reshape(-1, num_sequences)]
        waited_steps = np.array([steps for steps, _ in queued_engines]).reshape(tokens.shape[:-1])
        tokens = np.array([tokens_left for _, tokens_left in queued_engines]).reshape(*tokens.shape[:-1], max_running)
        num_sequences = max_running
    step_seconds = curve(np.arange(num_sequences, -1, -1))
    # sum_j (l_j - l_(j-1)) p_j = sum_j l_j (p_j - p_(j+1))
    return waited_steps * step_seconds[0] + np.sort(tokens, axis=-1) @ -np.diff(step_seconds)


def _queued(tokens: NDArray[np.float64], slots: int) -> tuple[float, NDArray[np.float64]]:
    """Steps until nothing waits for a slot any more, and the tokens that the running sequences have left then.

    As many are taken from the queue at once as start before the first of them ends.
    """
    free_at, waited, queue = np.sort(tokens[:slots]), 0.0, tokens[slots:]  # free_at: the step at which a slot is free
    while len(queue):
        ends_at = free_at[: len(queue)] + queue[: len(free_at)]
        is_late = free_at[1 : len(ends_at)] > np.minimum.accumulate(ends_at)[:-1]
        num_started = int(np.argmax(is_late)) + 1 if is_late.any() else len(ends_at)
        waited = float(free_at[num_started - 1])
        free_at, queue = np.sort(np.concatenate([free_at[num_started:], ends_at[:num_started]])), queue[num_started:]
    return waited, free_at - waited


def makespan(engines: Iterable[ArrayLike], curve: LatencyCurve, max_running: int | None = None) -> float:
    """Seconds until the slowest of several equal engines has decoded its sequences; 0.0 without engines.

    Args:
        engines: The lengths of each engine's sequences, as `rollout_time` takes them.

    Raises:
        ValueError: as `rollout_time`.
    """
    return max((rollout_time(lengths, curve, max_running) for lengths in engines), default=0.0)


def _isotonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-decreasing values nearest by least squares: neighbours that fall are pooled to their mean."""
    blocks: list[tuple[float, int]] = []  # sum, count; the means increase
    for value in values.tolist():
        total, count = value, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            last_block = blocks.pop()
            total, count = total + last_block[0], count + last_block[1]
        blocks.append((total, count))
    return np.repeat([total / count for total, count in blocks], [count for _, count in blocks])


def _numbers(name: str, values: Any) -> NDArray[np.float64]:
    """A list of finite numbers as an array."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.ndim != 1:
        raise ValueError(f"{name}={values!r}: must be a list of numbers.")
    _refuse(name, numbers, ~np.isfinite(numbers), "must be finite.")
    return numbers


def _refuse(name: str, values: NDArray, is_wrong: NDArray, rule: str) -> None:
    """Raises for the first value that is wrong."""
    if is_wrong.any():
        bad_index = "" if values.ndim == 0 else f"[{int(np.argmax(is_wrong))}]"
        raise ValueError(f"{name}{bad_index}={values.ravel()[np.argmax(is_wrong)]:g}: {rule}")
