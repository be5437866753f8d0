"""Censored lengths against real and drawn ones whose truth is known; the history against a recount from scratch."""

import csv
import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts import history
from darts.censoring import LengthModel
from darts.history import LengthHistory, censored_moments, censored_std, prompt_key

ROOT = Path(__file__).resolve().parents[2]
REAL_LENGTHS = ROOT / "darts/simulation/data/rollout_lengths.csv.gz"
NUM_KEEP = 8
DRAWS = (9, pytest.param(10, marks=pytest.mark.slow), 12, pytest.param(14, marks=pytest.mark.slow), 16)


@st.composite
def observations(draw, flags=(False, True)):
    size = draw(st.integers(1, 16))
    lengths = draw(st.lists(st.integers(0, 8192) | st.sampled_from([0, 1, 300, 8192]), min_size=size, max_size=size))
    return lengths, draw(st.lists(st.sampled_from(flags), min_size=size, max_size=size))


@st.composite
def stopped_groups(draw):
    """Lengths of those that ended, and how many were stopped together, at a length that none of them exceeds."""
    ended = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=10))
    return ended, draw(st.integers(1, 10)), max(ended) * draw(st.floats(1, 4))


def eager_stop(group):
    """What is known of a group, sorted by length, when all but the shortest are stopped at the last of those."""
    return np.minimum(group, group[NUM_KEEP - 1]), np.arange(len(group)) >= NUM_KEEP


# --- moments of one observation --------------------------------------------------------------------------------------


@given(observations(flags=[False]))
def test_without_censored_lengths_the_moments_are_the_plain_ones(observation):
    lengths, censored = observation
    assert censored_moments(lengths, censored) == (np.mean(lengths), np.std(lengths))


@given(observations())
def test_moments_are_sensible_for_anything(observation):
    lengths, censored = observation
    mean, std = censored_moments(lengths, censored)
    known = [length for length, cut in zip(lengths, censored, strict=True) if length or not cut]
    assert np.mean(known or [0]) * (1 - 1e-9) <= mean <= 4 * max(lengths)
    assert 0 <= std <= 2 * max(lengths)
    assert std == censored_std(lengths, censored)
    assert (type(mean), type(std)) == (float, float)


@given(observations(), st.floats(1e-3, 1e3))
def test_moments_scale_with_the_lengths(observation, factor):
    lengths, censored = observation
    scaled = censored_moments([factor * length for length in lengths], censored)
    assert scaled == pytest.approx([factor * it for it in censored_moments(lengths, censored)], rel=1e-7, abs=1e-9)


@given(observations(), st.randoms())
def test_the_order_of_candidates_does_not_matter(observation, random):
    pairs = list(zip(*observation, strict=True))
    random.shuffle(pairs)
    assert censored_moments(*zip(*pairs, strict=True)) == pytest.approx(censored_moments(*observation), rel=1e-9)


@given(observations(), st.integers(1, 5))
def test_candidates_aborted_before_their_first_token_are_left_out(observation, num_aborted):
    lengths, censored = observation
    without = censored_moments(lengths, censored)
    assert censored_moments(lengths + [0] * num_aborted, censored + [True] * num_aborted) == without


@given(stopped_groups(), st.floats(1.01, 3))
def test_what_was_stopped_counts_as_longer_and_the_more_so_the_later_it_was(group, factor):
    ended, num_stopped, bound = group
    lengths, censored = ended + [bound] * num_stopped, [False] * len(ended) + [True] * num_stopped
    mean, std = censored_moments(lengths, censored)
    later_mean, later_std = censored_moments(ended + [bound * factor] * num_stopped, censored)
    assert np.mean(lengths) < mean < later_mean
    assert np.std(lengths) < std < later_std


@pytest.mark.parametrize(
    ("lengths", "censored"),
    [([500], [True]), ([8192] * 16, [True] * 16), ([500, 500], [False, True]), ([500] * 16, [False, True] * 8),
     ([0, 0, 700], [False, False, True]), ([1] * 5000 + [10**6], [False] * 5000 + [True]),
     ([10**6] + [1] * 5000, [False] + [True] * 5000), ([10**6] * 5000, [False] + [True] * 4999)],
)  # fmt: skip
def test_few_equal_or_only_censored_lengths_have_a_positive_and_bounded_spread(lengths, censored):
    mean, std = censored_moments(lengths, censored)
    assert np.mean(lengths) < mean < 4 * max(lengths)
    assert np.std(lengths) < std < 1.2 * max(lengths)


