"""The schedule of the actor's calls against ranks that keep books of their own: what arrives, where, in which order."""

import random
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.actor_calls import Extras, Row, SequenceKey
from darts.overlap import Growth, OverlapSchedule, checksum


def key(number):
    return SequenceKey(f"uid-{number // 4}", number % 4)


def row(number, start, tokens, prompt=3, last=False):
    return Row(
        key=key(number),
        prompt_tokens=prompt,
        start=start,
        token_ids=np.asarray(tokens, dtype=np.int32),
        last=last,
    )


def grow(schedule, number, start, tokens, chance=0.5, **kwargs):
    schedule.grow(Growth(row(number, start, tokens, **kwargs), chance))


class Ranks:
    """What the actor's ranks have been told; checks each call against the contract."""

    def __init__(self, num_ranks, max_tokens, max_held):
        self.max_tokens, self.max_held = max_tokens, max_held
        self.tokens = [{} for _ in range(num_ranks)]  # of running sequences, by rank
        self.done = [{} for _ in range(num_ranks)]
        self.number = 0
        self.forwarded = 0

    def take(self, calls, step=1):
        assert len(calls) == len(self.tokens)
        whole = any(call.whole for call in calls)
        growing = any(call.growing for call in calls)
        for call, running, done in zip(calls, self.tokens, self.done, strict=True):
            assert (call.step, call.number, call.forward_whole, call.forward_growing) == (
                step, self.number, whole, growing,
            )  # fmt: skip
            for dropped in call.drop:
                assert dropped in running or dropped in done
                running.pop(dropped, None)
                done.pop(dropped, None)
            assert len({row.key for row in (*call.whole, *call.growing)}) == len(call.whole) + len(call.growing)
            for part in call.whole:
                assert part.start == 0
                assert part.last
                done[part.key] = part.token_ids.tolist()
            assert sum(len(part.token_ids) for part in call.whole) <= self.max_tokens or len(call.whole) == 1
            if call.growing:
                widest = max(len(part.token_ids) for part in call.growing)
                deepest = max(len(running.get(part.key, ())) * (part.start > 0) for part in call.growing)
                if len(call.growing) > 1:
                    assert len(call.growing) * widest <= self.max_tokens
                    assert len(call.growing) * (deepest + widest) <= self.max_held
            for part in call.growing:
                known = running.pop(part.key, []) if part.start else []
                assert part.start == len(known)
                (done if part.last else running)[part.key] = known + part.token_ids.tolist()
            assert sum(map(len, running.values())) <= self.max_held
            self.forwarded += sum(len(part.token_ids) for part in (*call.whole, *call.growing))
        self.number += 1

    def drain(self, schedule):
        while (calls := schedule.next_call()) is not None:
            self.take(calls)

    def all_done(self):
        return {key: tokens for done in self.done for key, tokens in done.items()}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    num_ranks=st.integers(1, 4),
    sequences=st.integers(1, 12),
    max_tokens=st.integers(60, 200),
    max_cache=st.sampled_from([0, 120, 160, 400, 10_000]),
)
def test_every_token_of_what_is_kept_arrives_once_and_in_order(seed, num_ranks, sequences, max_tokens, max_cache):
    dice = random.Random(seed)
    schedule = OverlapSchedule(1, num_ranks, max_tokens, max_cache)
    ranks = Ranks(num_ranks, max_tokens, max_cache // 2)
    full = {number: [dice.randrange(99) for _ in range(dice.randint(4, 60))] for number in range(sequences)}
    told, dropped = dict.fromkeys(full, 0), set()
    while open_ := [n for n in full if n not in dropped and told[n] < len(full[n])]:
        number = dice.choice(open_)
        if dice.random() < 0.05:
            dropped.add(number)
            schedule.drop(key(number))
            continue
        start = told[number]
        end = min(len(full[number]), max(start + dice.randint(1, 20), 3))
        told[number] = end
        grow(schedule, number, start, full[number][start:end], dice.choice([0.0, 0.3, 0.9, 1.0]),
             last=end == len(full[number]))  # fmt: skip
        if dice.random() < 0.4 and (calls := schedule.next_call()) is not None:
            ranks.take(calls)
    kept = [number for number in full if number not in dropped and dice.random() < 0.7]
    schedule.keep_only([key(number) for number in kept])
    ranks.drain(schedule)
    assert ranks.all_done() == {key(number): full[number] for number in kept}
    assert not any(ranks.tokens)
    by_rank = schedule.complete([key(number) for number in full])
    assert by_rank == [sorted(done, key=list(map(key, full)).index) for done in ranks.done]
    for number in full:
        expected = checksum(np.array(full[number], dtype=np.int32)) if number in kept else None
        assert schedule.checksum(key(number)) == expected


def test_complete_sequences_alone_in_mode_sequence():
    schedule = OverlapSchedule(1, 1, 100, 0)
    grow(schedule, 0, 0, range(10))
    assert schedule.next_call() is None
    grow(schedule, 0, 10, range(5), last=True)
    (call,) = schedule.next_call()
    assert [part.token_ids.tolist() for part in call.whole] == [[*range(10), *range(5)]]
    assert not call.growing


def test_prefixes_continue_where_they_began():
    schedule = OverlapSchedule(1, 2, 100, 1000)
    grow(schedule, 0, 0, range(10))
    grow(schedule, 1, 0, range(10))
    first, second = schedule.next_call()
    assert ([r.key for r in first.growing], [r.key for r in second.growing]) == ([key(0)], [key(1)])
    grow(schedule, 1, 10, [7, 8])
    grow(schedule, 0, 10, [9], last=True)
    first, second = schedule.next_call()
    assert [(r.start, r.last, r.token_ids.tolist()) for r in first.growing] == [(10, True, [9])]
    assert [(r.start, r.last, r.token_ids.tolist()) for r in second.growing] == [(10, False, [7, 8])]


def test_an_end_may_have_no_tokens():
    schedule = OverlapSchedule(1, 1, 100, 1000)
    grow(schedule, 0, 0, range(10))
    schedule.next_call()
    grow(schedule, 0, 10, [], last=True)
    (call,) = schedule.next_call()
    assert [(len(part.token_ids), part.last) for part in call.growing] == [(0, True)]
    assert schedule.complete([key(0)]) == [[key(0)]]


def test_the_likeliest_come_first():
    schedule = OverlapSchedule(1, 1, 25, 0)
    for number, chance in enumerate([0.2, 1.0, 0.0, 0.9]):
        grow(schedule, number, 0, range(12), chance, last=True)
    order = []
    while (calls := schedule.next_call()) is not None:
        order.append([part.key for part in calls[0].whole])
    assert order == [[key(1), key(3)], [key(0)]], "and what cannot be kept is not computed"
    schedule.keep_only([key(2)])
    (call,) = schedule.next_call()
    assert [part.key for part in call.whole] == [key(2)], "unless it is kept after all"
    assert set(call.drop) == {key(0), key(1), key(3)}


def test_a_full_cache_waits_and_forwards_nothing_twice():
    schedule = OverlapSchedule(1, 1, 100, 60)  # 30 tokens of prefixes
    ranks = Ranks(1, 100, 30)
    for number in range(3):
        grow(schedule, number, 0, range(14))
    ranks.take(schedule.next_call())
    while (calls := schedule.next_call()) is not None:
        ranks.take(calls)
    assert set(ranks.tokens[0]) == {key(0), key(1)}, "two of three fit"
    grow(schedule, 0, 14, range(10))
    assert schedule.next_call() is None, "no room for more of the first"
    schedule.drop(key(1))
    grow(schedule, 0, 24, [], last=True)
    ranks.drain(schedule)
    assert ranks.done[0][key(0)] == [*range(14), *range(10)]
    grow(schedule, 2, 14, [1], last=True)
    ranks.drain(schedule)
    assert ranks.all_done() == {key(0): [*range(14), *range(10)], key(2): [*range(14), 1]}
    assert ranks.forwarded == 14 * 3 + 10 + 1
    assert schedule.restarted_tokens == 0


def test_ranks_get_equal_shares():
    schedule = OverlapSchedule(1, 4, 1000, 100_000)
    dice = random.Random(0)
    share = defaultdict(int)
    for number in range(64):
        grow(schedule, number, 0, range(dice.randint(10, 100)), last=True)
        if number % 5 == 4:
            for rank, call in enumerate(schedule.next_call()):
                share[rank] += sum(len(part.token_ids) for part in call.whole)
    assert max(share.values()) < 1.2 * min(share.values())


def test_a_sequence_that_begins_again_stays_on_its_rank():
    schedule = OverlapSchedule(1, 2, 100, 1000)
    grow(schedule, 0, 0, range(10))
    schedule.next_call()
    grow(schedule, 0, 0, [5, 6, 7, 8], last=True)
    first, second = schedule.next_call()
    assert [part.token_ids.tolist() for part in first.whole] == [[5, 6, 7, 8]]
    assert not second.whole
    assert schedule.restarted_tokens == 10
    assert schedule.checksum(key(0)) == checksum(np.array([5, 6, 7, 8], dtype=np.int32))


def test_nothing_is_heard_of_a_dropped_one():
    schedule = OverlapSchedule(1, 1, 100, 1000)
    grow(schedule, 0, 0, range(10))
    schedule.next_call()
    schedule.drop(key(0))
    grow(schedule, 0, 10, [1])  # an abort that races with a chunk
    (call,) = schedule.next_call()
    assert (call.drop, call.growing) == ([key(0)], [])
    assert schedule.next_call() is None
    schedule.drop(key(3))
    assert schedule.next_call() is None, "a rank that has nothing of it is not told"


def test_gaps_and_wrong_settings_are_refused():
    schedule = OverlapSchedule(1, 1, 100, 1000)
    grow(schedule, 0, 0, range(10))
    with pytest.raises(ValueError, match="tokens from 12 on, after 10 tokens"):
        grow(schedule, 0, 12, [1])
    grow(schedule, 0, 10, [1], last=True)
    with pytest.raises(ValueError, match="and the end were reported"):
        grow(schedule, 0, 11, [1])
    for arguments in ((1, 0, 10, 0), (1, 1, 0, 0), (1, 1, 10, -1)):
        with pytest.raises(ValueError, match="must be at least"):
            OverlapSchedule(*arguments)


def test_extras_go_with_the_row_and_are_kept_no_longer():
    schedule = OverlapSchedule(1, 1, 100, 0)
    extras = Extras(position_ids=np.zeros((4, 3)), multi_modal_inputs={})
    held = sys.getrefcount(extras)
    schedule.grow(Growth(replace(row(0, 0, [1, 2, 3], last=True), extras=extras), 1.0))
    grow(schedule, 1, 0, [1, 2], last=True)
    (call,) = schedule.next_call()
    assert [part.extras for part in call.whole] == [extras, None]
    del call
    assert sys.getrefcount(extras) == held, "Ray frees what nobody refers to"


def test_a_checksum_continues():
    tokens = np.arange(50, dtype=np.int32)
    assert checksum(tokens[20:], checksum(tokens[:20])) == checksum(tokens) == checksum(tokens.astype(np.int64))
    assert checksum(tokens) != checksum(tokens[::-1])
