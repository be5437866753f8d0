"""`darts.overlap`: what is composed and refused, what follows from verl's settings, and the check of memory."""

import pickle
from dataclasses import replace

import compositions
import pytest

from darts.checks.run import check_memory, check_run, darts_config
from darts.config import ConfigError
from darts.messages import RankAbility
from darts.overlap.join import actor_limits
from darts.testbed import register_resolver

register_resolver()

ROLLOUT, REF = "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
REWARD_MODEL = "reward.reward_model.enable=true"


def composed(*overrides: str):
    return compositions.composed("quickstart", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("darts.overlap.mode=tokens", r"darts\.overlap\.mode='tokens': .*sequence, token.* Fix: "),
        ("darts.overlap.mode=true", r"darts\.overlap\.mode=True: "),
        ("darts.overlap.kv_cache_gib=-1", r"darts\.overlap\.kv_cache_gib=-1"),
        ("darts.overlap.kv_cache_gib=much", r"darts\.overlap\.kv_cache_gib='much'"),
        ("darts.overlap.kv_cache_gib=nan", r"darts\.overlap\.kv_cache_gib=nan"),
        ("+darts.overlap.cache=1", r"darts\.overlap\.cache"),
        ("darts.placement=apart", r"darts\.placement='apart': .*colocated, disaggregated.* Fix: "),
    ],
)
def test_bad_values_are_one_clear_error(override, message):
    with pytest.raises(ConfigError, match=message):
        darts_config(composed(override))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([BYPASS], "bypass_mode=True the servers' own log-probs are the old log-probs"),
        (["actor_rollout_ref.actor.strategy=megatron"], "is verl's FSDP engine; .*'megatron' is not"),
        ([REWARD_MODEL, "reward.reward_model.enable_resource_pool=false"], "a reward model on the training GPUs"),
    ],
)
def test_what_excludes_overlap_refuses_it_and_switches_auto_off(settings, reason):
    for mode in ("sequence", "token"):
        with pytest.raises(ConfigError, match=f"darts.overlap.mode='{mode}': .*{reason}.* Fix: set darts.overlap.mode"):
            check_run(composed("darts.reward.pool=false", f"darts.overlap.mode={mode}", *settings))
    separate = composed("darts.placement=disaggregated", *settings)
    assert darts_config(separate).overlap.mode == "off"


def test_auto_overlaps_where_trainers_would_idle():
    assert darts_config(composed()).overlap.mode == "off"
    assert darts_config(composed("darts.placement=disaggregated")).overlap.mode == "token"
    pool = [REWARD_MODEL, "reward.reward_model.enable_resource_pool=true"]
    assert darts_config(composed("darts.placement=disaggregated", *pool)).overlap.mode == "token"


def limits(*overrides: str, with_reference: bool = False):
    config = composed("data.max_prompt_length=40", "data.max_response_length=60", *overrides)
    return actor_limits(config, darts_config(config), num_ranks=2, with_reference=with_reference)


def dynamic(part: str, tokens: int) -> list[str]:
    return [f"{part}.log_prob_use_dynamic_bsz=true", f"{part}.log_prob_max_token_len_per_gpu={tokens}"]


def test_forwards_have_verls_limits():
    fixed = limits(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4")
    assert (fixed.max_tokens, fixed.max_rows, fixed.longest, fixed.padded) == (400, 4, 100, True)
    packed = limits(*dynamic(ROLLOUT, 5000), "actor_rollout_ref.model.use_remove_padding=true")
    assert (packed.max_tokens, packed.max_rows, packed.padded) == (5000, None, False)
    assert limits("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2").sequence_parallel == 2
    assert limits("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=4").sequence_parallel == 4


def test_with_a_reference_the_smaller_limits_count():
    both = [*dynamic(ROLLOUT, 5000), *dynamic(REF, 3000)]
    assert limits(*both).max_tokens == 5000
    assert limits(*both, with_reference=True).max_tokens == 3000
    mixed = [
        *dynamic(ROLLOUT, 5000),
        f"{REF}.log_prob_use_dynamic_bsz=false",
        f"{REF}.log_prob_micro_batch_size_per_gpu=7",
    ]
    found = limits(*mixed, with_reference=True)
    assert (found.max_tokens, found.max_rows) == (700, 7)


GIB = 1 << 30
ABLE = RankAbility(
    refusal=None, bytes_per_token=1024, device_bytes=80 * GIB, free_bytes=70 * GIB, gathered_bytes=2 * GIB,
    optimizer_bytes=0,
)  # fmt: skip


def colocated(mode: str = "token"):
    return darts_config(composed(f"darts.overlap.mode={mode}", "darts.overlap.kv_cache_gib=8"))


def check(ability: RankAbility, darts=None, server_share: float = 0.5, logit_gib: int = 19) -> None:
    """10 in use, 40 for the server, 2 gathered, 8 of prefixes, 19 of logits: 79 of 80."""
    check_memory(darts or colocated(), [ability], logit_bytes=logit_gib * GIB, server_share=server_share)


def test_memory_that_is_just_enough_is_taken_and_a_little_less_refused():
    check(ABLE)
    with pytest.raises(
        ConfigError, match=r"need 81\.0 GiB of the device's 80\.0: .*logits of one forward 21\.0.* Fix: "
    ) as e:
        check(ABLE, logit_gib=21)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value), "Ray carries it to the user's process"


@pytest.mark.parametrize(
    ("name", "change"),
    [("free_bytes", -2), ("gathered_bytes", 2), ("optimizer_bytes", 2)],
)
def test_every_part_counts(name, change):
    with pytest.raises(ConfigError, match=r"need 81\.0 GiB"):
        check(replace(ABLE, **{name: getattr(ABLE, name) + change * GIB}))
    check(replace(ABLE, **{name: getattr(ABLE, name) + change // 2 * GIB}))


def test_what_does_not_apply_does_not_count():
    over = {"logit_gib": 27}
    check(ABLE, colocated("sequence"), **over)
    check(replace(ABLE, refusal="no cache"), **over)
    check(ABLE, server_share=0.0, logit_gib=59)
    check(ABLE, darts_config(composed("darts.placement=disaggregated")), logit_gib=1000)
    with pytest.raises(ConfigError):
        check(ABLE, **over)