@pytest.mark.parametrize(("lengths", "censored"), [([], []), ([0, 0], [True, True]), ([0, 0], [False, True])])
def test_no_information_is_zero(lengths, censored):
    assert censored_moments(lengths, censored) == (0.0, 0.0)


@pytest.mark.parametrize("spread", [0.15, 0.3, 0.7])
@pytest.mark.parametrize("stop", ["together", "apart"])
def test_moments_of_drawn_lengths_are_near_those_of_the_full_draw(spread, stop):
    """600 prompts, 12 gamma-distributed lengths each, some stopped: the last third together, or half anywhere."""
    dice = np.random.default_rng(5)
    truth, estimate, naive = [], [], []
    for _ in range(600):
        group = np.sort(dice.gamma(1 / spread**2, 900 * spread**2, 12))
        known, censored = eager_stop(group)
        if stop == "apart":
            limits = dice.gamma(1 / spread**2, 900 * spread**2, 12)  # as long as the responses, so half are reached
            known, censored = np.minimum(group, limits), group > limits
        truth.append((group.mean(), group.std()))
        estimate.append(censored_moments(known, censored))
        naive.append((known.mean(), known[~censored].std() if not censored.all() else 0))
    truth, estimate, naive = (np.mean(moments, axis=0) for moments in (truth, estimate, naive))
    assert estimate[0] == pytest.approx(truth[0], rel=0.06)
    assert estimate[1] == pytest.approx(truth[1], rel=0.2)
    assert abs(estimate[1] - truth[1]) < 0.6 * abs(naive[1] - truth[1])


@pytest.fixture(scope="module")
def real_lengths():
    """Real response lengths by step, each an array [num_prompts, 16]."""
    groups = {}
    with gzip.open(REAL_LENGTHS, "rt") as file:
        for row in csv.DictReader(file):
            group = groups.setdefault((int(row["step"]), int(row["prompt"])), {})
            group[int(row["candidate"])] = int(row["response_length"])
    by_step = {}
    for (step, _), group in groups.items():
        by_step.setdefault(step, []).append([group[candidate] for candidate in range(16)])
    return {step: np.array(lengths, dtype=float) for step, lengths in by_step.items()}


def stds_of(lengths, num_candidates):
    """Of each group of the first candidates: of the full draw, of the shortest alone, estimated under eager stop."""
    groups = np.sort(lengths[:, :num_candidates], axis=1)
    estimate = [censored_std(*eager_stop(group)) for group in groups]
    return groups.std(axis=1), groups[:, :NUM_KEEP].std(axis=1), np.array(estimate)


@pytest.mark.parametrize("num_candidates", DRAWS)
def test_real_lengths_of_a_drifting_policy(real_lengths, num_candidates):
    lengths = np.concatenate([real_lengths[step] for step in (102, 103, 104)])
    truth, naive, estimate = stds_of(lengths, num_candidates)
    scaled = naive * (truth @ naive) / (naive @ naive)  # the best that one factor for all prompts can do
    assert estimate.mean() == pytest.approx(truth.mean(), rel=0.1)
    assert np.mean((estimate - truth) ** 2) < np.mean((scaled - truth) ** 2)


@pytest.mark.parametrize("num_candidates", DRAWS)
def test_real_lengths_with_a_heavy_tail_do_not_explode(real_lengths, num_candidates):
    truth, naive, estimate = stds_of(real_lengths[101], num_candidates)
    assert abs(estimate.mean() - truth.mean()) < 0.5 * abs(naive.mean() - truth.mean())


@pytest.mark.parametrize("ended", [8, 11])
@pytest.mark.parametrize("num_candidates", [12, 16])
def test_real_lengths_of_a_drifting_policy_whose_groups_are_all_stopped(real_lengths, num_candidates, ended):
    model, pairs = LengthModel(), []
    for step in (102, 103, 104):
        groups = real_lengths[step][:, :num_candidates]
        ends = np.sort(groups, axis=1)[:, ended - 1, None]
        moments = model.observe(list(zip(np.minimum(groups, ends), groups > ends, strict=True)))
        pairs += list(zip(*moments, groups.mean(axis=1), groups.std(axis=1), strict=True))
    means, stds, true_means, true_stds = np.transpose(pairs)
    assert means.mean() == pytest.approx(true_means.mean(), rel=0.03)
    assert math.sqrt(np.mean(stds**2)) == pytest.approx(math.sqrt(np.mean(true_stds**2)), rel=0.1)


