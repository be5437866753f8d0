"""All candidates of a rollout as columns."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """All candidates that one rollout launched, one entry each; shape [num_candidates] throughout.

    Example: prompt=[0, 0, 1, 1], candidate=[0, 1, 0, 1], length=[12, 80, 40, 33], arrival=[0, -1, 1, 0], ...
    """

    prompt: NDArray[np.int64]  # position of the prompt in the batch
    candidate: NDArray[np.int64]  # number of the candidate within its prompt
    length: NDArray[np.int64]  # generated tokens, end token included
    truncated: NDArray[np.bool_]
    aborted: NDArray[np.bool_]  # length is that of a part
    lost: NDArray[np.bool_]  # a server ended it unasked
    kept: NDArray[np.bool_]
    arrival: NDArray[np.int64]  # 0 for the first to finish within its prompt, -1 where it did not finish
    num_long: NDArray[np.int64]  # L of the candidate's prompt; 0 where it is shortest-only
    saturated: NDArray[np.bool_]  # whether the prompt's budget is M_up
    reward: NDArray[np.float64]  # NaN where the candidate was not scored
    weights_min: NDArray[np.int64]  # oldest and newest version of the weights that generated it, -1 where unknown
    weights_max: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]  # over all turns
    cached_tokens: NDArray[np.int64]  # of them, found in the server's prefix cache
    chunks: NDArray[np.int64]
    chunk_seconds: NDArray[np.float64]  # latency, sum over its chunks
    ended_at: NDArray[np.float64]  # seconds since the epoch, end of its last request
    stop_seconds: NDArray[np.float64]  # from the decision to abort to the server's answer; NaN where none was made
    tokens_after: NDArray[np.int64]  # decoded after that decision, estimated

    def __len__(self) -> int:
        return len(self.prompt)

    @staticmethod
    def concat(pools: list["CandidatePool"]) -> "CandidatePool":
        """Joins pools whose `prompt` already count over the whole batch."""
        return CandidatePool(
            **{
                name: np.concatenate([getattr(pool, name) for pool in pools])
                for name in CandidatePool.__dataclass_fields__
            }
        )

    def sorted(self) -> "CandidatePool":
        """The same candidates by prompt, those of a prompt by their number."""
        order = np.lexsort((self.candidate, self.prompt))
        return CandidatePool(**{name: getattr(self, name)[order] for name in CandidatePool.__dataclass_fields__})


def finished_pool(
    length: NDArray[np.int64],
    *,
    truncated: NDArray[np.bool_],
    reward: NDArray[np.float64],
    group_size: int,
    ended_at: float,
) -> CandidatePool:
    """The pool of a rollout without redundancy: all candidates have ended and are kept.

    Args:
        length: of each response, those of a prompt in a row, shape [num_prompts * group_size].
        truncated: the same.
        reward: the same; NaN where there is none.
        group_size: M.
        ended_at: of all, since nobody saw when each ended.
    """
    count = len(length)
    candidate = np.arange(count) % group_size
    none, unknown, no_time = np.zeros(count, dtype=np.int64), np.full(count, -1), np.full(count, np.nan)
    return CandidatePool(
        prompt=np.arange(count) // group_size,
        candidate=candidate,
        length=length.astype(np.int64),
        truncated=truncated,
        aborted=np.zeros(count, dtype=bool),
        lost=np.zeros(count, dtype=bool),
        kept=np.ones(count, dtype=bool),
        arrival=candidate,
        num_long=none,
        saturated=np.zeros(count, dtype=bool),
        reward=reward.astype(np.float64),
        weights_min=unknown,
        weights_max=unknown,
        prompt_tokens=none,
        cached_tokens=none,
        chunks=none,
        chunk_seconds=np.zeros(count),
        ended_at=np.full(count, ended_at),
        stop_seconds=no_time,
        tokens_after=none,
    )
