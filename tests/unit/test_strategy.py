"""Strategies: what each round launches and trains on; over many rounds no prompt is lost; what a checkpoint carries."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from darts.config import STRATEGIES, ConfigError, DartsConfig
from darts.strategy import (
    Darts,
    Plain,
    PromptLedger,
    Round,
    Sorted,
    Strategy,
    TailBatching,
    make_strategy,
    strategy_class,
    times,
)  # fmt: skip

M, PROMPTS = 8, 16
DARTS = DartsConfig.from_block({"selection": {"num_long": 2}}, group_size=M)


class Own(Strategy):
    """A user's."""


def test_what_needs_no_prompts_of_its_own_takes_verls_batches():
    for name in ("none", "bypass", "shortest_k", "darts"):
        strategy = make_strategy(replace(DARTS, strategy=name), PROMPTS)
        assert not strategy.chooses_prompts
        assert strategy.next_round() == Round(rules=strategy.rules, new=PROMPTS)
        strategy.ended(range(PROMPTS), range(PROMPTS))
        assert strategy.queue == ()


def test_none_and_bypass_are_verls_own_rollout():
    none, bypass = (make_strategy(replace(DARTS, strategy=name), PROMPTS) for name in ("none", "bypass"))
    assert not none.rules.enable
    assert not bypass.rules.enable
    assert none.rules.allocation.mode == "off", "metrics and plans count M candidates"
    assert none.overrides == {}
    assert bypass.overrides == {"algorithm.rollout_correction.bypass_mode": True}


def test_darts_is_as_the_settings_say():
    assert make_strategy(DARTS, PROMPTS).rules == DARTS


def test_spare_prompts_are_launched_beyond_the_batch_and_who_came_late_waits_for_a_round_of_its_own():
    darts = replace(DARTS, spare_prompts=0.1)
    strategy = make_strategy(darts, PROMPTS)
    assert strategy.chooses_prompts
    first = strategy.next_round()
    assert first == Round(rules=darts, new=18, harvest=PROMPTS)
    for turn in range(8):  # of each round the first two are late
        strategy.ended(range(18 * turn, 18 * turn + 18), range(2, 18))
    own = strategy.next_round()
    assert own.queued == tuple(18 * turn + place for turn in range(8) for place in range(2))
    assert (own.new, own.harvest, own.rules) == (0, None, darts)
    strategy.ended(own.queued, range(PROMPTS))
    assert strategy.next_round() == first


def test_the_most_that_a_round_may_launch_is_known_before_the_plan():
    fast = make_strategy(DartsConfig.from_block({"preset": "fast"}, M), PROMPTS)
    assert (fast.next_round().new, fast.most_new) == (17, 20)
    assert make_strategy(replace(DARTS, spare_prompts=0.5), PROMPTS).most_new == 24
    assert TailBatching(DARTS, PROMPTS).most_new == 20


def test_shortest_k_keeps_the_shortest_and_stops_nothing():
    rules = make_strategy(DartsConfig.from_block({"strategy": "shortest_k"}, M), PROMPTS).rules
    assert (rules.allocation.mode, rules.allocation.mean_candidates) == ("uniform", 12)
    assert rules.group_rules(12).num_long == 0
    assert rules.early_stop == "off"


def test_a_short_round_of_tail_batching_launches_a_quarter_more_of_both_and_a_long_one_no_more():
    strategy = TailBatching(DARTS, PROMPTS)
    short = strategy.next_round()
    assert (short.new, short.queued, short.harvest) == (20, (), PROMPTS)
    assert (short.rules.allocation.mode, short.rules.allocation.mean_candidates) == ("uniform", 10)
    assert (short.rules.group_rules(10).num_long, short.rules.early_stop) == (0, "eager")
    for turn in range(4):  # of each round of 20 prompts the last 4 are not complete
        launched = range(20 * turn, 20 * turn + 20)
        strategy.ended(launched, range(PROMPTS))
    assert strategy.queue == (16, 17, 18, 19, 36, 37, 38, 39, 56, 57, 58, 59, 76, 77, 78, 79)
    long = strategy.next_round()
    assert (long.new, long.queued, long.harvest) == (0, strategy.queue, None)
    assert (long.rules.allocation.mode, long.rules.early_stop) == ("off", "off")
    strategy.ended(long.queued, range(PROMPTS))
    assert strategy.queue == ()
    assert strategy.next_round() == short


def test_factors_round_up_what_is_no_whole_number_and_nothing_else():
    """1.1 x 100 is 110.00000000000001 in floats."""
    block = {"tail_batching": {"prompts": 1.1, "candidates": 1.1}}
    strategy = make_strategy(DartsConfig.from_block(block | {"strategy": "tail_batching"}, 10), 100)
    assert strategy.next_round().new == 110
    assert strategy.rules.allocation.mean_candidates == 11
    assert times(8, 1.26) == 11


def test_tail_batching_without_more_prompts_waits_for_all():
    block = {"tail_batching": {"prompts": 1, "candidates": 1.5}}
    round_ = TailBatching(DartsConfig.from_block(block, group_size=M), PROMPTS).next_round()
    assert (round_.new, round_.harvest) == (PROMPTS, None)
    assert round_.rules.allocation.mean_candidates == 12


def test_a_lower_bound_above_what_a_strategy_launches_gives_way():
    block = {"strategy": "tail_batching", "allocation": {"low": 12}}
    allocation = make_strategy(DartsConfig.from_block(block, group_size=M), PROMPTS).rules.allocation
    assert allocation.low <= allocation.mean_candidates == 10 <= allocation.high