NONSENSE = [
    ([1, -2], [False, False], r"lengths\[1\]=-2.0: a length must be finite and not negative"),
    ([math.nan, 1], [False, False], r"lengths\[0\]=nan"),
    ([1, math.inf], [False, True], r"lengths\[1\]=inf"),
    ([1, 2], [False], r"lengths has shape \(2,\), censored \(1,\): both must be \[num_candidates\]"),
    ([[1, 2]], [[False, True]], r"lengths has shape \(1, 2\)"),
    (5, True, r"lengths has shape \(\)"),
]


@pytest.mark.parametrize(("lengths", "censored", "message"), NONSENSE)
def test_nonsense_is_refused_with_name_value_and_rule(lengths, censored, message):
    past = LengthHistory()
    past.update("a", [10, 20], [False, False])
    before = past.state_dict()
    for read in (censored_std, censored_moments, lambda *observation: past.update("a", *observation)):
        with pytest.raises(ValueError, match=message):
            read(lengths, censored)
    assert past.state_dict() == before


# --- history ---------------------------------------------------------------------------------------------------------


def recount(updates, weight, recent):
    """(mean, std) by prompt and for an unseen one, from the list of all updates."""
    seen = [(key, *censored_moments(*observation)) for key, observation in updates if any(observation[0])]
    by_prompt = {}
    for key in {key for key, _, _ in seen}:
        observed = [(mean, std) for name, mean, std in seen if name == key]
        ages = range(len(observed) - 1, -1, -1)
        shares = [(1 - weight) ** age * (1 if age == len(observed) - 1 else weight) for age in ages]
        mean = sum(share * mean for share, (mean, _) in zip(shares, observed, strict=True))
        variance = sum(share * std**2 for share, (_, std) in zip(shares, observed, strict=True))
        by_prompt[key] = (mean, math.sqrt(variance))
    latest = list(dict.fromkeys(key for key, _, _ in reversed(seen)))[:recent]
    dataset = np.mean([by_prompt[key] for key in latest] or [(0.0, 0.0)], axis=0)
    return by_prompt, tuple(dataset)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), observations()), max_size=14),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.integers(1, 7),
    st.sets(st.integers(0, 13)),
)
def test_history_is_what_a_recount_gives_also_when_resumed_from_json(updates, weight, recent, resumes):
    past = LengthHistory(weight, recent)
    for step, (key, observation) in enumerate(updates):
        assert past.update(key, *observation) == censored_std(*observation)
        if step in resumes:
            state = json.loads(json.dumps(past.state_dict()))
            past = LengthHistory(weight, recent)
            past.load_state_dict(state)
        by_prompt, dataset = recount(updates[: step + 1], weight, recent)
        assert (past.dataset_mean, past.dataset_std) == pytest.approx(dataset, rel=1e-9, abs=1e-6)
        assert len(past) == len(by_prompt)
        for name in "abcdefg":
            assert (name in past) == (name in by_prompt)
            expected = by_prompt.get(name, dataset)
            assert (past.mean(name), past.std(name)) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), observations()), max_size=10), st.integers(0, 10))
def test_a_resumed_history_goes_on_with_the_same_floats(updates, resume_at):
    past, resumed = LengthHistory(recent=2), LengthHistory(recent=2)
    for step, (key, observation) in enumerate(updates):
        if step == resume_at:
            resumed.load_state_dict(json.loads(json.dumps(past.state_dict())))
        past.update(key, *observation)
        if step >= resume_at:
            resumed.update(key, *observation)
            assert json.dumps(resumed.state_dict()) == json.dumps(past.state_dict())
            assert [resumed.std(name) for name in "abcdefg"] == [past.std(name) for name in "abcdefg"]
            assert [resumed.mean(name) for name in "abcdefg"] == [past.mean(name) for name in "abcdefg"]


