"""How long the responses to each prompt were: moving statistics that survive aborts (paper, "adaptive redundancy").

Contract: pure Python and NumPy. `prompt_key` names a prompt, `censored_moments` reads one observation of it, and one
`LengthHistory`, owned by the trainer, remembers. The paper says "moving standard deviation"; all else here is ours.

1. An observation is that of all launched candidates. The kept ones alone are biased low, which would feed back into
   smaller budgets.
2. An aborted or truncated candidate is right-censored: its true length is at least the length that it had. One that was
   aborted before its first token (length 0) says nothing and is left out.
3. Observed lengths enter as they are; of a censored one only the unseen part is estimated. So an observation without
   censored lengths has exactly the plain moments (`numpy.std`, no degree of freedom taken off).
4. Estimates are finite, not negative, and scale with the lengths.
5. `StopCorrection` learns how far `censored_std` is off for groups that were stopped, from groups that were not: the
   tail beyond the M shortest is a matter of the model of lengths, which no workload obeys. Groups that ran to their end
   show the truth: censored as deeply as early stop censors, their estimate can be compared with it. Without it prompts
   that are stopped would look too even where tails are heavy, and lose their budget for it.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIOR_SPREAD = 0.1  # std over location of cube roots; in tokens 0.3 of the mean, as responses to one prompt may have
MAX_STRETCH = 4.0  # no length counts as more than this many times the longest known
STATE_VERSION = 1
LARGE = 4096  # bytes of a part of a prompt that count by their hash: images are not copied from level to level
LOG_SQRT_TAU = 0.5 * math.log(math.tau)
FAR_TAIL = 30.0  # in standard deviations; erfc underflows a little further out
CORRECTION_WEIGHT = 0.3  # of a new rollout in what early stop hides
MAX_CORRECTION = 4.0  # the factor lies in [1 / this, this], since few prompts are off by chance


def prompt_key(content: object) -> str:
    """Names a prompt by its content: 16 hexadecimal digits, the same in every process and every run.

    Content is chat messages, or anything built of mappings, sequences, text, numbers, None, bytes and images. Neither
    the order of a mapping counts, nor whether a sequence is a list, tuple or array, nor whether a scalar is Python's or
    NumPy's. Arrays of numbers in two dimensions or more, and other objects with `tobytes()` (PIL images), count by
    their bytes, shape and type of number or pixel.

    Raises:
        TypeError: content of a type that has no stable form.
    """
    return hashlib.sha256(_encode(content)).hexdigest()[:16]


def censored_moments(lengths: Sequence[float], censored: Sequence[bool]) -> tuple[float, float]:
    """Mean and standard deviation of a prompt's whole draw, some lengths of which are only known to be longer.

    The cube roots of the lengths are taken as normal: the cube root of a gamma variable is nearly so (Wilson and
    Hilferty, 1931), and the tail does not explode as a log-normal's where the short responses lie far apart. Location
    and spread are the most likely ones given all candidates and a weak prior, one more response whose root is
    `PRIOR_SPREAD` times the location away from it; few or equal lengths need that. A censored length then enters with
    its two first moments, given that it exceeds its bound. What would exceed `MAX_STRETCH` times the longest length
    counts as that: where most are censored, one such prompt would outweigh all others.

    Args:
        lengths: generated tokens of all launched candidates, shape [num_candidates].
        censored: which of them were aborted or truncated, shape [num_candidates].

    Returns:
        Mean and standard deviation in tokens: at most 4 and 2 times the longest length, 0.0 where nothing is known.

    Raises:
        ValueError: lengths that are negative or not finite, or flags of another shape.
    """
    values, flags = np.asarray(lengths, dtype=np.float64), np.asarray(censored, dtype=np.bool_)
    if values.ndim != 1 or values.shape != flags.shape:
        raise ValueError(f"lengths has shape {values.shape}, censored {flags.shape}: both must be [num_candidates].")
    for index in np.flatnonzero(~(np.isfinite(values) & (values >= 0))):
        raise ValueError(f"lengths[{index}]={values[index]}: a length must be finite and not negative.")
    observed, bounds = values[~flags], values[flags & (values > 0)]
    if len(bounds):
        return _completed_moments(observed, bounds)
    return (float(observed.mean()), float(observed.std())) if len(observed) else (0.0, 0.0)


def censored_std(lengths: Sequence[float], censored: Sequence[bool]) -> float:
    """Standard deviation of a prompt's whole draw; arguments and errors are those of `censored_moments`."""
    return censored_moments(lengths, censored)[1]


