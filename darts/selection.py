"""Which candidates of a prompt are trained on (paper, section "distribution-aware trajectory sampling").

Contract: response lengths in, indices out. Pure Python; no randomness, so equal input gives equal output.

1. The kept are the K = `num_keep - num_long` shortest and the `num_long` longest of the valid candidates.
2. Truncated candidates (they filled the response budget without ending) are not valid. Only where fewer than
   `num_keep` valid ones exist do they fill the group, lowest candidate index first (our choice).
3. Length decides, never the order of arrival: the two agree only if all candidates start together and run at one speed.
"""

import math
from collections.abc import Sequence


def select(
    lengths: Sequence[float], num_keep: int, num_long: int, truncated: Sequence[bool] | None = None
) -> list[int]:
    """Indices of the kept candidates, ordered by length, ties by index.

    Args:
        lengths: tokens that the model generated for each candidate, end token included.
        num_keep: M, candidates to keep.
        num_long: L, how many of them are the longest; 0 keeps the M shortest.
        truncated: which candidates filled the response budget without ending; None means none did.

    Raises:
        ValueError: fewer candidates than `num_keep`, `num_long` outside [0, num_keep), a negative or non-finite
            length, or `truncated` of another length than `lengths`.

    Example:
        >>> select([30, 10, 50, 20, 40], num_keep=3, num_long=1)
        [1, 3, 2]
    """
    check_counts(num_keep, num_long)
    if len(lengths) < num_keep:
        raise ValueError(f"{len(lengths)} candidates, num_keep={num_keep}: a group needs at least num_keep candidates.")
    if truncated is not None and len(truncated) != len(lengths):
        raise ValueError(f"{len(truncated)} truncation flags for {len(lengths)} lengths: one per candidate is needed.")
    for index, length in enumerate(lengths):
        if not math.isfinite(length) or length < 0:
            raise ValueError(f"lengths[{index}]={length}: a length must be finite and not negative.")
    is_cut = [False] * len(lengths) if truncated is None else [bool(flag) for flag in truncated]

    def by_length(index: int) -> tuple[float, int]:
        return lengths[index], index

    valid_indices = sorted((index for index in range(len(lengths)) if not is_cut[index]), key=by_length)
    if len(valid_indices) < num_keep:
        truncated_indices = [index for index in range(len(lengths)) if is_cut[index]]
        return sorted(valid_indices + truncated_indices[: num_keep - len(valid_indices)], key=by_length)
    num_short = num_keep - num_long
    return valid_indices[:num_short] + valid_indices[len(valid_indices) - num_long :]


def check_counts(num_keep: int, num_long: int) -> None:
    """Raises a `ValueError` where no group can keep so many, and so many of them as the longest."""
    if num_keep < 1:
        raise ValueError(f"num_keep={num_keep}: must be at least 1.")
    if not 0 <= num_long < num_keep:
        raise ValueError(f"num_long={num_long}: must lie in [0, num_keep={num_keep}).")
