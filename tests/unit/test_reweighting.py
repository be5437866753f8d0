"""Reweighted advantages: by all draws of real groups, and by simulation against the gradient of a policy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.group import CandidateGroup
from darts.reweighting import reweighted_advantages

M, N, P = 8, 16, 0.06


def grpo(rewards: np.ndarray, normalize: bool) -> np.ndarray:
    """verl's outcome advantages of groups, shape of `rewards` [..., rows]."""
    centred = rewards - rewards.mean(-1, keepdims=True)
    return centred / (rewards.std(-1, ddof=1, keepdims=True) + 1e-6) if normalize else centred


def reweighted(rewards: np.ndarray, weights: np.ndarray, population: int, normalize: bool) -> np.ndarray:
    """Of groups, shape [groups, rows]."""
    groups, rows = rewards.shape
    labels = np.repeat([f"uid {n}" for n in np.random.default_rng(1).permutation(groups)], rows)
    advantages = grpo(rewards, normalize).ravel()
    flat = reweighted_advantages(
        advantages, weights.ravel(), labels, np.full(groups * rows, population), normalize=normalize
    )
    return flat.reshape(rewards.shape)


def kept_with(lengths: np.ndarray, num_keep: int, p: float, draw: float) -> CandidateGroup:
    """A group that stops early; all its candidates start together."""
    group = CandidateGroup(len(lengths), num_keep, 0, "eager", keep_probability=p, draw=draw)
    aborted: set[int] = set()
    for index in np.argsort(lengths, kind="stable").tolist():
        if index not in aborted:
            aborted.update(group.finish(index, int(lengths[index]), truncated=False))
    return group


@pytest.mark.parametrize("seed", range(20))
def test_over_all_draws_the_kept_teach_what_all_candidates_teach(seed):
    """By brute force, for any values; and without the weights they do not."""
    rng = np.random.default_rng(seed)
    num_keep = int(rng.integers(2, 9))
    size = num_keep + int(rng.integers(1, 9))
    lengths, rewards, values = rng.integers(1, 50, size), rng.normal(size=size), rng.normal(size=size)
    p = float(rng.uniform(0.2, 0.95)) / (size - num_keep)
    chances = [p] * (size - num_keep) + [1 - p * (size - num_keep)]
    expected = without = 0.0
    for draw, chance in zip((np.cumsum(chances) - np.array(chances) / 2).tolist(), chances, strict=True):
        group = kept_with(lengths, num_keep, p, draw)
        rows = group.kept
        assert group.population == size
        advantages = reweighted(rewards[None, rows], np.array([group.weights]), size, normalize=False)[0]
        expected += chance * float(advantages @ values[rows])
        without += chance * float(grpo(rewards[rows], False) @ values[rows])
    sure = np.argsort(lengths, kind="stable")[: num_keep - 1]
    truth = num_keep / size * float((rewards - rewards[sure].mean()) @ values)
    assert expected == pytest.approx(truth, abs=1e-9)
    assert without != pytest.approx(truth, abs=0.01)


def noisy(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(x.shape) < 1 / (1 + np.exp(-x))) * 1.0


POLICIES = {
    "longer is better": lambda x, rng: x,
    "only long ones are right": lambda x, rng: (x > 0.5) * 1.0,
    "only short ones are right": lambda x, rng: (x < 0) * 1.0,
    "longer ones are right more often": noisy,
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_the_gradient_of_a_policy_is_that_of_all_candidates_and_without_weights_it_is_not(name, normalize):
    """log(length) is normal with mean theta, so d log-prob / d theta = x, the deviation from it. With the std nothing
    is exact; what is left of the bias is bounded here."""
    groups, rng = 60_000, np.random.default_rng(0)
    x = np.sort(rng.standard_normal((groups, N)), axis=1)
    rewards = POLICIES[name](x, rng)
    truth = M / N * (grpo(rewards, normalize) * x).sum(1)
    number = np.minimum((rng.random(groups) / P).astype(int), N - M)
    spared = number < N - M
    rows = np.tile(np.arange(M), (groups, 1))
    rows[spared, -1] = M + number[spared]
    weights = np.ones((groups, M))
    weights[:, -1] = np.where(spared, 1 / P, 1 / (1 - P * (N - M)))
    kept_rewards, kept_x = np.take_along_axis(rewards, rows, 1), np.take_along_axis(x, rows, 1)
    ours = (reweighted(kept_rewards, weights, N, normalize) * kept_x).sum(1)
    without = (grpo(kept_rewards, normalize) * kept_x).sum(1)
    shortest = (grpo(rewards[:, :M], normalize) * x[:, :M]).sum(1)
    noise = 4 * ours.std() / np.sqrt(groups)
    assert noise < 0.06 * abs(truth.mean())
    bias = abs(ours.mean() - truth.mean())
    assert bias < noise + 0.07 * abs(truth.mean())
    for biased in (without, shortest):
        assert abs(biased.mean() - truth.mean()) > 0.3 * abs(truth.mean())


@given(
    st.lists(st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.1, 1.0]), min_size=2, max_size=8), min_size=1, max_size=5),
    st.integers(0, 5),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.sampled_from([np.float32, np.float64]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200)