class LengthHistory:
    """Moving mean and variance of the response lengths, by prompt.

    The first observation of a prompt is taken as it is; later ones count with `weight`. A prompt that was never
    observed has the dataset's values: the means over the `recent` prompts that were observed last, each counted once
    with its current value. Without any observation these are 0.0.

    Args:
        weight: of a new observation against the past, in (0, 1]; ours, the paper gives none.
        recent: how many prompts the dataset's statistics cover, at least 1.

    Raises:
        ValueError: `weight` or `recent` out of range.

    Example:
        >>> history = LengthHistory()
        >>> history.update("a", [100, 300], [False, False])
        100.0
        >>> history.std("a"), history.mean("never seen")
        (100.0, 200.0)
    """

    def __init__(self, weight: float = 0.3, recent: int = 1024) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight={weight}: must lie in (0, 1].")
        if not isinstance(recent, int) or recent < 1:
            raise ValueError(f"recent={recent}: must be a whole number, at least 1.")
        self.weight, self.recent = weight, recent
        self._prompts: dict[str, tuple[float, float]] = {}  # (mean, variance), the prompt updated last comes last
        self._dataset: tuple[float, float] | None = None  # (mean, std) until the next update

    def update(self, key: str, lengths: Sequence[float], censored: Sequence[bool], correction: float = 1.0) -> float:
        """Takes one observation of a prompt, returns its `censored_std` times `correction`.

        One without a single token changes nothing.

        Raises:
            ValueError: a key that is not text, a correction that is not above 0, or as `censored_moments`.
        """
        if not isinstance(key, str):
            raise ValueError(f"key={key!r}: must be text, from prompt_key().")
        if not 0 < correction < math.inf:
            raise ValueError(f"correction={correction}: must be finite and above 0.")
        mean, std = censored_moments(lengths, censored)
        std *= correction
        if mean > 0:
            old_mean, old_variance = self._prompts.pop(key, (mean, std * std))
            variance = old_variance + self.weight * (std * std - old_variance)
            self._prompts[key] = (old_mean + self.weight * (mean - old_mean), variance)
            self._dataset = None
        return std

    def std(self, key: str) -> float:
        """Moving standard deviation of a prompt in tokens; the dataset's where the prompt was never observed."""
        return math.sqrt(self._prompts[key][1]) if key in self._prompts else self.dataset_std

    def mean(self, key: str) -> float:
        """Moving mean length of a prompt in tokens; the dataset's where the prompt was never observed."""
        return self._prompts[key][0] if key in self._prompts else self.dataset_mean

    @property
    def dataset_std(self) -> float:
        """Mean of the standard deviations of the prompts observed last, in tokens."""
        return self._of_dataset()[1]

    @property
    def dataset_mean(self) -> float:
        """Mean of the mean lengths of the prompts observed last, in tokens."""
        return self._of_dataset()[0]

    def recent_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Moving means and standard deviations of the prompts that were observed last, in tokens; both [num_recent]."""
        latest = np.array(list(islice(reversed(self._prompts.values()), self.recent)), dtype=np.float64).reshape(-1, 2)
        return latest[:, 0], np.sqrt(latest[:, 1])

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: object) -> bool:
        return key in self._prompts

    def state_dict(self) -> dict[str, Any]:
        """What was observed, for JSON (keys not sorted: their order is that of the last update); no configuration."""
        return {"version": STATE_VERSION, "prompts": {key: list(values) for key, values in self._prompts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces what was observed by what `state_dict` gave; on an error nothing changes.

        Raises:
            ValueError: not a state of this class, of another version, or with impossible values.
        """
        if not isinstance(state, dict) or state.keys() != {"version", "prompts"}:
            raise ValueError(f"state={state!r:.200}: must be a dict with exactly the keys version and prompts.")
        version, prompts = state["version"], state["prompts"]
        if type(version) is not int or version != STATE_VERSION:
            raise ValueError(f"version={version!r:.200}: this version of darts reads {STATE_VERSION}.")
        if not isinstance(prompts, dict):
            raise ValueError(f"prompts={prompts!r:.200}: must be a dict of key to [mean, variance].")
        for key, values in prompts.items():
            if not (isinstance(key, str) and are_amounts(values) and len(values) == 2):
                raise ValueError(f"prompts[{key!r}]={values!r}: must be text: [mean, variance], both finite and >= 0.")
        self._prompts = {key: (float(mean), float(variance)) for key, (mean, variance) in prompts.items()}
        self._dataset = None

    def _of_dataset(self) -> tuple[float, float]:
        if self._dataset is None:
            latest_moments = list(islice(reversed(self._prompts.values()), self.recent))
            num_latest = max(len(latest_moments), 1)
            means, stds = (mean for mean, _ in latest_moments), (math.sqrt(variance) for _, variance in latest_moments)
            self._dataset = (math.fsum(means) / num_latest, math.fsum(stds) / num_latest)
        return self._dataset


