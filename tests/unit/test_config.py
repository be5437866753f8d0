"""The block `darts:`: defaults follow the group size; a bad value gives one error with key, value, rule and fix."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from darts.config import AllocationConfig, ConfigError, DartsConfig, OverlapConfig


def test_defaults_follow_the_group_size():
    config = DartsConfig.from_block({}, group_size=4)
    allocation = config.allocation
    assert (allocation.mode, allocation.low, allocation.high, allocation.mean_candidates) == ("adaptive", 4, 8, 1.3 * 4)
    assert allocation.fallback_mean == 1.3 * 4, "the paper's mix"
    uniform = DartsConfig.from_block({"allocation": {"mode": "uniform"}}, group_size=4).allocation
    assert uniform.mean_candidates == uniform.fallback_mean == 6
    assert (config.num_short, config.selection.num_long) == (3, 1)
    assert config.enable
    assert (config.spare_prompts, config.bypass, config.selection.long_end) == (0.0, False, "finished")
    assert DartsConfig.from_block(None, group_size=4) == config


def test_a_preset_gives_what_is_null_and_what_is_set_beside_it_wins():
    fast = DartsConfig.from_block({"preset": "fast"}, group_size=8)
    assert (fast.spare_prompts, fast.bypass, fast.allocation.mean_candidates) == ("plan", True, "plan")
    assert (fast.selection.mode, fast.selection.long_end, fast.selection.long_wait) == ("dual_end", "cut", "deadline")
    block = {"preset": "fast", "spare_prompts": 0.1, "bypass": False, "allocation": {"mean_candidates": 9}}
    mixed = DartsConfig.from_block(block, group_size=8)
    assert (mixed.spare_prompts, mixed.bypass, mixed.allocation.mean_candidates) == (0.1, False, 9)
    assert mixed.selection == fast.selection
    other = DartsConfig.from_block({"preset": "fast", "strategy": "shortest_k"}, group_size=8)
    assert (other.bypass, other.allocation.mean_candidates) == (False, 12), "others have rules of their own"
    own = DartsConfig.from_block({"preset": "fast", "strategy": "mine.Own"}, group_size=8)
    assert (own.spare_prompts, own.allocation.mean_candidates) == (0.0, 10.4), "nobody would plan for it"


def test_the_wait_follows_the_long_end():
    for long_end, wait in (("finished", "all"), ("truncated", "all"), ("cut", "deadline")):
        assert DartsConfig.from_block({"selection": {"long_end": long_end}}, 8).selection.long_wait == wait
    with pytest.raises(
        ConfigError, match=r"darts.selection.long_wait='all': with .*long_end=cut .*Fix: set it to dead"
    ):
        DartsConfig.from_block({"selection": {"long_end": "cut", "long_wait": "all"}}, 8)


def test_with_bypass_nothing_is_computed_during_generation():
    block = {"preset": "fast", "placement": "disaggregated"}
    assert DartsConfig.from_block(block, 8).overlap.mode == "off"
    with pytest.raises(ConfigError, match=r"darts.overlap.mode='token': with darts.bypass"):
        DartsConfig.from_block({**block, "overlap": {"mode": "token"}}, 8)


def test_what_depends_on_size_and_placement_has_one_default_and_is_settled_once():
    """A part that was made alone has the setting's default, which a complete configuration never has."""
    assert (AllocationConfig().low, AllocationConfig().high, OverlapConfig().mode) == (None, None, "auto")
    adaptive = AllocationConfig(mode="adaptive")
    config = DartsConfig(group_size=4, placement="disaggregated", allocation=adaptive, overlap=OverlapConfig())
    assert (config.allocation.low, config.allocation.high, config.overlap.mode) == (4, 8, "token")
    assert DartsConfig(group_size=4, overlap=OverlapConfig(mode="auto")).overlap.mode == "off"
    assert replace(config, allocation=replace(config.allocation, high=None)) == config
    assert DartsConfig(group_size=4, overlap=OverlapConfig(mode="sequence")).overlap.mode == "sequence"