def test_a_scenario_by_hand():
    past = LengthHistory(recent=2)
    assert (past.std("a"), past.mean("a"), len(past)) == (0.0, 0.0, 0)
    with pytest.raises(ValueError, match="key=7: must be text"):
        past.update(7, [1], [False])  # JSON would make it "7"
    assert past.update("a", [100, 300], [False, False]) == 100.0
    assert past.update("a", [400, 400], [False, False]) == 0.0
    assert past.std("a") == pytest.approx(math.sqrt(0.7 * 100**2))  # of the std it would be 70
    assert past.mean("a") == pytest.approx(0.7 * 200 + 0.3 * 400)
    past.update("b", [1000, 1020], [False, False])
    past.update("c", [2000, 2060], [False, False])
    assert (past.std("new"), past.mean("new")) == (20.0, 1520.0)  # a is no longer recent
    past.update("b", [1000, 1020], [False, False])  # the same two, each once
    assert past.std("new") == pytest.approx(20.0)
    past.update("a", [0, 0], [True, True])
    assert past.std("new") == pytest.approx(20.0)
    past.update("a", [260, 260], [False, False])  # a and b are the last two now
    assert past.mean("new") == pytest.approx((260 + 1010) / 2)
    assert past.update("a", [200, 200], [False, True]) > 0


def test_statistics_of_the_dataset_are_computed_once_per_change(monkeypatch):
    counted = []
    monkeypatch.setattr(history, "islice", lambda *arguments: counted.append(1) or [(1.0, 4.0)])
    past = LengthHistory()
    past.update("a", [1, 2], [False, False])
    assert {past.std(str(prompt)) + past.mean(str(prompt)) for prompt in range(2048)} == {3.0}
    assert len(counted) == 1
    past.update("a", [1, 2], [False, False])
    past.load_state_dict(past.state_dict())
    assert past.dataset_std == 2.0
    assert len(counted) == 2


def test_the_state_is_compact_and_none_of_it_is_shared():
    past = LengthHistory()
    past.update("b", [100, 300], [False, False])
    past.update("a", [4, 4], [False, False])
    past.update("b", [100, 300], [False, False])
    state = past.state_dict()
    assert json.dumps(state) == '{"version": 1, "prompts": {"a": [4.0, 0.0], "b": [200.0, 10000.0]}}'
    state["prompts"]["a"][0] = 5
    other = LengthHistory()
    other.update("c", [9], [False])
    assert other.mean("new") == 9.0
    other.load_state_dict(state)
    state["prompts"]["a"][0] = 6
    assert (past.mean("a"), other.mean("a"), "c" in other, other.mean("new")) == (4.0, 5.0, False, 102.5)
    assert json.dumps(other.state_dict()["prompts"]["a"]) == "[5.0, 0.0]"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "state=None: must be a dict with exactly the keys version and prompts"),
        ({}, "state={}: must be a dict with exactly"),
        ({"version": 1}, "state={'version': 1}: must"),
        ({"version": 1, "prompts": {}, "weight": 0.3}, "weight.*exactly the keys version and prompts"),
        ({"version": 2, "prompts": {}}, "version=2: this version of darts reads 1"),
        ({"version": "1", "prompts": {}}, "version='1'"),
        ({"version": True, "prompts": {}}, "version=True"),
        ({"version": 1, "prompts": [["b", 1.0, 1.0]]}, "prompts=.*: must be a dict of key to"),
        ({"version": 1, "prompts": {"b": [1.0, 1.0], 7: [1.0, 1.0]}}, r"prompts\[7\]"),
        ({"version": 1, "prompts": {"b": [1.0, 1.0], "c": [1.0]}}, r"prompts\['c'\]=\[1.0\]: must be text: "),
        ({"version": 1, "prompts": {"b": [1.0, 1.0, 1.0]}}, r"prompts\['b'\]=\[1.0, 1.0, 1.0\]"),
        *(
            ({"version": 1, "prompts": {"b": values}}, r"prompts\['b'\]=.* both finite and >= 0")
            for number in ("2", None, True, -0.5, math.nan, math.inf, 10**400)
            for values in (
                number,
                {"mean": 1.0, "variance": 1.0},
                [1.0, number],
                [number, 1.0],
                [1.0, 1.0, number],
                (1.0, number),
            )
        ),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(state, message):
    past = LengthHistory()
    past.update("a", [10, 20], [False, False])
    before = past.state_dict()
    with pytest.raises(ValueError, match=message):
        past.load_state_dict(state)
    assert past.state_dict() == before
    assert past.dataset_std == 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weight": 0}, r"weight=0: must lie in \(0, 1\]"), ({"weight": 1.01}, "weight=1.01"),
     ({"weight": math.nan}, "weight=nan"), ({"recent": 0}, "recent=0: must be a whole number, at least 1"),
     ({"recent": 2.5}, "recent=2.5")],
)  # fmt: skip
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LengthHistory(**arguments)