def _encode(content: object) -> bytes:
    """Kind, size and body of content, the bodies of containers made of their parts: unequal for unequal content."""
    if isinstance(content, np.number | np.bool_):
        content = content.item()
    if isinstance(content, np.ndarray) and (content.ndim < 2 or content.dtype.kind not in "biuf"):
        content = content.tolist()
    if content is None or isinstance(content, bool | int | float):
        kind_letter, body_bytes = b"n", json.dumps(content).encode()
    elif isinstance(content, str):
        kind_letter, body_bytes = b"s", content.encode("utf-8", "surrogatepass")
    elif isinstance(content, bytes | bytearray | memoryview):
        kind_letter, body_bytes = b"b", bytes(content)
    elif isinstance(content, list | tuple):
        kind_letter, body_bytes = b"l", b"".join(map(_encode, content))
    elif isinstance(content, Mapping):
        encoded_pairs = sorted((_encode(key), _encode(value)) for key, value in content.items())
        kind_letter, body_bytes = b"m", b"".join(key + value for key, value in encoded_pairs)
    elif isinstance(content, np.ndarray):
        kind_letter, body_bytes = b"a", _encode((content.dtype.str, content.shape)) + content.tobytes()
    elif callable(getattr(content, "tobytes", None)) and not isinstance(content, type | np.generic):
        form = [value for name in ("mode", "size") if isinstance(value := getattr(content, name, None), str | tuple)]
        kind_letter, body_bytes = b"o", _encode(form) + bytes(content.tobytes())
    else:
        raise TypeError(f"content of type {type(content).__module__}.{type(content).__qualname__} has no stable form.")
    if len(body_bytes) > LARGE:
        kind_letter, body_bytes = kind_letter.upper(), hashlib.sha256(body_bytes).digest()
    return b"%b%d:%b" % (kind_letter, len(body_bytes), body_bytes)


def are_amounts(values: object) -> bool:
    """Whether `values`, read from JSON, is a list of finite numbers that are not negative."""
    return isinstance(values, list) and all(type(x) in (int, float) and 0 <= x <= sys.float_info.max for x in values)