def test_a_configuration_does_not_change_and_can_be_sent():
    config = DartsConfig.from_block({"allocation": {"mean_candidates": 12}}, group_size=8)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    with pytest.raises(FrozenInstanceError):
        config.allocation.low = 9


def test_null_means_default():
    block = {"allocation": {"low": None, "high": None, "mean_candidates": None}, "selection": None, "seed": None}
    assert DartsConfig.from_block(block, group_size=8) == DartsConfig.from_block({}, group_size=8)


def test_saturated_prompts_are_shortest_only():
    config = DartsConfig.from_block({"allocation": {"high": 11}}, group_size=8)
    assert [config.group_rules(budget).num_long for budget in (8, 10, 11)] == [1, 1, 0]
    forced = DartsConfig.from_block({"selection": {"mode": "shortest_only"}}, group_size=8)
    assert forced.group_rules(8).num_long == 0
    dual = DartsConfig.from_block({"selection": {"mode": "dual_end", "num_long": 2}}, group_size=8)
    assert dual.group_rules(16).num_long == 2


def test_early_stop_can_act_where_some_group_may_be_shortest_only():
    def some(mode="adaptive", selection="auto", **allocation):
        block = {"allocation": {"mode": mode, **allocation}, "selection": {"mode": selection}}
        return DartsConfig.from_block(block, group_size=8).some_shortest_only

    assert some()
    assert not some(selection="dual_end")
    assert not some("uniform")
    assert some("uniform", mean_candidates=15.5)
    assert not some("off")
    assert some("off", selection="shortest_only")


def test_yaml_off_is_the_word_off():
    config = DartsConfig.from_block({"allocation": {"mode": False}, "latency": {"profile": False}}, group_size=8)
    assert (config.allocation.mode, config.latency.profile) == ("off", "off")


