"""Order, drops, restarts, memory and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from actor_cases import (
    SETTINGS,
    cached_tensors,
    calls_of,
    collect,
    extend,
    forwards,
    full,
    in_step,
    largest,
    mfu,
    num_parameters,
    script,
    share_no_sequences,
    share_sequences,
    watch_forwards,
)
from actor_ranks import VOCABULARY, RankError

from darts.messages import RankCall, SequenceKey


@pytest.fixture(scope="module")
def engines(one_rank, two_ranks):
    for group in (one_rank, two_ranks):
        group.build("qwen3")


@pytest.fixture
def opened(engines, group):
    """A step that is open; the group has what `open` answered in `ability`."""
    group.ability = group.all("call", "overlap_open", SETTINGS)[0]
    return group


def only(group, number, *, step=1, rank=0, drop=(), whole=(), growing=()):
    """A call with work for one rank and company for the others."""
    call = RankCall(step=step, number=number)
    return [
        replace(call, drop=list(drop), whole=list(whole), growing=list(growing)) if at == rank else call
        for at in range(group.size)
    ]


@pytest.fixture
def one():
    return script(np.random.default_rng(0), "one", prompt=5, response=25, pieces=[10, 10, 10])


def test_bytes_are_exact_and_fall_at_once(opened):
    """Drops, restarts and ends free prefixes within the call; others are not touched."""
    random = np.random.default_rng(3)
    kept = script(random, "kept", prompt=5, response=25, pieces=[12, 10, 8])
    dropped = script(random, "dropped", prompt=6, response=44, pieces=[30, 20])
    restarted = script(random, "restarted", prompt=6, response=30, pieces=[20, 10, 6])
    size = opened.ability.bytes_per_token
    assert size == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32

    first = extend(opened, only(opened, 0, growing=[kept.row(0), dropped.row(0), restarted.row(0)]))[0]
    assert first.cache_bytes == (11 + 29 + 19) * size
    assert first.tokens == 11 + 29 + 19
    assert first.peak_cache_bytes == first.cache_bytes + 3 * 29 * size  # with the padded batch
    second = extend(opened, only(opened, 1, drop=[dropped.key], growing=[kept.row(1), restarted.row(0)]))[0]
    assert second.cache_bytes == (21 + 19) * size
    assert second.tokens == 10 + 19
    gone = extend(opened, only(opened, 2, drop=[restarted.key, SequenceKey("unknown", 3)]))[0]
    assert (gone.cache_bytes, gone.tokens) == (21 * size, 0)
    assert opened.all("run", cached_tensors)[0] == 21 * size
    last = extend(opened, only(opened, 3, growing=[kept.row(2)]))[0]
    assert last.cache_bytes == 0
    assert last.peak_cache_bytes >= second.peak_cache_bytes

    found = collect(opened, 1, [kept.key, dropped.key, restarted.key])
    assert largest(found, full(opened, [kept])) <= 1e-4  # the others are left out
    opened.all("call", "overlap_clear", 1)
    assert set(opened.all("run", cached_tensors)) == {0}


def test_ranks_say_what_the_first_update_and_a_forward_will_take(opened):
    """Two moments of each parameter in float32 over all ranks; of the parameters, what is gathered at once."""
    number = opened.all("run", num_parameters)[0]  # FSDP2: of the whole model, on each rank
    abilities = opened.all("call", "overlap_open", SETTINGS)
    assert sum(ability.optimizer_bytes for ability in abilities) == 2 * 4 * number
    assert all(2 * VOCABULARY * 32 * 4 < ability.gathered_bytes <= 4 * number for ability in abilities)


def test_restarted_sequence_begins_anew(opened):
    """Other tokens under the same key: in growing rows, finished or not, and as a whole."""
    random = np.random.default_rng(4)
    first = script(random, "a", prompt=5, response=25, pieces=[20, 10])
    second = script(random, "a", prompt=8, response=12, pieces=[9, 11])
    third = script(random, "a", prompt=2, response=17)
    extend(opened, only(opened, 0, growing=[first.row(0)]))
    extend(opened, only(opened, 1, growing=[second.row(0)]))
    extend(opened, only(opened, 2, growing=[second.row(1)]))
    assert largest(collect(opened, 1, [first.key]), full(opened, [second])) <= 1e-4
    report = extend(opened, only(opened, 3, whole=[third.row(0)]))[0]
    assert report.cache_bytes == 0
    assert largest(collect(opened, 1, [first.key]), full(opened, [third])) <= 1e-4


def test_unfinished_sequences_have_no_results(opened, one):
    extend(opened, only(opened, 0, growing=[one.row(0)]))
    assert collect(opened, 1, [one.key]) == {}
    extend(opened, only(opened, 1, growing=[one.row(1)]))
    extend(opened, only(opened, 2, growing=[one.row(2)]))
    for _ in range(2):  # asked twice
        assert largest(collect(opened, 1, [one.key]), full(opened, [one])) <= 1e-4


def test_company_leaves_no_trace(two_ranks, engines, one):
    two_ranks.all("call", "overlap_open", in_step(1, with_reference=False))
    for number in range(3):
        report = extend(two_ranks, only(two_ranks, number, growing=[one.row(number)]))[1]
        assert (report.cache_bytes, report.tokens) == (0, 0)
        assert report.peak_cache_bytes > 0  # its forwards took room all the same
    answers = two_ranks.all("call", "overlap_collect", 1, [one.key])
    assert [list(answer.values) for answer in answers] == [[one.key], []]
    assert answers[1].mfu == 0.0


def test_nothing_survives_open(opened, one):
    extend(opened, only(opened, 0, growing=[one.row(0)]))
    opened.all("call", "overlap_open", in_step(2))
    report = extend(opened, only(opened, 0, step=2))[0]
    assert (report.cache_bytes, report.peak_cache_bytes, report.tokens) == (0, 0, 0)
    with pytest.raises(RankError, match="continues at token 10, but here it is unknown"):
        extend(opened, only(opened, 1, step=2, growing=[one.row(1)]))
    assert collect(opened, 2, [one.key]) == {}


def test_calls_out_of_order_are_refused_and_change_nothing(opened, one):
    extend(opened, only(opened, 0, growing=[one.row(0)]))
    other = replace(one.row(1), prompt_tokens=6)
    for wrong, why in [
        (only(opened, 2, growing=[one.row(1)]), "call 2 of step 1 came, call 1 is next"),
        (only(opened, 0, growing=[one.row(1)]), "call 0 of step 1 came, call 1 is next"),
        (only(opened, 1, step=9, growing=[one.row(1)]), "a call of step 9 came, the actor is open for step 1"),
        (only(opened, 1, growing=[one.row(2)]), "continues at token 20, but here it is at 10 tokens"),
        (only(opened, 1, growing=[one.row(1), one.row(1)]), "two rows in one call"),
        (only(opened, 1, growing=[other]), "prompts of 5 and 6 tokens"),
        (only(opened, 1, drop=[one.key], growing=[one.row(1)]), "here it is unknown"),
        (only(opened, 1, whole=[one.row(0)]), "whole row with start=0, last=False"),
    ]:
        with pytest.raises(RankError, match=why) as refused:
            extend(opened, wrong)
        assert str(refused.value).count("RuntimeError: ") == 2 * opened.size  # all ranks, none waits for another
    extend(opened, only(opened, 1, growing=[one.row(1)]))
    extend(opened, only(opened, 2, growing=[one.row(2)]))
    with pytest.raises(RankError, match="here it is finished"):
        extend(opened, only(opened, 3, growing=[replace(one.row(2), start=30)]))
    assert largest(collect(opened, 1, [one.key]), full(opened, [one])) <= 1e-4


def test_ranks_that_share_sequences_refuse_together(two_ranks, engines, one):
    """Extras may be gone on one of them alone."""
    two_ranks.all("call", "overlap_open", SETTINGS)
    two_ranks.all("run", share_sequences)
    try:
        with pytest.raises(RankError, match="continues at token 10") as refused:
            extend(two_ranks, only(two_ranks, 0, rank=1, growing=[one.row(1)]))
    finally:
        two_ranks.all("run", share_no_sequences)
    assert "another rank has refused this call" in str(refused.value)


def test_whole_rows_are_one_micro_batch_and_company_is_one_row(opened):
    random = np.random.default_rng(9)
    scripts = [script(random, f"s{at}", prompt=9, response=30 + at) for at in range(5)]
    opened.all("run", watch_forwards)
    extend(opened, only(opened, 0, whole=[one.row(0) for one in scripts]))
    assert opened.all("run", forwards) == [[(5, 43)], [(1, 2)]][: opened.size]
    assert largest(collect(opened, 1, [one.key for one in scripts]), full(opened, scripts)) <= 1e-4


def test_nothing_is_forwarded_for_rows_that_bring_nothing(opened):
    """A prompt of one token has no log-probs, and an end may come alone."""
    one = script(np.random.default_rng(9), "one", prompt=1, response=8, pieces=[1, 8, 0])
    opened.all("run", watch_forwards)
    for number in range(3):
        extend(opened, only(opened, number, growing=[one.row(number)]))
    assert opened.all("run", forwards) == [[(1, 8)], [(1, 2)]][: opened.size]
    assert largest(collect(opened, 1, [one.key]), full(opened, [one])) <= 1e-4


def test_refused_outside_a_step(opened, one):
    opened.all("call", "overlap_clear", 1)
    opened.all("call", "overlap_clear", 1)  # nothing to clear
    for method, args in [("overlap_extend", (only(opened, 0)[0],)), ("overlap_collect", (1, [one.key]))]:
        with pytest.raises(RankError, match="the actor is open for step None"):
            opened.all("call", method, *args)
    with pytest.raises(RankError, match="neither 'sequence' nor 'token'"):
        opened.all("call", "overlap_open", replace(SETTINGS, mode="both"))
    with pytest.raises(RankError, match="needs a reference in the actor's process"):
        opened.all("call", "overlap_open", replace(SETTINGS, with_reference=True))


def test_growing_rows_need_mode_token(opened, one):
    opened.all("call", "overlap_open", in_step(1, mode="sequence"))
    with pytest.raises(RankError, match="the step's mode is sequence"):
        extend(opened, only(opened, 0, growing=[one.row(0)]))


def test_flops_are_those_of_whole_sequences(opened):
    random = np.random.default_rng(8)
    scripts = [script(random, f"s{at}", response=30, pieces=[], rank=0) for at in range(3)]
    for one in scripts[1:]:
        one.pieces = [one.prompt + 3, 20, 7]
    for calls in calls_of(scripts, opened.size):
        extend(opened, calls)
    found, expected = opened.all("run", mfu, 1e-6)[0]
    assert found == pytest.approx(expected)
    assert found > 0