def test_sorted_consumes_its_cache_before_new_prompts_come():
    strategy = Sorted(DARTS, PROMPTS)
    first = strategy.next_round()
    assert (first.new, first.queued, first.harvest) == (64, (), PROMPTS)
    assert (first.rules.allocation.mode, first.rules.group_rules(M).num_long, first.rules.early_stop) == (
        "off",
        0,
        "off",
    )
    strategy.ended(range(64), range(0, 64, 4))
    second = strategy.next_round()
    assert (second.new, second.harvest) == (0, PROMPTS)
    assert second.queued == tuple(row for row in range(64) if row % 4)
    strategy.ended(second.queued, range(PROMPTS))
    strategy.ended(strategy.next_round().queued, range(PROMPTS))
    last = strategy.next_round()
    assert (len(last.queued), last.harvest) == (PROMPTS, None)
    strategy.ended(last.queued, range(PROMPTS))
    assert strategy.next_round() == first


SETTINGS = [{"strategy": name} for name in STRATEGIES] + [{"spare_prompts": share} for share in (0.05, 0.3, 2.0)]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_lost_over_many_rounds_and_spare_ones_come_late_once_at_most(changes, seed):
    """Each that was drawn from the data was trained on once, or waits; also where the run stops and resumes."""
    rng = np.random.default_rng(seed)
    darts, ledger, late = replace(DARTS, **changes), PromptLedger(), Counter()
    strategy, drawn, trained = make_strategy(darts, PROMPTS), 0, Counter()
    for _ in range(50):
        round_ = strategy.next_round()
        assert round_ == strategy.next_round(), "asking changes nothing"
        assert set(round_.queued) <= set(strategy.queue)
        launched = [*round_.queued, *range(drawn, drawn + round_.new)]
        drawn += round_.new
        count = len(launched) if round_.harvest is None else round_.harvest
        chosen = np.sort(rng.choice(len(launched), count, replace=False)).tolist()
        assert len(chosen) == PROMPTS
        strategy.ended(launched, chosen)
        trained.update(launched[position] for position in chosen)
        late.update(set(launched).difference(launched[position] for position in chosen))
        lengths = [10.0 + row % 7 for row in launched]
        metrics = ledger.enter(launched, round_.new, chosen, lengths)
        assert metrics["darts/strategy/late"] == len(launched) - PROMPTS
        assert metrics["darts/strategy/late_times_most"] == max(late.values(), default=0)
        assert metrics["darts/strategy/waiting_share"] == pytest.approx(len(strategy.queue) / drawn)
        trained_mean, drawn_mean = (np.mean([10 + row % 7 for row in rows]) for rows in (trained, range(drawn)))
        assert metrics["darts/strategy/trained_over_drawn"] == pytest.approx(trained_mean / drawn_mean)
        if rng.random() < 0.2:
            saved = json.loads(json.dumps([strategy.state_dict(), ledger.state_dict()]))
            strategy, ledger = make_strategy(darts, PROMPTS), PromptLedger()
            strategy.load_state_dict(saved[0])
            ledger.load_state_dict(saved[1])
    assert set(trained.values()) == {1}
    assert sorted([*trained, *strategy.queue]) == list(range(drawn))
    if "spare_prompts" in changes:
        assert set(late.values()) == {1}, "a bound"


def test_a_row_that_waits_and_is_drawn_again_counts_as_another_prompt():
    ledger = PromptLedger()
    ledger.enter([3, 4], 2, [1], [5.0, 5.0])
    assert ledger.enter([3, 5], 2, [1], [5.0, 5.0])["darts/strategy/late_times_most"] == 1


ONE = {"waiting": [[7, 1, 30.0]], "most": 1, "trained": [4, 99.0]}


@pytest.mark.parametrize("state", [None, {}, *({**ONE, name: [[1]]} for name in ONE), {**ONE, "most": "1"}, [3]])
def test_a_ledger_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="must have waiting"):
        PromptLedger().load_state_dict(state)


@pytest.mark.parametrize("state", [None, {}, {"queue": None}, {"queue": [1.5]}, {"queue": [-1]}, {"queue": [True]}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="must be a list of rows of the dataset"):
        TailBatching(DARTS, PROMPTS).load_state_dict(state)


def test_a_queue_of_steps_of_another_size_is_refused():
    state = TailBatching(DARTS, PROMPTS).state_dict() | {"queue": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"num_prompts=16: .*data.train_batch_size=8"):
        TailBatching(DARTS, 8).load_state_dict(state)


def test_a_queue_for_a_strategy_without_one_is_refused():
    Darts(DARTS, PROMPTS).load_state_dict({"queue": []})
    with pytest.raises(ValueError, match="has no queue"):
        Darts(DARTS, PROMPTS).load_state_dict({"queue": [3]})


def test_an_unknown_strategy_lists_the_known():
    with pytest.raises(ConfigError, match="none, bypass, shortest_k, darts, tail_batching, sorted"):
        DartsConfig.from_block({"strategy": "dart"}, group_size=M)


def test_a_users_own_strategy_is_found_by_its_path():
    path = f"{__name__}.Own"
    assert DartsConfig.from_block({"strategy": path}, group_size=M).strategy == path
    assert strategy_class(path) is Own
    assert issubclass(strategy_class("none"), Plain)
    for wrong, says in (
        ("nowhere.Own", "No module named 'nowhere'"),
        (f"{__name__}.Other", "has no attribute 'Other'"),
        (f"{__name__}.M", "not a subclass"),
    ):
        with pytest.raises(ConfigError, match=says):
            strategy_class(wrong)
