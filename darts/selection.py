"""Which candidates of a prompt are trained on (paper, section "distribution-aware trajectory sampling").

Contract: response lengths in, indices out. Pure Python; no randomness, so equal input gives equal output.

1. The kept are the K = `num_keep - num_long` shortest valid candidates and a long end of L = `num_long`. Truncated
   candidates (they filled the response budget without ending) and cut ones (they were stopped) are not valid.
2. `long_end` says what the long end may be (our choice, but for the first):
   - `finished` (the paper): the L longest valid ones;
   - `truncated`: truncated ones too, which count as longer than all that ended;
   - `cut`: cut ones too. One that has outgrown the K shortest counts as longer than all that ended by themselves, any
     other (it started late) is taken last: nothing says that it is long.
3. Only where too few valid ones exist do truncated and cut ones fill the group, lowest candidate index first (our
   choice). With `finished`, too few are less than `num_keep`, else less than K.
4. Length decides, never the order of arrival: the two agree only if all candidates start together and run at one speed.
"""

import math
from collections.abc import Sequence

LONG_END = ("finished", "truncated", "cut")


def select(
    lengths: Sequence[float],
    num_keep: int,
    num_long: int,
    truncated: Sequence[bool] | None = None,
    *,
    long_end: str = "finished",
    cut: Sequence[bool] | None = None,
) -> list[int]:
    """Indices of the kept candidates, ordered by length, ties by index.

    Args:
        lengths: tokens that the model generated for each candidate, end token included.
        num_keep: M, candidates to keep.
        num_long: L, how many of them are the longest; 0 keeps the M shortest.
        truncated: which candidates filled the response budget without ending; None means none did.
        long_end: what the longest may be; see the module's contract.
        cut: which candidates were stopped while they ran; None means none were.

    Raises:
        ValueError: fewer candidates than `num_keep`, `num_long` outside [0, num_keep), a negative or non-finite
            length, `truncated` or `cut` of another length than `lengths`, an unknown `long_end`, or a cut candidate
            where `long_end` does not allow it.

    Example:
        >>> select([30, 10, 50, 20, 40], num_keep=3, num_long=1)
        [1, 3, 2]
    """
    check_counts(num_keep, num_long)
    if len(lengths) < num_keep:
        raise ValueError(f"{len(lengths)} candidates, num_keep={num_keep}: a group needs at least num_keep candidates.")
    if long_end not in LONG_END:
        raise ValueError(f"long_end={long_end!r}: must be one of {', '.join(LONG_END)}.")
    is_truncated, is_cut = _flags("truncation", truncated, lengths), _flags("cut", cut, lengths)
    if any(is_cut) and long_end != "cut":
        first_cut = is_cut.index(True)
        raise ValueError(f"cut[{first_cut}]=True, long_end={long_end!r}: a cut candidate needs long_end='cut'.")
    for index, length in enumerate(lengths):
        if not math.isfinite(length) or length < 0:
            raise ValueError(f"lengths[{index}]={length}: a length must be finite and not negative.")

    def by_length(index: int) -> tuple[float, int]:
        return lengths[index], index

    # 1. The shortest valid ones.
    num_short = num_keep - num_long
    censored_indices = [index for index in range(len(lengths)) if is_truncated[index] or is_cut[index]]
    valid_indices = sorted(set(range(len(lengths))).difference(censored_indices), key=by_length)
    short_indices = valid_indices[:num_short]

    # 2. The long end: the best by rank, then by length.
    def rank(index: int) -> tuple[int, float, int]:
        if is_cut[index] and not is_truncated[index]:
            has_outgrown = not short_indices or by_length(index) > by_length(short_indices[-1])
            return (2 if has_outgrown else 0), *by_length(index)
        return (3 if is_truncated[index] else 1), *by_length(index)

    may_be_long = valid_indices[num_short:] + (censored_indices if long_end != "finished" else [])
    long_indices = sorted(may_be_long, key=rank)[max(len(may_be_long) - num_long, 0) :]

    # 3. What fills the group where too few are valid.
    kept_indices = short_indices + long_indices
    fill_indices = [index for index in censored_indices if index not in kept_indices]
    return sorted(kept_indices + fill_indices[: num_keep - len(kept_indices)], key=by_length)


def _flags(name: str, flags: Sequence[bool] | None, lengths: Sequence[float]) -> list[bool]:
    """Truth values, one for each length."""
    if flags is None:
        return [False] * len(lengths)
    if len(flags) != len(lengths):
        raise ValueError(f"{len(flags)} {name} flags for {len(lengths)} lengths: one per candidate is needed.")
    return [bool(flag) for flag in flags]


def check_counts(num_keep: int, num_long: int) -> None:
    """Raises a `ValueError` where no group can keep so many, and so many of them as the longest."""
    if num_keep < 1:
        raise ValueError(f"num_keep={num_keep}: must be at least 1.")
    if not 0 <= num_long < num_keep:
        raise ValueError(f"num_long={num_long}: must lie in [0, num_keep={num_keep}).")
