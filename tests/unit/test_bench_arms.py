"""The arms of a bench: what each changes, presets, and arms from the command line."""

import pytest

from darts.bench.arms import PRESETS, BenchArm, chosen, parse_arm
from darts.bench.limits import LengthLimits
from darts.config import STRATEGIES, ConfigError, DartsConfig
from darts.strategy import BYPASS_MODE, make_strategy

QUICKSTART = {
    "enable": True, "strategy": "darts", "seed": 0, "streaming": {"chunk_tokens": 16}, "overlap": {"mode": "off"},
    "allocation": {"mode": "adaptive", "mean_candidates": 10.5, "low": None, "high": 12},
    "selection": {"mode": "auto", "num_long": 1},
}  # fmt: skip
ALL = {arm.name: arm for arm in PRESETS["all"]}


def config(name: str) -> DartsConfig:
    return ALL[name].config(QUICKSTART, group_size=8)


@pytest.mark.parametrize("darts", [QUICKSTART, {}, None, {"enable": False}], ids=["quickstart", "empty", "none", "off"])
@pytest.mark.parametrize("name", ALL)
def test_every_arm_works_with_any_configuration(name, darts):
    made = ALL[name].config(darts, group_size=8)
    assert made.enable
    assert make_strategy(made, 8).next_round().new >= 8


def test_an_arm_changes_what_it_says_and_nothing_else():
    before = repr(QUICKSTART)
    arm = BenchArm(name="a", strategy="darts", changes={"selection.num_long": 2, "seed": 5}, overlap="token")
    assert arm.block(QUICKSTART) == QUICKSTART | {
        "selection": {"mode": "auto", "num_long": 2}, "seed": 5, "overlap": {"mode": "token"}
    }  # fmt: skip
    assert repr(QUICKSTART) == before


def test_presets():
    assert {arm.strategy for arm in PRESETS["strategies"]} == set(STRATEGIES)
    assert all(arms[0].name == "none" for arms in PRESETS.values())
    for arms in PRESETS.values():
        assert len({arm.name for arm in arms}) == len(arms)
        assert all(arm.about for arm in arms)
    assert {arm.name for arms in PRESETS.values() for arm in arms} == set(ALL)


def test_no_name_is_both_a_preset_and_an_arm():
    assert not set(PRESETS) & set(ALL)


def test_what_a_preset_of_darts_decides_is_left_to_it():
    """Whatever the bench's configuration has: the keys beside a preset would win."""
    for name in ("paper", "fast"):
        expected = DartsConfig.from_block({"preset": name, "overlap": {"mode": "off"}}, 8)
        made = config(name)
        assert (made.allocation, made.selection) == (expected.allocation, expected.selection)
        assert (made.bypass, made.spare_prompts) == (expected.bypass, expected.spare_prompts)
    truncated = config("paper, truncated")
    assert truncated.selection.long_end == "truncated"
    assert truncated.allocation == config("paper").allocation


def test_the_presets_against_what_a_doubter_tries_first():
    doubts, baselines = ({arm.name for arm in PRESETS[name]} for name in ("doubts", "baselines"))
    limited = {f"limit 1/{part} + bypass" for part in (2, 4, 8)}
    assert {"none", "bypass", "tail + bypass", "shortest_k + bypass", "paper", "fast", *limited} < doubts
    assert {"sorted + bypass", "overlong + bypass", *limited} < baselines
    bypassed = [arm for arm in PRESETS["baselines"] if arm.name != "none"]
    assert all(arm.bypass or make_strategy(config(arm.name), 8).settings.get(BYPASS_MODE) for arm in bypassed)
    assert [ALL[f"limit 1/{part} + bypass"].limits.max_tokens(1024) for part in (2, 4, 8)] == [512, 256, 128]


def test_the_ablation_adds_what_the_paper_adds():
    none, streaming, dual_end, adaptive = (config(arm.name) for arm in PRESETS["ablation"])
    assert none.strategy == "none"
    assert {made.overlap.mode for made in (streaming, dual_end, adaptive)} == {"token"}
    assert not streaming.some_shortest_only
    assert streaming.allocation.mode == "off"
    assert (dual_end.allocation.mode, dual_end.allocation.mean_candidates) == ("uniform", 10.5)
    assert dual_end.group_rules(12).num_long == 1
    assert (adaptive.allocation.mode, adaptive.group_rules(12).num_long, adaptive.group_rules(11).num_long) == (
        "adaptive",
        0,
        1,
    )
    assert adaptive.early_stop == "eager"


