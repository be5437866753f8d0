"""The schedule of the actor's calls against ranks that keep books of their own: what arrives, where, in which order."""

import random
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.messages import Extras, Growth, Row, SequenceKey, checksum
from darts.schedule import OverlapSchedule


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

    def __init__(self, num_ranks, max_tokens, max_held, max_rows=None, padded=False):
        self.max_tokens, self.max_held = max_tokens, max_held
        self.max_rows, self.padded = max_rows, padded
        self.tokens = [{} for _ in range(num_ranks)]  # of running sequences, by rank
        self.done = [{} for _ in range(num_ranks)]
        self.number = 0
        self.forwarded = 0

    def bounded(self, lengths):
        """Whether whole rows of these lengths may be one forward."""
        tokens = len(lengths) * max(lengths) if self.padded else sum(lengths)
        return len(lengths) == 1 or (tokens <= self.max_tokens and len(lengths) <= (self.max_rows or len(lengths)))

    def knows(self, name):
        return any(name in known for known in (*self.tokens, *self.done))

    def take(self, calls, step=1):
        assert len(calls) == len(self.tokens)
        assert any(call.whole or call.growing for call in calls), "no call is made to drop alone"
        for call, running, done in zip(calls, self.tokens, self.done, strict=True):
            assert (call.step, call.number) == (step, self.number)
            for dropped in call.drop:
                assert (dropped in running) != (dropped in done)
                running.pop(dropped, None)
                done.pop(dropped, None)
            assert len({row.key for row in (*call.whole, *call.growing)}) == len(call.whole) + len(call.growing)
            for part in call.whole:
                assert (part.start, part.last) == (0, True)
            if call.whole:
                assert self.bounded([len(part.token_ids) for part in call.whole])
            if call.growing:
                widest = max(len(part.token_ids) for part in call.growing)
                deepest = max(len(running.get(part.key, ())) for part in call.growing)
                if len(call.growing) > 1:
                    assert len(call.growing) * widest <= self.max_tokens
                    assert len(call.growing) * (deepest + widest) <= self.max_held
            # The prefixes of rows that end are there until the forward is over.
            new = sum(len(part.token_ids) for part in call.growing if not part.last)
            assert sum(map(len, running.values())) + new <= self.max_held
            for part in (*call.whole, *call.growing):
                assert part.start or not self.knows(part.key), "what a rank had of it is dropped before it begins again"
                known = running.pop(part.key, [])
                assert part.start == len(known)
                (done if part.last else running)[part.key] = known + part.token_ids.tolist()
            self.forwarded += sum(len(part.token_ids) for part in (*call.whole, *call.growing))
        self.number += 1

    def drain(self, schedule):
        while (calls := schedule.next_call()) is not None:
            self.take(calls)

    def all_done(self):
        return {key: tokens for done in self.done for key, tokens in done.items()}