def test_groups_mixed_in_a_batch(rewards, extra, share, normalize, dtype, dice):
    """Those of weight 1 are untouched, equal rewards teach nothing, everything is finite; order does not matter."""
    rows = []
    for number, each in enumerate(rewards):
        last = dice.choice([1.0, 0.0, (extra + 1) / share, 1 / (1 - share)]) if extra else 1.0
        size = len(each) + (extra if last != 1 else 0)
        row = np.array(each, dtype=dtype)
        advantages = row - row.mean()
        if normalize:
            advantages = advantages / (row.std(ddof=1) + dtype(1e-6))
        place = dice.randrange(len(each))
        for i, advantage in enumerate(advantages):
            rows.append((advantage, last if i == place else 1.0, f"g{number}", size, len(set(each)) == 1, last == 1))
    dice.shuffle(rows)
    advantages, weights, groups, population, equal, plain = (np.array(column) for column in zip(*rows, strict=True))
    new = reweighted_advantages(advantages.astype(dtype), weights, groups, population, normalize)
    assert new.dtype == dtype
    assert np.isfinite(new).all()
    assert (new[plain] == advantages.astype(dtype)[plain]).all()
    assert (new[weights == 0] == 0).all()
    assert (np.abs(new[equal & ~plain]) <= 0.2 * weights[equal & ~plain]).all(), "what float32 leaves of a mean"


def test_the_std_and_epsilon_are_those_of_the_rewards():
    """From the rewards, where verl's advantages are all that is given."""
    rewards, weights = np.array([0.0, 1.0, 1.0, 3e-6]), np.array([1.0, 1.0, 1.0, 20.0])
    for scale in (1.0, 1e-5):
        r = rewards * scale
        stands_for = np.array([1, 1, 1, 7])
        mean = (stands_for * r).sum() / 10
        std = np.sqrt((stands_for * (r - mean) ** 2).sum() / 9)
        want = 4 / 10 * weights * (r - r[:3].mean()) / (std + 1e-6)
        assert reweighted(r[None], weights[None], 10, normalize=True)[0] == pytest.approx(want, rel=1e-5)


def test_one_row_and_no_rows():
    assert reweighted_advantages([], [], [], [], normalize=True).tolist() == []
    assert reweighted_advantages([0.7], [3.0], ["a"], [4], normalize=True).tolist() == [0.0]
    assert reweighted_advantages([0.7], [1.0], ["a"], [1], normalize=True).tolist() == [0.7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": [0.0, float("nan")]}, "advantages=nan: must be finite"),
        ({"weights": [1.0, float("inf")]}, "weights=inf"),
        ({"weights": [1.0, -1.0]}, "weights=-1.0: must not be negative"),
        ({"weights": [1.0]}, r"weights: shape \(1,\)"),
        ({"groups": ["a"]}, r"groups: shape \(1,\)"),
        ({"population": [4, 5]}, "population=5: must be the same for the 2 rows"),
        ({"population": [1, 1]}, "population=1: .* not smaller"),
    ],
)
def test_impossible_input_is_refused(changes, message):
    arguments = {"advantages": [0.5, -0.5], "weights": [1.0, 4.0], "groups": ["a", "a"], "population": [4, 4]}
    with pytest.raises(ValueError, match=message):
        reweighted_advantages(**arguments | changes, normalize=True)