def _completed_moments(observed: NDArray[np.float64], bounds: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard deviation of observed lengths and censored ones; `bounds` has at least one, all positive."""
    longest = float(max(observed.max(initial=0.0), bounds.max()))
    length_shares = (observed / longest).tolist()
    root_tails = [(float(np.cbrt(bound / longest)), count) for bound, count in sorted(Counter(bounds.tolist()).items())]
    location, spread = _fit([length_share ** (1 / 3) for length_share in length_shares], root_tails)
    moments = [(length_share, 0.0, 1) for length_share in length_shares]  # (mean, variance, how many)
    root_limit = MAX_STRETCH ** (1 / 3)
    far_powers, far = _tail_powers(root_limit, location, spread)
    for root, count in root_tails:
        powers, beyond = _tail_powers(root, location, spread)
        first, second = (powers[n] - math.exp(far - beyond) * (far_powers[n] - root_limit**n) for n in (3, 6))
        moments.append((first, max(second - first * first, 0.0), count))
    total = len(observed) + len(bounds)
    mean = math.fsum(count * first for first, _, count in moments) / total
    variance = math.fsum(count * ((first - mean) ** 2 + var) for first, var, count in moments) / total
    return longest * mean, longest * math.sqrt(variance)


def _fit(observed: list[float], tails: list[tuple[float, int]]) -> tuple[float, float]:
    """Location and spread of a normal: the most likely given values, (lower bound, how many) pairs and the prior.

    In a = 1 / spread and b = location / spread the penalised log-likelihood is strictly concave (Olsen, 1978), with a
    maximum at a > 0 even where nothing was observed: Newton's method with step halving finds it from anywhere.
    """
    count = len(observed)
    center = math.fsum(observed) / max(count, 1)
    squares = math.fsum((value - center) ** 2 for value in observed)

    def objective(a: float, b: float) -> float:
        if a <= 0:
            return -math.inf
        value = (count + 1) * math.log(a)
        value -= (a * a * squares + count * (a * center - b) ** 2 + (PRIOR_SPREAD * b) ** 2) / 2
        return value + sum(many * _tail(a * bound - b)[0] for bound, many in tails)

    start = (count * center + sum(many * bound for bound, many in tails)) / (count + sum(many for _, many in tails))
    a, b = 1 / (PRIOR_SPREAD * start), 1 / PRIOR_SPREAD
    value = objective(a, b)
    for _ in range(100):  # few are needed; the limit is for rounding that outlasts the tolerance
        off = count * (a * center - b)
        slope_a, slope_b = (count + 1) / a - a * squares - center * off, off - PRIOR_SPREAD**2 * b
        curve_aa = (count + 1) / (a * a) + squares + count * center * center
        curve_ab, curve_bb = -count * center, count + PRIOR_SPREAD**2
        for bound, many in tails:
            _, hazard, hazard_slope = _tail(a * bound - b)
            slope_a, slope_b = slope_a - many * hazard * bound, slope_b + many * hazard
            curve_aa += many * hazard_slope * bound * bound
            curve_ab, curve_bb = curve_ab - many * hazard_slope * bound, curve_bb + many * hazard_slope
        determinant = curve_aa * curve_bb - curve_ab * curve_ab
        step_a = (curve_bb * slope_a - curve_ab * slope_b) / determinant
        step_b = (curve_aa * slope_b - curve_ab * slope_a) / determinant
        newton_gain = slope_a * step_a + slope_b * step_b
        step_size = 1.0
        while (new_value := objective(a + step_size * step_a, b + step_size * step_b)) < value and step_size > 1e-9:
            step_size /= 2
        if new_value >= value:
            a, b, value = a + step_size * step_a, b + step_size * step_b, new_value
        if new_value < value or newton_gain < 1e-12:
            break
    return b / a, 1 / a


def _tail_powers(bound: float, location: float, spread: float) -> tuple[list[float], float]:
    """The tail of a normal beyond `bound`: expected powers 0 to 6, log of its probability. No term is negative."""
    log_probability, hazard, _ = _tail((bound - location) / spread)
    powers = [1.0, location + spread * hazard]
    for n in range(2, 7):
        powers.append(location * powers[-1] + (n - 1) * spread**2 * powers[-2] + spread * hazard * bound ** (n - 1))
    return powers, log_probability


def _tail(bound: float) -> tuple[float, float, float]:
    """The tail of a standard normal beyond `bound`: log of its probability, hazard, and derivative of the hazard."""
    if bound < FAR_TAIL:
        probability = 0.5 * math.erfc(bound / math.sqrt(2))
        hazard = math.exp(-0.5 * bound * bound - LOG_SQRT_TAU) / probability
        return math.log(probability), hazard, hazard * (hazard - bound)
    excess = (1 - 2 / bound**2 + 10 / bound**4) / bound
    hazard = bound + excess
    return -0.5 * bound * bound - LOG_SQRT_TAU - math.log(hazard), hazard, hazard * excess


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
        return float(np.clip(np.sqrt(self._means[0] / self._means[1]), 1 / MAX_CORRECTION, MAX_CORRECTION))

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
            num_ended = max(round(len(lengths) * num_keep / most), 2)
            if num_ended < len(lengths):
                end = np.partition(lengths, num_ended - 1)[num_ended - 1]
                pairs.append((lengths.var(), censored_std(np.minimum(lengths, end), lengths > end) ** 2))
        if pairs:
            new_means = np.mean(pairs, axis=0)
            old_means = new_means if self._means is None else np.array(self._means)
            true_variance, estimated_variance = (old_means + CORRECTION_WEIGHT * (new_means - old_means)).tolist()
            self._means = true_variance, estimated_variance

    def state_dict(self) -> list[float] | None:
        """For JSON."""
        return None if self._means is None else list(self._means)

    def load_state_dict(self, state: Any) -> None:
        """Goes on where `state_dict` was called; a `ValueError` where `state` is something else."""
        if state is not None and not (are_amounts(state) and len(state) == 2):
            raise ValueError(f"correction={state!r:.80}: must be null or two finite numbers that are not negative.")
        self._means = None if state is None else (float(state[0]), float(state[1]))