@settings(max_examples=400)
@given(
    seed=st.integers(0, 1 << 32),
    num_ranks=st.integers(1, 4),
    sequences=st.integers(1, 12),
    max_tokens=st.integers(60, 200),
    max_cache=st.sampled_from([0, 120, 160, 400, 10_000]),
    max_rows=st.sampled_from([None, 1, 2, 3]),
    padded=st.booleans(),
)
def test_every_token_of_what_is_kept_arrives_in_order_within_the_bounds(
    seed, num_ranks, sequences, max_tokens, max_cache, max_rows, padded
):
    dice = random.Random(seed)
    schedule = OverlapSchedule(1, num_ranks, max_tokens, max_cache, max_rows=max_rows, padded=padded)
    ranks = Ranks(num_ranks, max_tokens, max_cache // 2, max_rows, padded)
    full = {number: [dice.randrange(99) for _ in range(dice.randint(4, 60))] for number in range(sequences)}
    told, chances = dict.fromkeys(full, 0), {}
    dropped, sure, restarted = set(), set(), set()

    def call():
        calls = schedule.next_call()
        if calls is not None:
            ranks.take(calls)
        for number in chances.keys() - dropped - restarted:
            if chances[number] and told[number] == len(full[number]) and not ranks.knows(key(number)):
                assert calls is not None
                for call in calls:  # it was left out, since no rank has room for it
                    assert not ranks.bounded([len(part.token_ids) for part in call.whole] + [len(full[number])])

    while open_ := [n for n in full if n not in dropped and told[n] < len(full[n])]:
        number = dice.choice(open_)
        if dice.random() < 0.05:
            dropped.add(number)
            schedule.drop(key(number))
            continue
        if dice.random() < 0.05:
            schedule.keep(key(number))
            sure.update({number} & chances.keys())
        if told[number] and dice.random() < 0.05:
            told[number], full[number] = 0, full[number][::-1]
            restarted.add(number)
        start = told[number]
        end = min(len(full[number]), max(start + dice.randint(1, 20), 3))
        told[number] = end
        chance = dice.choice([0.0, 0.3, 0.9, 1.0])
        chances[number] = 1.0 if number in sure else chance
        grow(schedule, number, start, full[number][start:end], chance, last=end == len(full[number]))
        if dice.random() < 0.4:
            call()
    kept = [number for number in full if number not in dropped and dice.random() < 0.7]
    schedule.keep_only([key(number) for number in kept])
    ranks.drain(schedule)
    found = ranks.all_done()
    assert {number: found[key(number)] for number in kept} == {number: full[number] for number in kept}
    by_rank = schedule.complete([key(number) for number in full])
    for names, done in zip(by_rank, ranks.done, strict=True):
        assert names == [key(number) for number in kept if key(number) in done]
    assert restarted or not schedule.restarted_tokens
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


def test_of_the_equally_likely_the_shallow_go_together():
    """A forward pads each row to the deepest: next to a deep one there is room for few."""
    schedule = OverlapSchedule(1, 1, 100, 200)
    grow(schedule, 0, 0, range(40))
    schedule.next_call()
    grow(schedule, 0, 40, range(5))
    for number in (1, 2, 3, 4):
        grow(schedule, number, 0, range(10))
    assert [[part.key for part in schedule.next_call()[0].growing] for _ in range(2)] == [
        [key(1), key(2), key(3), key(4)],
        [key(0)],
    ]


def test_what_a_group_keeps_is_certain_whatever_was_or_will_be_said():
    schedule = OverlapSchedule(1, 1, 12, 0)
    grow(schedule, 0, 0, range(12), 0.9, last=True)
    grow(schedule, 1, 0, range(12), 0.0, last=True)  # truncated
    grow(schedule, 2, 0, range(10), 0.4)
    grow(schedule, 3, 0, range(12), 1.0, last=True)
    schedule.drop(key(3))
    for number in (1, 2, 3, 4):  # 3 is dropped, and of 4 nothing is known
        schedule.keep(key(number))
    grow(schedule, 2, 0, range(11), 0.0)  # from its beginning, again
    grow(schedule, 2, 11, range(1), 0.0, last=True)
    grow(schedule, 4, 0, range(12), 0.0, last=True)
    order = []
    while (calls := schedule.next_call()) is not None:
        order += [part.key for part in calls[0].whole]
    assert order == [key(1), key(2), key(0)]


def test_whole_rows_are_bounded_as_the_forward_computes_them():
    def first_call(lengths, **bounds):
        schedule = OverlapSchedule(1, 1, 100, 0, **bounds)
        for number, length in enumerate(lengths):
            grow(schedule, number, 0, range(length), last=True)
        return [len(part.token_ids) for part in schedule.next_call()[0].whole]

    lengths = [60, 10, 20, 10, 5]
    assert first_call(lengths) == [60, 10, 20, 10]
    assert first_call(lengths, padded=True) == [60], "two rows of 60"
    assert first_call(lengths[1:], padded=True) == [10, 20, 10, 5]
    assert first_call(lengths, max_rows=3) == [60, 10, 20]
    assert first_call([120, 1], padded=True, max_rows=1) == [120], "a single row always goes"


def test_one_that_begins_goes_where_there_is_room():
    schedule = OverlapSchedule(1, 2, 100, 0)
    for number, length in enumerate([50, 200]):
        grow(schedule, number, 0, range(length), last=True)
    schedule.next_call()
    for number, length in enumerate([90, 20, 10], start=2):
        grow(schedule, number, 0, range(length), last=True)
    first, second = schedule.next_call()
    assert [part.key for part in first.whole] == [key(2), key(4)]
    assert [part.key for part in second.whole] == [key(3)], "the other was given less, but is full in this call"


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
    grow(schedule, 3, 0, range(20), 0.1, last=True)
    ranks.take(schedule.next_call())
    assert list(ranks.done[0]) == [key(3)], "the whole of another needs no cache"
    schedule.drop(key(1))
    grow(schedule, 0, 24, [], last=True)
    ranks.drain(schedule)
    assert ranks.done[0][key(0)] == [*range(14), *range(10)]
    grow(schedule, 2, 14, [1], last=True)
    ranks.drain(schedule)
    assert ranks.all_done() == {key(0): [*range(14), *range(10)], key(2): [*range(14), 1], key(3): [*range(20)]}
    assert ranks.forwarded == 14 * 3 + 10 + 1 + 20
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


def test_one_that_begins_again_leaves_its_room_to_others_at_once():
    """The prefix that is void goes with the call in which another takes its room, also if the new beginning waits."""
    schedule, ranks = OverlapSchedule(1, 1, 100, 40), Ranks(1, 100, 20)
    grow(schedule, 0, 0, range(20))
    ranks.take(schedule.next_call())
    grow(schedule, 0, 0, [9, 8, 7], chance=0.0)
    grow(schedule, 1, 0, range(20))
    ranks.take(schedule.next_call())
    assert list(ranks.tokens[0]) == [key(1)]
    schedule.drop(key(0))
    grow(schedule, 2, 0, range(5), last=True)
    ranks.take(schedule.next_call())


def test_nothing_is_heard_of_a_dropped_one():
    schedule = OverlapSchedule(1, 1, 100, 1000)
    grow(schedule, 0, 0, range(10))
    schedule.next_call()
    schedule.drop(key(0))
    grow(schedule, 0, 10, [1])  # an abort that races with a chunk
    assert schedule.next_call() is None, "no call is made to drop alone"
    schedule.drop(key(3))
    grow(schedule, 1, 0, range(10))
    (call,) = schedule.next_call()
    assert call.drop == [key(0)], "a rank that has nothing of the other is not told"
    assert [part.key for part in call.growing] == [key(1)]
    grow(schedule, 1, 10, [1])
    assert schedule.next_call()[0].drop == [], "told once"


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
    with pytest.raises(ValueError, match="max_rows=0: must be at least 1"):
        OverlapSchedule(1, 1, 10, 0, max_rows=0)


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
