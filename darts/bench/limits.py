"""Limits on length that an arm has of its own: what one would try before a method that shapes lengths.

Contract: NumPy alone, and verl's names of the keys.

1. With `data.max_response_length` below the bench's, responses of the arm's training rollouts end there, by
   `max_tokens` of their requests, and are truncated, as in a run of plain verl with this key. The validation has the
   bench's limit in all arms, so that accuracies compare.
2. DAPO's overlong penalty is that of verl's `DAPORewardManager` (0.9.1): linear over the last `overlong_buffer_cfg.len`
   tokens before the limit, down to -`penalty_factor` at the limit. It is added where verl adds it, to the score at a
   response's last token. Accuracies, and the rewards of records and traces, are without it.
3. A number below 1 is a share: a limit of the bench's, a buffer of the arm's own limit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts.config import ConfigError

RESPONSE = "data.max_response_length"
BUFFER, FACTOR = (f"reward.reward_kwargs.overlong_buffer_cfg.{name}" for name in ("len", "penalty_factor"))
LIMIT_KEYS: Mapping[str, str] = {RESPONSE: "response", BUFFER: "buffer", FACTOR: "factor"}
"""verl's keys, and the names of `LengthLimits` for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """What an arm does about long responses, besides its strategy.

    Example: `LengthLimits(response=0.5, buffer=128)` in a bench with 1,024 tokens: at most 512, and a penalty from 384.
    """

    response: float | None = None  # `RESPONSE` of training rollouts, in tokens; None: the bench's
    buffer: float | None = None  # `BUFFER`, in tokens; None: no penalty
    factor: float = 1.0  # `FACTOR`

    def max_tokens(self, bench_length: int) -> int | None:
        """The longest response of a training rollout, in tokens; None: the bench's.

        Args:
            bench_length: `data.max_response_length` of the bench, in tokens.

        Raises:
            ConfigError: not from one token to the bench's limit.
        """
        return None if self.response is None else _tokens(RESPONSE, self.response, bench_length)

    def penalties(self, lengths: NDArray[np.int64], bench_length: int) -> NDArray[np.float64]:
        """What is added to the scores of responses.

        Args:
            lengths: of the responses in tokens, end-of-sequence tokens included, shape [num_rows].
            bench_length: as in `max_tokens`.

        Returns:
            Numbers from -`factor` to 0, shape [num_rows].

        Raises:
            ConfigError: as `check`.
        """
        self.check(bench_length)
        if self.buffer is None:
            return np.zeros(len(lengths))
        limit = self.max_tokens(bench_length) or bench_length
        buffer_tokens = _tokens(BUFFER, self.buffer, limit)
        excess = np.asarray(lengths, np.float64) - (limit - buffer_tokens)
        return np.minimum(-excess / buffer_tokens * self.factor, 0.0)

    def check(self, bench_length: int) -> None:
        """Checks the numbers for a bench of this limit.

        Raises:
            ConfigError: a limit or a buffer out of its range, or a factor that is not positive.
        """
        limit = self.max_tokens(bench_length) or bench_length
        if self.buffer is not None:
            _tokens(BUFFER, self.buffer, limit)
        if not 0 < self.factor < np.inf:
            raise ConfigError(FACTOR, self.factor, "must be a finite number above 0.", "set it to 1, or remove it.")


def _tokens(key: str, value: Any, most: int) -> int:
    """A share of `most` or a number of tokens, as tokens."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    tokens = round(value * most if value < 1 else value) if is_number and np.isfinite(value) else 0
    if not 1 <= tokens <= most:
        rule = f"must be from 1 to {most} tokens, or a share of them below 1."
        raise ConfigError(key, value, rule, f"set {key}=0.5 for half of them.")
    return tokens