# --- names of prompts ------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Short."}, {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
CHAT_KEY = "7f2893f33d7dae50"


class Image:
    """What of a PIL image is looked at, and an address in its repr."""

    def __init__(self, pixels, mode="RGB", size=(2, 1)):
        self.pixels, self.mode, self.size = pixels, mode, size

    def tobytes(self):
        return self.pixels


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


def other_form(content):
    """Equal content: dicts reversed, lists as tuples or object arrays, scalars of NumPy."""
    if isinstance(content, dict):
        return {np.str_(key): other_form(value) for key, value in reversed(content.items())}
    if isinstance(content, list):
        parts = [other_form(part) for part in content]
        if len(parts) % 2:
            return tuple(parts)
        array = np.empty(len(parts), dtype=object)
        for index, part in enumerate(parts):
            array[index] = part
        return array
    if isinstance(content, bool | float):
        return np.array(content)[()]
    return np.str_(content) if isinstance(content, str) else content


def test_the_key_of_a_chat_is_pinned():
    """Checkpoints hold keys: another value here is another history for everyone who resumes."""
    assert prompt_key(CHAT) == CHAT_KEY
    assert prompt_key(["é", 1]) == hashlib.sha256("l9:s2:én1:1".encode()).hexdigest()[:16]


@given(json_values)
def test_form_does_not_count(content):
    assert prompt_key(other_form(content)) == prompt_key(content)


@given(json_values, json_values)
def test_content_counts(one, other):
    equal = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (prompt_key(one) == prompt_key(other)) == equal


def test_contents_that_look_alike_differ():
    pixels = b"\0\1\2\3\4\5"
    contents = [
        *([], [[]], {}, "", b"", None, "None", 0, "0", 0.0, -0.0, False, [0, None], {"a": None}, {1: "a"}, {"1": "a"}),
        *(["ab"], ["a", "b"], [["a"], "b"], [["a", "b"]], {"a": "b"}, [["a", "b"], []], {"a": {"b": 1}}, "s1:a", "a"),
        *({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": "b", "c": "d"}, {"a": "d", "c": "b"}, math.nan, 2**70, "\ud800"),
        *(pixels, Image(pixels), Image(pixels, size=(1, 2)), Image(pixels, mode="YUV"), Image(pixels[::-1])),
        *(
            np.arange(6).reshape(2, 3),
            np.arange(6).reshape(3, 2),
            np.zeros((2, 3)),
            np.zeros((2, 3), int),
            np.arange(6),
        ),
    ]
    keys = [prompt_key(content) for content in contents]
    assert [contents[index] for index in range(len(keys)) if keys.index(keys[index]) != index] == []
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)


def test_equal_images_arrays_and_scalars_have_equal_keys():
    assert prompt_key([Image(b"abc")]) == prompt_key([Image(b"abc")])
    array = np.arange(12).reshape(3, 4)
    assert prompt_key(array.T) == prompt_key(np.ascontiguousarray(array.T))
    assert prompt_key(np.arange(3)) == prompt_key([0, 1, 2]) == prompt_key((np.int64(0), np.int32(1), np.array(2)))
    assert prompt_key(np.array([["a"], ["bc"]])) == prompt_key([["a"], ["bc"]])
    assert prompt_key(np.array([["a", None]], dtype=object)) == prompt_key([["a", None]])
    assert prompt_key(memoryview(b"ab")) == prompt_key(bytearray(b"ab")) == prompt_key(np.bytes_(b"ab"))


def test_pil_images_count_by_their_pixels():
    pil = pytest.importorskip("PIL.Image")
    red, also_red, blue = (pil.new("RGB", (4, 3), color) for color in ("red", "#ff0000", "blue"))
    assert prompt_key({"image": red}) == prompt_key({"image": also_red}) != prompt_key({"image": blue})


@pytest.mark.parametrize("content", [object(), {"a": [object()]}, {1, 2}, 1j, np.longdouble(1), np.ndarray, [print]])
def test_content_without_a_stable_form_is_refused_with_its_type(content):
    with pytest.raises(TypeError, match=r"content of type (builtins\.\w+|numpy\.longdouble) has no stable form"):
        prompt_key(content)


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_keys_are_the_same_in_every_process(seed):
    code = f"from darts.history import prompt_key; print(prompt_key({CHAT!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert run.stdout.strip() == CHAT_KEY, run.stderr
