"""How many candidates each prompt gets, and which worker runs them.

Contract: pure NumPy. Budgets lie within [low, high] and sum to the total they were asked for.
"""

import numpy as np
from numpy.typing import NDArray


def uniform_budgets(num_prompts: int, mean: float, low: int, high: int) -> NDArray[np.int64]:
    """The same number of candidates for every prompt, up to rounding.

    The total is round(mean x prompts), half up; where it does not divide, the first prompts of the batch get one
    candidate more (the order of a batch is the sampler's, so this favours nobody).

    Args:
        num_prompts: prompts in the batch.
        mean: mean number of candidates per prompt; 10.5 gives half of the prompts 10 and half 11.
        low: M_low, fewest candidates of a prompt.
        high: M_up, most candidates of a prompt.

    Returns:
        Budgets, shape [num_prompts].

    Raises:
        ValueError: a negative number of prompts, bounds out of order, or a mean outside of them.
    """
    if num_prompts < 0:
        raise ValueError(f"num_prompts={num_prompts}: must not be negative.")
    if not 1 <= low <= high:
        raise ValueError(f"low={low}, high={high}: must satisfy 1 <= low <= high.")
    if not low <= mean <= high:
        raise ValueError(f"mean={mean}: must lie in [low={low}, high={high}].")
    if num_prompts == 0:
        return np.zeros(0, dtype=np.int64)
    total = int(np.floor(mean * num_prompts + 0.5))
    share, remainder = divmod(total, num_prompts)
    budgets = np.full(num_prompts, share, dtype=np.int64)
    budgets[:remainder] += 1
    return budgets


def contiguous_parts(budgets: NDArray[np.int64], num_parts: int) -> list[slice]:
    """Splits the prompts, in their order, into parts of about equally many candidates.

    A group is never split. Parts without a prompt are left out, so there may be fewer than `num_parts`.

    Args:
        budgets: candidates per prompt, shape [num_prompts].
        num_parts: most parts to make (agent-loop workers).

    Raises:
        ValueError: fewer than one part.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts}: must be at least 1.")
    if len(budgets) == 0:
        return []
    middles = np.cumsum(budgets) - budgets / 2
    part_of_prompt = np.minimum((middles * num_parts / budgets.sum()).astype(np.int64), num_parts - 1)
    starts = np.flatnonzero(np.diff(part_of_prompt, prepend=-1))
    return [slice(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(budgets)], strict=True)]
