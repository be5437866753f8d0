"""Advantages of groups in which losers are kept by chance: the kept teach what all candidates would have taught.

Contract: pure NumPy; verl's advantages of the kept rows in, those to train on out (our choice, beyond the paper). The
weights w are those of `darts.group`, rule 6. Of a group's M rows, which stand for N candidates (`population`), one, the
last, may be another with another draw, and has a weight that is not 1; the others are kept whatever is drawn.

1. With rewards r, and b the mean reward of those that are kept whatever is drawn:

       a'_i = M / N x w_i x (r_i - b) [/ (s + eps)],      verl's being (r_i - mean) [/ (std + eps)]

2. Unbiased: without the std, the expectation of sum(a' f) over the rows, as the draw varies, is exactly

       M / N x sum over all N candidates of (r_i - b) f_i

   for any f, such as the gradients g of the candidates' log-probs, because b does not depend on the draw: as if all had
   been kept, with the baseline b. Over responses too, sum (r_i - b) g_i expects N grad E[r] - grad E[b]; with
   the mean of all as the baseline, as in GRPO, (N - 1) grad E[r]. No draw shows that mean, and the weighted one,
   sum(w r) / sum(w), would do harm: it depends on the draw, is drawn to a spared row, which has most of the weight, and
   takes most of its advantage away. What PPO clips is no longer linear in a', and outside of this.
3. With the std: s is that of the N rewards if those that are not kept are as the last row is (which stands for
   N - M + 1, the others for themselves). As it depends on the draw, nothing is exactly unbiased any more, nor does that
   vanish with many groups. It decides how much a group counts, not which way its advantages point.
4. Scale: w has the mean N / M in expectation, so with M / N a group counts as M rows whatever its budget, like one
   without weights. verl's means over rows (`seq-mean-*`) then estimate those over all candidates. `token-mean` divides
   by the number of the kept rows' tokens, fewer than M times the mean length of all candidates: a factor that the whole
   mini-batch shares; it makes the step longer, and does not turn it. It stays, for groups without weights have it too.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-6
"""What a std is increased by at least, in units of standardised advantages, before it divides (as in verl)."""


def reweighted_advantages(
    advantages: ArrayLike, weights: ArrayLike, groups: ArrayLike, population: ArrayLike, normalize: bool
) -> NDArray[np.floating]:
    """Advantages of the rows with which the kept stand for all candidates of their group; see the module's contract.

    Args:
        advantages: of each row, as verl's outcome estimators give them: within a group increasing and affine in the
            reward (GRPO, with and without its std; RLOO). Shape [rows].
        weights: `CandidateGroup.weights` of the rows.
        groups: which rows belong together, e.g. their uids; all rows of a group are there.
        population: `CandidateGroup.population` of the row's group.
        normalize: whether the advantages were divided by std + eps of the group's rewards (`norm_adv_by_std_in_grpo`);
            the new ones are divided by s + eps in its place.

    Returns:
        Shape and type of `advantages`. Groups whose weights are all 1 come back as they were, bit by bit. Where all
        rewards are equal they are 0 up to rounding; nothing is divided by 0.

    Raises:
        ValueError: unequal lengths, what is not finite, negative weights, or a population that is not the same for the
            rows of a group, or smaller than their number.

    Example: four candidates, of which 0 is kept and 3 was spared with p = 0.25; their rewards are 0 and 1.
        >>> reweighted_advantages([-0.5, 0.5], [1.0, 4.0], ["a", "a"], [4, 4], normalize=False).tolist()
        [0.0, 2.0]
    """
    given = np.asarray(advantages)
    a, w = _numbers("advantages", given, given.shape), _numbers("weights", weights, given.shape)
    n = _numbers("population", population, given.shape)
    if (w < 0).any():
        raise ValueError(f"weights={w.min()}: must not be negative.")
    if np.shape(groups) != a.shape:
        raise ValueError(f"groups: shape {np.shape(groups)}, must be {a.shape} as the advantages'.")
    if len(a) == 0:
        return given.copy()
    _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each row's group, shape [rows]."""
        return np.bincount(group, values)[group]

    rows = total(np.ones(len(a)))
    wrong = (n != n[first][group]) | (n < rows)
    if wrong.any():
        raise ValueError(
            f"population={n[wrong][0]:g}: must be the same for the {rows[wrong][0]:g} rows of a group, and not smaller."
        )
    sure = (w == 1).astype(np.float64)
    num_sure = total(sure)
    baseline = np.where(num_sure > 0, total(sure * a) / np.maximum(num_sure, 1), total(a) / rows)
    new = rows / n * w * (a - baseline)
    if normalize:
        stands_for = np.where(sure, 1.0, (n - num_sure) / np.maximum(rows - num_sure, 1))
        mean = total(stands_for * a) / n
        spread = np.sqrt(total(stands_for * (a - mean) ** 2) / np.maximum(n - 1, 1))
        # Rewards with the std s have advantages with the std s / (s + eps): what is missing to 1 is eps in their unit.
        std = np.sqrt(total((a - total(a) / rows) ** 2) / np.maximum(rows - 1, 1))
        new /= spread + np.maximum(1 - std, EPSILON)
    return np.where(num_sure == rows, given, new.astype(given.dtype))


def _numbers(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A list of finite numbers as an array."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.shape != shape:
        raise ValueError(f"{name}: shape {numbers.shape}, must be one number for each row, as the advantages.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}={numbers[~np.isfinite(numbers)][0]}: must be finite.")
    return numbers
