"""How long the responses to each prompt were: moving statistics that survive aborts (paper, "adaptive redundancy").

Contract: pure Python and NumPy. `prompt_key` names a prompt, `censored_moments` reads one observation of it, and one
`LengthHistory`, owned by the trainer, remembers. The paper says "moving standard deviation"; all else here is ours.

1. An observation is that of all launched candidates. The kept ones alone are biased low, which would feed back into
   smaller budgets.
2. An aborted or truncated candidate is right-censored: its true length is at least the length that it had. One that was
   aborted before its first token (length 0) says nothing and is left out.
3. Observed lengths enter as they are; of a censored one only the unseen part is estimated (`darts.censoring`). So an
   observation without censored lengths has exactly the plain moments (`numpy.std`, no degree of freedom taken off).
4. Estimates are finite, not negative, and scale with the lengths.
5. `StopCorrection` learns how far a `LengthModel` is off for groups that were stopped, from groups that were not, by
   how deep they were stopped: no workload obeys a model. Groups that ran to their end show the truth: censored at some
   depth, their estimate can be compared with it. It learns from groups that no rule ends: of others those are full
   that happen to be short.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.censoring import LengthModel

MAX_STRETCH = (
    4.0  # no mean of one group alone is more than this many times its longest length, no std than half as many
)
STATE_VERSION = 1
LARGE = 4096  # bytes of a part of a prompt that count by their hash: images are not copied from level to level
DEPTHS = (0.25, 0.4, 0.55, 0.7, 0.85)  # shares of a group's candidates that had ended when it was stopped
CORRECTION_MEMORY = 0.9  # weight of all earlier rollouts against a new one, in what stops hide
CORRECTED_GROUPS = 48  # at most so many groups of a rollout are stopped once more, at each depth
EQUAL_GROUPS = 20  # so many groups that the model estimates rightly are always among them: few are off by chance
MAX_CORRECTION = 4.0  # factors lie in [1 / this, this]


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

    Nothing but this group is known here: its shape is any that a workload may have, as far as its lengths allow. A
    `LengthModel` that saw other groups knows more. No mean is more than `MAX_STRETCH` times the longest length: where
    most are censored, one such prompt would outweigh all others.

    Args:
        lengths: generated tokens of all launched candidates, shape [num_candidates].
        censored: which of them were aborted or truncated, shape [num_candidates].

    Returns:
        Mean and standard deviation in tokens: at most 4 and 2 times the longest length, 0.0 where nothing is known.

    Raises:
        ValueError: lengths that are negative or not finite, or flags of another shape.
    """
    means, stds = LengthModel().moments([(lengths, censored)])
    longest = max(np.asarray(lengths).tolist(), default=0.0)
    return min(float(means[0]), MAX_STRETCH * longest), min(float(stds[0]), MAX_STRETCH / 2 * longest)


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

    def update(
        self,
        key: str,
        lengths: Sequence[float],
        censored: Sequence[bool],
        moments: tuple[float, float] | None = None,
    ) -> float:
        """Takes one observation of a prompt, returns its standard deviation.

        One without a single token changes nothing.

        Args:
            key: name of the prompt.
            lengths: as in `censored_moments`.
            censored: as in `censored_moments`.
            moments: mean and std, of one who knows more of them than `censored_moments`.

        Raises:
            ValueError: a key that is not text, moments that are negative or not finite, or as `censored_moments`.
        """
        if not isinstance(key, str):
            raise ValueError(f"key={key!r}: must be text, from prompt_key().")
        mean, std = censored_moments(lengths, censored) if moments is None else moments
        if not (0 <= mean < math.inf and 0 <= std < math.inf):
            raise ValueError(f"moments={moments}: must be finite and not negative.")
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


class StopCorrection:
    """Factors by which means and stds of stopped groups are corrected, by how deep they were stopped.

    That of means is the ratio of two moving sums, truth over estimate; that of stds its root for variances, because
    these are what a history averages: in the mean the corrected ones are those of full groups.

    Example:
        >>> correction = StopCorrection()
        >>> correction.factors([0.5, 1.0])
        (array([1., 1.]), array([1., 1.]))
    """

    def __init__(self) -> None:
        # By depth: number of groups; sums of true and estimated means, of true and estimated variances.
        self._sums = np.zeros((len(DEPTHS), 5))

    def factors(self, depths: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Truth over estimate of means and stds; 1.0 before anything was learnt, and where nothing was stopped.

        Args:
            depths: shares of the groups' candidates that had ended, shape [num_groups].
        """
        counts, true_means, means, true_variances, variances = self._sums.T
        factors = []
        for truth, estimate, power in ((true_means, means, 1.0), (true_variances, variances, 0.5)):
            equal = EQUAL_GROUPS * estimate / np.maximum(counts, 1e-9)
            ratios = np.divide(truth + equal, estimate + equal, out=np.ones(len(DEPTHS)), where=estimate > 0)
            ratios = np.clip(ratios**power, 1 / MAX_CORRECTION, MAX_CORRECTION)
            factors.append(np.interp(depths, [*DEPTHS, 1.0], [*ratios, 1.0]))
        return factors[0], factors[1]

    def learn(self, groups: Sequence[NDArray[np.int64]], model: LengthModel) -> None:
        """Takes the groups of a rollout that ran to their end, and stops them where others are stopped.

        Args:
            groups: lengths of all candidates of each group.
            model: estimates what they would have become.
        """
        large_groups = [lengths for lengths in groups if len(lengths) > 2]
        if not large_groups:
            return
        chosen = np.linspace(0, len(large_groups) - 1, min(len(large_groups), CORRECTED_GROUPS)).round().astype(int)
        stopped_groups, truths = [], []
        for depth in DEPTHS:
            for lengths in (large_groups[index] for index in chosen):
                num_ended = min(max(round(len(lengths) * depth), 2), len(lengths) - 1)
                end = np.partition(lengths, num_ended - 1)[num_ended - 1]
                stopped_groups.append((np.minimum(lengths, end), lengths > end))
                truths.append((lengths.mean(), lengths.var()))
        (true_means, true_variances), (means, stds) = np.transpose(truths), model.moments(stopped_groups)
        columns = [np.ones(len(means)), true_means, means, true_variances, stds**2]
        new_sums = np.transpose(columns).reshape(len(DEPTHS), len(chosen), -1).sum(axis=1)
        self._sums = CORRECTION_MEMORY * self._sums + new_sums

    def state_dict(self) -> list[list[float]]:
        """For JSON."""
        return self._sums.tolist()

    def load_state_dict(self, state: Any) -> None:
        """Goes on where `state_dict` was called; a `ValueError` where `state` is something else."""
        num_rows, num_columns = self._sums.shape
        is_table = isinstance(state, list) and len(state) == num_rows
        if not is_table or not all(are_amounts(row) and len(row) == num_columns for row in state):
            shape = f"{num_rows} lists of {num_columns}"
            raise ValueError(f"correction={state!r:.80}: must be {shape} finite numbers that are not negative.")
        self._sums = np.array(state, dtype=np.float64)
