"""The comparison and the check of a model can fail: mistakes that others made, made again on purpose."""

import numpy as np
import pytest
from actor_cases import (
    OF_THE_BATCH,
    OF_THE_TOKENS,
    SETTINGS,
    forget_check,
    full,
    in_step,
    largest,
    play,
    repair,
    script,
    set_config,
    set_engine,
    spoil,
)

VISIBLE = 0.05  # nats, 500 times what is allowed


def scripts_of(group):
    random = np.random.default_rng(1)
    return [
        script(random, "long", prompt=20, response=30, pieces=[25, 10, 15]),
        script(random, "short", prompt=4, response=20, pieces=[6, 9, 9], rank=group.size - 1),
        script(random, "third", prompt=7, response=12, pieces=[8, 11]),
    ]


@pytest.fixture
def built(group):
    group.build("qwen2")
    yield group
    group.all("run", repair)


@pytest.mark.parametrize("mistake", [*list(OF_THE_BATCH)[:3], *OF_THE_TOKENS])
def test_comparison_sees(built, mistake):
    scripts = scripts_of(built)
    together = 3  # a seed by which unequal prefixes are continued in one forward
    assert largest(play(built, scripts, seed=together), full(built, scripts)) <= 1e-4
    built.all("run", spoil, mistake)
    assert largest(play(built, scripts, in_step(2), seed=together), full(built, scripts)) > VISIBLE


@pytest.mark.parametrize("mistake", OF_THE_BATCH)
@pytest.mark.parametrize("strategy", [pytest.param("fsdp", marks=pytest.mark.slow), "fsdp2"])
def test_check_refuses(two_ranks, strategy, mistake):
    """A model that is not continued rightly is refused on every rank, and its whole sequences are right."""
    two_ranks.build("qwen2", strategy=strategy)
    two_ranks.all("run", forget_check)
    two_ranks.all("run", spoil, mistake)
    try:
        abilities = two_ranks.all("call", "overlap_open", SETTINGS)
    finally:
        two_ranks.all("run", repair)
    expected = {"an error in a layer": "takes no keys", "the cache is ignored": "caches 0 of its 2 layers"}
    for ability in abilities:
        assert expected.get(mistake, "nats on average") in ability.refusal
        assert ability.bytes_per_token == 0
    again = two_ranks.all("call", "overlap_open", in_step(2))
    assert [ability.refusal for ability in again] == [ability.refusal for ability in abilities]
    scripts = [script(np.random.default_rng(2), "whole", rank=1)]
    settings = in_step(3, mode="sequence")
    assert largest(play(two_ranks, scripts, settings), full(two_ranks, scripts)) <= 1e-4


@pytest.mark.parametrize(
    ("change", "name", "value", "reason"),
    [
        (set_config, "vision_config", {}, "multimodal"),
        (set_config, "layer_types", ["full_attention", "chunked_attention"], "chunked_attention"),
        (set_config, "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}, "RoPE of the kind longrope,"),
        (
            set_config,
            "rope_parameters",
            {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}},
            "RoPE of the kind dynamic,",
        ),
        (set_config, "rope_scaling", {"type": "dynamic", "factor": 2.0}, "RoPE of the kind dynamic,"),
        (set_config, "rope_scaling", {"type": "somebody's", "rope_type": "default"}, "RoPE of the kind somebody's,"),
        (set_config, "num_kv_shared_layers", 1, "share keys"),
        (set_engine, "ulysses_sequence_parallel_size", 2, "ulysses_sequence_parallel_size=2"),
        (set_engine, "__class__", None, "not OverlapEngine"),
    ],
)
def test_unsupported_is_refused_without_a_forward(one_rank, change, name, value, reason):
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    one_rank.build("qwen2")
    one_rank.all("run", change, name, FSDPEngineWithLMHead if name == "__class__" else value)
    (ability,) = one_rank.all("call", "overlap_open", SETTINGS)
    assert reason in ability.refusal


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_linear_attention_is_refused_and_runs_whole(two_ranks, strategy):
    two_ranks.build("hybrid", strategy=strategy)
    for ability in two_ranks.all("call", "overlap_open", SETTINGS):
        assert "qwen3_next" in ability.refusal
    scripts = [script(np.random.default_rng(2), "whole", rank=1)]
    settings = in_step(2, mode="sequence")
    assert largest(play(two_ranks, scripts, settings), full(two_ranks, scripts)) <= 1e-4
