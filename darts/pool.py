"""The candidates of a rollout: what becomes of one (`State`), and all of them as columns (`CandidatePool`)."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class State(Enum):
    """What a candidate does, or how it ended; the letter is a trace's for one that was not kept.

    RUNNING -> FINISHED | TRUNCATED | LOST, or RUNNING -> ABORTING -> STOPPED | FINISHED | TRUNCATED | LOST; where the
    long end may be cut, STOPPED -> CUT once the group has decided.
    """

    RUNNING = "r"
    ABORTING = "s"  # was asked to stop, and still runs
    FINISHED = "d"  # ended by itself
    TRUNCATED = "t"  # ended at the length limit
    STOPPED = "a"  # ended by the abort: its length is that of a part
    CUT = "c"  # the same, and kept with what it has
    LOST = "x"  # was ended by a server unasked, or has no usable response

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self is not State.RUNNING and self is not State.ABORTING


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """All candidates that one rollout launched, one entry each; shape [num_candidates] throughout.

    One value stands for the same of all candidates. What is not given is not known, and has the default. Columns are
    read-only.

    Example: prompt=[0, 0, 1, 1], candidate=[0, 1, 0, 1], length=[12, 80, 40, 33], arrival=[0, -1, 1, 0], ...
    """

    prompt: NDArray[np.int64]  # position of the prompt in the batch
    candidate: NDArray[np.int64]  # number of the candidate within its prompt
    length: NDArray[np.int64]  # generated tokens, end token included
    state: NDArray[np.str_] = State.FINISHED.value  # letter of its `State`
    kept: NDArray[np.bool_] = False
    arrival: NDArray[np.int64] = 0  # 0 for the first to finish within its prompt, -1 where it did not finish
    num_long: NDArray[np.int64] = 0  # L of the candidate's prompt; 0 where it is shortest-only
    saturated: NDArray[np.bool_] = False  # whether the prompt's budget is M_up
    reward: NDArray[np.float64] = np.nan  # NaN where the candidate was not scored
    weights_min: NDArray[np.int64] = -1  # oldest and newest version of the weights that generated it, -1 where unknown
    weights_max: NDArray[np.int64] = -1
    prompt_tokens: NDArray[np.int64] = 0  # over all turns
    cached_tokens: NDArray[np.int64] = 0  # of them, found in the server's prefix cache
    chunks: NDArray[np.int64] = 0
    chunk_seconds: NDArray[np.float64] = 0.0  # latency, sum over its chunks
    ended_at: NDArray[np.float64] = np.nan  # seconds since the epoch, end of its last request
    stop_seconds: NDArray[np.float64] = np.nan  # from the decision to abort to the server's answer; NaN: none was made
    tokens_after: NDArray[np.int64] = 0  # decoded after that decision, estimated

    def __post_init__(self) -> None:
        for column in fields(self):
            column_type = int if column.default is MISSING else type(column.default)
            values = np.asarray(getattr(self, column.name), dtype=column_type)
            object.__setattr__(self, column.name, np.broadcast_to(values, len(self.candidate)))

    @classmethod
    def of(cls, budgets: Sequence[int] | NDArray[np.int64], **columns: ArrayLike) -> "CandidatePool":
        """The candidates of prompts with such budgets, prompt after prompt.

        Args:
            budgets: candidates of each prompt.
            columns: `length`, and what else is known; by candidate, or one value for all.
        """
        prompt_positions = np.repeat(np.arange(len(budgets)), budgets)
        candidate_numbers = np.arange(len(prompt_positions)) - np.repeat(np.cumsum(budgets) - budgets, budgets)
        return cls(**{"prompt": prompt_positions, "candidate": candidate_numbers} | columns)

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """Which filled the response budget without ending."""
        return self.state == State.TRUNCATED.value

    @property
    def aborted(self) -> NDArray[np.bool_]:
        """Which were stopped and not kept: their length is that of a part."""
        return self.state == State.STOPPED.value

    @property
    def cut(self) -> NDArray[np.bool_]:
        """Which were stopped, and are kept with what they have."""
        return self.state == State.CUT.value

    @property
    def censored(self) -> NDArray[np.bool_]:
        """Which did not end by themselves: their own length would be larger."""
        return self.state != State.FINISHED.value

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Which have no usable response, though nobody stopped them."""
        return self.state == State.LOST.value

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, chosen: NDArray[np.int64] | slice) -> "CandidatePool":
        """Some of the candidates, or all in another order."""
        return CandidatePool(**{column.name: getattr(self, column.name)[chosen] for column in fields(self)})

    @staticmethod
    def concat(pools: list["CandidatePool"]) -> "CandidatePool":
        """Joins pools whose `prompt` already count over the whole batch."""
        names = [column.name for column in fields(CandidatePool)]
        return CandidatePool(**{name: np.concatenate([getattr(pool, name) for pool in pools]) for name in names})

    def sorted(self) -> "CandidatePool":
        """The same candidates by prompt, those of a prompt by their number."""
        return self.rows(np.lexsort((self.candidate, self.prompt)))
