"""The candidates of one prompt as a state machine: finishes in, the decision out.

Contract: pure, no clock and no I/O. The agent-loop worker that runs the candidates owns one `CandidateGroup` per prompt
and feeds it one event per candidate.

1. Each candidate finishes exactly once.
2. The group is complete when the last candidate has finished; then, and only then, `kept` is defined.
3. `kept` holds exactly `num_keep` candidates: what `darts.selection.select` gives for the recorded lengths.
"""

from darts.selection import select


class CandidateGroup:
    """Records the candidates of one prompt and decides which are kept.

    Args:
        num_candidates: M'_i, candidates that were launched.
        num_keep: M, candidates that are trained on.
        num_long: L, how many of the kept are the longest; 0 is shortest-only.

    Raises:
        ValueError: fewer candidates than `num_keep`, or `num_long` outside [0, num_keep).
    """

    def __init__(self, num_candidates: int, num_keep: int, num_long: int) -> None:
        if num_candidates < num_keep:
            raise ValueError(f"num_candidates={num_candidates}: must be at least num_keep={num_keep}.")
        if not 0 <= num_long < num_keep:
            raise ValueError(f"num_long={num_long}: must lie in [0, num_keep={num_keep}).")
        self.num_keep = num_keep
        self.num_long = num_long
        self._lengths: list[int | None] = [None] * num_candidates
        self._truncated = [False] * num_candidates
        self._arrival: list[int] = []
        self._kept: list[int] | None = None

    def finish(self, index: int, length: int, truncated: bool) -> None:
        """Candidate `index` ended after `length` generated tokens (end token included).

        Raises:
            ValueError: an unknown candidate, one that has finished already, or a length below 1.
        """
        if not 0 <= index < len(self._lengths):
            raise ValueError(f"candidate {index}: this group has candidates 0 to {len(self._lengths) - 1}.")
        if self._lengths[index] is not None:
            raise ValueError(f"candidate {index}: finished twice; each candidate finishes once.")
        if length < 1:
            raise ValueError(f"candidate {index}: length={length}; a finished candidate has at least one token.")
        self._lengths[index] = length
        self._truncated[index] = bool(truncated)
        self._arrival.append(index)
        if self.complete:
            self._kept = select(self.lengths, self.num_keep, self.num_long, self._truncated)

    @property
    def complete(self) -> bool:
        """Whether every launched candidate has finished."""
        return len(self._arrival) == len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Generated tokens by candidate; 0 for one that still runs."""
        return [length or 0 for length in self._lengths]

    @property
    def truncated(self) -> list[bool]:
        """Which candidates filled the response budget without ending."""
        return list(self._truncated)

    @property
    def arrival(self) -> list[int]:
        """Candidates in the order in which they finished."""
        return list(self._arrival)

    @property
    def kept(self) -> list[int]:
        """The kept candidates, ordered by length.

        Raises:
            RuntimeError: the group is not complete.
        """
        if self._kept is None:
            raise RuntimeError(
                f"{len(self._arrival)} of {len(self._lengths)} candidates have finished; not decided yet."
            )
        return list(self._kept)

    def keeps(self, index: int) -> bool:
        """Whether candidate `index` is kept.

        Raises:
            RuntimeError: the group is not complete.
        """
        return index in self.kept

    @property
    def num_valid(self) -> int:
        """Finished candidates that ended by themselves."""
        return sum(not self._truncated[index] for index in self._arrival)