BAD = [
    ({"lambda": 1}, 8, "darts.lambda=1: unknown key"),
    ({"selection": {"numlong": 1}}, 8, "did you mean darts.selection.num_long?"),
    ({"selection": {"num_long": -1}}, 8, "darts.selection.num_long=-1: L must be an integer in [0, rollout.n=8)"),
    ({"selection": {"num_long": 8}}, 8, "darts.selection.num_long=8: L must"),
    ({"selection": {"num_long": True}}, 8, "darts.selection.num_long=True"),
    ({"selection": {"mode": "both"}}, 8, "darts.selection.mode='both': must be one of auto, dual_end, shortest_only"),
    ({"selection": {"on_no_valid": "skip"}}, 8, "darts.selection.on_no_valid='skip'"),
    ({"selection": 3}, 8, "darts.selection=3: must be a block"),
    ({"allocation": {"low": 7}}, 8, "darts.allocation.low=7: M_low must be an integer of at least rollout.n=8"),
    (
        {"allocation": {"low": 10, "high": 9}},
        8,
        "darts.allocation.high=9: M_up must be an integer of at least M_low=10",
    ),
    ({"allocation": {"mean_candidates": 17}}, 8, "darts.allocation.mean_candidates=17.0: the mean number"),
    ({"allocation": {"mean_candidates": 7.5}}, 8, "must lie in [low=8, high=16]"),
    ({"allocation": {"mean_candidates": float("nan")}}, 8, "darts.allocation.mean_candidates=nan"),
    ({"allocation": {"mean_candidates": "12"}}, 8, "darts.allocation.mean_candidates='12'"),
    ({"allocation": {"mode": "adaptiv"}}, 8, "darts.allocation.mode='adaptiv': must be one of adaptive, uniform, off"),
    (
        {"allocation": {"cost_weight": -1}},
        8,
        "darts.allocation.cost_weight=-1: must be a finite number of at least 0: [lambda] ",
    ),
    ({"allocation": {"cost_weight": float("nan")}}, 8, "darts.allocation.cost_weight=nan"),
    ({"allocation": {"warmup_steps": -1}}, 8, "darts.allocation.warmup_steps=-1"),
    ({"allocation": {"warmup_steps": 1.5}}, 8, "darts.allocation.warmup_steps=1.5"),
    (
        {"allocation": {"ema_weight": 0}},
        8,
        "darts.allocation.ema_weight=0: must be a finite number above 0 and of at most 1: Weight of a new observation",
    ),
    ({"allocation": {"ema_weight": 1.1}}, 8, "darts.allocation.ema_weight=1.1"),
    ({"latency": {"profile": 3}}, 8, "darts.latency.profile=3: must be auto, off, or the path"),
    ({"latency": {"profile": ""}}, 8, "darts.latency.profile=''"),
    ({"latency": {"profile_s": 0}}, 8, "darts.latency.profile_s=0"),
    ({"latency": {"refine": "yes"}}, 8, "darts.latency.refine='yes'"),
    ({"latency": "auto"}, 8, "darts.latency='auto': must be a block with the keys profile, profile_s, refine"),
    ({"state": {"strict": 1}}, 8, "darts.state.strict=1"),
    ({"trace": 5}, 8, "darts.trace=5: must be the path of a file, or null"),
    ({"reward": {"pool": 1}}, 8, "darts.reward.pool=1"),
    ({"enable": "yes"}, 8, "darts.enable='yes'"),
    ({"seed": -1}, 8, "darts.seed=-1"),
    ({"timeout_s": 0}, 8, "darts.timeout_s=0"),
    ({"timeout_s": float("inf")}, 8, "darts.timeout_s=inf"),
    ({"progress_s": -1}, 8, "darts.progress_s=-1"),
    ({"strategy": "dart"}, 8, "darts.strategy='dart': must be one of none, bypass, shortest_k, darts, "),
    ({"strategy": ".darts."}, 8, "or package.module.Class"),
    ({"overlap": {"mode": "tokens"}}, 8, "darts.overlap.mode='tokens': must be one of auto, off, sequence, token"),
    ({"overlap": {"kv_cache_gib": -1}}, 8, "darts.overlap.kv_cache_gib=-1: must be a finite number of at least 0"),
    ({"tail_batching": {"prompts": 0.9}}, 8, "darts.tail_batching.prompts=0.9: must be a finite number of at least 1"),
    ({"sorted": {"prompts": 0}}, 8, "darts.sorted.prompts=0: must be an integer of at least 1"),
    ({"streaming": {"chunk_tokens": True}}, 8, "darts.streaming.chunk_tokens=True: must be an integer of at least 1"),
    ({"streaming": {"chunk_tokens": 2.0}}, 8, "darts.streaming.chunk_tokens=2.0"),
    ({"timeout_s": True}, 8, "darts.timeout_s=True"),
    ({"timeout_s": False}, 8, "darts.timeout_s=False: must be a finite number above 0"),
    ({"enable": False, "placement": "here"}, 1, "darts.placement='here': must be one of colocated, disaggregated"),
    ({"enable": False, "selection": {"numlong": 1}}, 1, "did you mean darts.selection.num_long?"),
    ({}, 1, "actor_rollout_ref.rollout.n=1: DARTS compares the candidates of a prompt"),
    ({}, True, "actor_rollout_ref.rollout.n=True"),
]


@pytest.mark.parametrize(("block", "group_size", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_values_name_key_value_rule_and_fix(block, group_size, message):
    with pytest.raises(ConfigError) as error:
        DartsConfig.from_block(block, group_size)
    assert message in str(error.value)
    assert " Fix: " in str(error.value)
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_off_reads_the_placement_alone():
    block = {"enable": False, "placement": "disaggregated", "selection": {"num_long": 99}, "timeout_s": "long"}
    config = DartsConfig.from_block(block, group_size=1)
    assert (config.enable, config.placement, config.timeout_s) == (False, "disaggregated", 3600)