def test_components_are_switched_off_one_by_one():
    darts = config("darts")
    assert config("uniform").allocation.mode == "uniform"
    assert (darts.group_rules(12).num_long, config("dual-end only").group_rules(12).num_long) == (0, 1)
    assert config("no early stop").early_stop == "off"
    assert config("no longest").group_rules(9).num_long == 0
    assert config("deadline").selection.long_wait == "deadline"
    assert config("exact").early_stop == "exact"


def test_chosen_arms_are_in_the_commands_order_and_each_once():
    found = chosen(["darts", "ablation"], ["two long=darts,darts.selection.num_long=2"])
    names = ["darts", "none", "+ streaming", "+ dual-end", "+ adaptive", "two long"]
    assert [arm.name for arm in found] == names
    assert chosen([]) == ()


def test_an_arm_from_the_command_line():
    arm = parse_arm(
        "my arm = darts, darts.selection.num_long=2, darts.early_stop=off,darts.overlap.mode=token,"
        "darts.allocation.mean_candidates=null,darts.reward.pool=true,darts.allocation.cost_weight=1e-1"
    )
    assert arm == BenchArm(
        name="my arm", strategy="darts", overlap="token",
        changes={"selection.num_long": 2, "early_stop": "off", "allocation.mean_candidates": None, "reward.pool": True,
                 "allocation.cost_weight": 0.1},
    )  # fmt: skip
    assert parse_arm("own=package.module.Class").strategy == "package.module.Class"
    assert parse_arm("plain=none").changes == {}
    assert parse_arm("a=darts,algorithm.rollout_correction.bypass_mode=true").bypass
    assert not parse_arm("a=darts,algorithm.rollout_correction.bypass_mode=False").bypass
    limited = "a=none,data.max_response_length=64,reward.reward_kwargs.overlong_buffer_cfg.len=0.25"
    limited += ",reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=2"
    assert parse_arm(limited).limits == LengthLimits(response=64, buffer=0.25, factor=2)
    assert parse_arm("a=none").limits == LengthLimits()


def test_an_arm_does_not_overlap_log_probs_that_nobody_computes():
    arm = parse_arm("a=darts,darts.overlap.mode=token,algorithm.rollout_correction.bypass_mode=true")
    with pytest.raises(ConfigError, match="there are no log-probs to overlap"):
        arm.config({}, 8)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "needs a name and a strategy"),
        ("darts", "needs a name and a strategy"),
        ("=darts", "needs a name and a strategy"),
        ("a=", "needs a name and a strategy"),
        ("a=dart", "'dart' must be one of none, bypass, shortest_k, darts, tail_batching, sorted"),
        ("a=darts,selection.num_long=2", "'selection.num_long=2' is not darts.KEY=VALUE"),
        ("a=darts,darts.selection.num_long", "is not darts.KEY=VALUE"),
        ("a=darts,darts.allocation.ema_weight=1", "darts.allocation.ema_weight is shared by all arms"),
        ("a=darts,algorithm.rollout_correction.bypass_mode=1", "nor algorithm.rollout_correction.bypass_mode=true"),
        ("a=none,data.max_response_length=half", "data.max_response_length=half is not a number"),
        ("a=none,data.max_prompt_length=8", "nor of data.max_response_length, reward.reward_kwargs"),
        ("a=darts,darts.seed=1,darts.seed=2", "darts.seed is given twice"),
        ("a=darts,darts.strategy=none", "darts.strategy is the word behind the arm's name"),
        ("a=darts,darts.selection.num_lon=2", r"known are .*num_long.*did you mean darts.selection.num_long\?"),
        ("a=darts,darts.selecton.num_long=2", r"did you mean darts.selection\?"),
    ],
)
def test_an_arm_that_cannot_be_read_is_one_line(line, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse_arm(line)
    assert "\n" not in str(error.value)


def test_an_arm_whose_values_do_not_fit_names_the_rule():
    with pytest.raises(ConfigError, match=r"darts.selection.num_long=9: L must be an integer in \[0, rollout.n=8\)"):
        parse_arm("a=darts,darts.selection.num_long=9").config(QUICKSTART, group_size=8)
    with pytest.raises(ConfigError, match=r"darts\.selection=3: must be a block"):
        parse_arm("a=darts,darts.selection=3").config(QUICKSTART, group_size=8)


def test_unknown_arms_and_names_that_are_taken():
    with pytest.raises(ConfigError, match=r"must be a preset \(strategies, .*\) or an arm \(none, .*mean 'ablation'\?"):
        chosen(["ablatio"])
    with pytest.raises(ConfigError, match="write your own as --arm"):
        chosen(["zzz"])
    with pytest.raises(ConfigError, match="there is an arm 'darts' already"):
        chosen(["strategies"], ["darts=darts,darts.seed=1"])
