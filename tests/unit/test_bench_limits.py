"""An arm's own limits on length: tokens and shares, the overlong penalty, and what is refused."""

import json

import numpy as np
import pytest

from darts.bench.arms import parse_arm
from darts.bench.limits import BUFFER, FACTOR, RESPONSE, LengthLimits
from darts.bench.plan import BenchPlan
from darts.config import ConfigError


def test_a_limit_is_tokens_or_a_share_of_the_benchs():
    assert LengthLimits(response=0.5).max_tokens(256) == 128
    assert LengthLimits(response=200).max_tokens(256) == 200
    assert LengthLimits(response=256).max_tokens(256) == 256
    assert LengthLimits().max_tokens(256) is None


def test_the_penalty_begins_at_the_buffer_and_is_whole_at_the_limit():
    limits = LengthLimits(buffer=128, factor=2.0)
    lengths = np.array([1, 895, 896, 960, 1024])
    assert limits.penalties(lengths, 1024).tolist() == [0, 0, 0, -1, -2]


def test_the_buffer_is_one_of_the_arms_own_limit():
    limits = LengthLimits(response=0.5, buffer=0.5)
    assert limits.penalties(np.array([256, 384, 512]), 1024).tolist() == [0, -0.5, -1]


@pytest.mark.parametrize("seed", range(20))
def test_a_penalty_is_never_positive_falls_with_length_and_is_at_most_the_factor(seed):
    rng = np.random.default_rng(seed)
    limit, factor = int(rng.integers(2, 2000)), float(rng.uniform(0.1, 4))
    limits = LengthLimits(buffer=int(rng.integers(1, limit + 1)), factor=factor)
    penalties = limits.penalties(np.arange(1, limit + 1), limit)
    assert penalties.max() <= 0
    assert penalties.min() == pytest.approx(-factor)
    assert (np.diff(penalties) <= 0).all()


def test_without_a_buffer_nothing_is_taken():
    assert LengthLimits(response=0.5).penalties(np.array([10, 512]), 1024).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"response": 257}, RESPONSE),
        ({"response": 0}, RESPONSE),
        ({"response": -0.5}, RESPONSE),
        ({"response": float("nan")}, RESPONSE),
        ({"response": 0.001}, RESPONSE),
        ({"buffer": 257}, BUFFER),
        ({"response": 64, "buffer": 65}, BUFFER),
        ({"buffer": 64, "factor": 0}, FACTOR),
        ({"buffer": 64, "factor": float("inf")}, FACTOR),
    ],
)
def test_what_cannot_be_is_refused(limits, key):
    with pytest.raises(ConfigError, match="must be") as refusal:
        LengthLimits(**limits).check(256)
    assert refusal.value.key == key


def test_a_plan_keeps_the_limits_of_its_arms(tmp_path):
    arm = parse_arm(f"short=none,{RESPONSE}=0.5,{BUFFER}=16")
    plan = BenchPlan(arms=[arm], seeds=1, steps=1, validate_every=0, overrides=[])
    plan.save(tmp_path)
    assert BenchPlan.load(tmp_path) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["arms"][0]["limits"]["response"] == 0.5
