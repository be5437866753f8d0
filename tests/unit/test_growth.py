"""What a worker tells of its candidates: each token once, everything again where it was not what became of it."""

import asyncio

import numpy as np
import pytest

from darts.messages import Extras, Progress, SequenceKey
from darts.overlap.outbox import GrowthOutbox

A, B = SequenceKey("a", 0), SequenceKey("b", 1)
PROMPT = [1, 2, 3]


def taken(outbox):
    return asyncio.run(outbox.take(0.0))


def rows(outbox):
    return [(g.row.start, g.row.token_ids.tolist(), g.row.last, g.chance) for g in taken(outbox).growths]


def test_chunks_and_what_is_left_at_the_end():
    outbox = GrowthOutbox(growing=True)
    outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
    outbox.grow(A, PROMPT, 2, [6], 0.6)
    assert rows(outbox) == [(0, [1, 2, 3, 4, 5], False, 0.5), (5, [6], False, 0.6)]
    outbox.finish(A, PROMPT, [4, 5, 6, 7], 1.0)
    assert rows(outbox) == [(6, [7], True, 1.0)]
    outbox.grow(A, PROMPT, 3, [7], 0.5)  # a chunk that was late
    outbox.finish(A, PROMPT, [4, 5, 6, 7], 1.0)
    assert rows(outbox) == []


def test_tokens_are_int32_and_know_their_prompt():
    outbox = GrowthOutbox(growing=True)
    outbox.grow(A, PROMPT, 0, [4], 0.5)
    (growth,) = taken(outbox).growths
    assert growth.row.token_ids.dtype == np.int32
    assert growth.row.prompt_tokens == 3


def test_an_end_at_a_chunk_has_no_tokens_left():
    outbox = GrowthOutbox(growing=True)
    outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
    outbox.finish(A, PROMPT, [4, 5], 0.9)
    assert rows(outbox)[1] == (5, [], True, 0.9)


def test_a_response_that_became_another_begins_again():
    for response in ([4, 9, 6], [4], []):
        outbox = GrowthOutbox(growing=True)
        outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
        outbox.finish(A, PROMPT, response, 0.9)
        assert rows(outbox)[1] == (0, PROMPT + response, True, 0.9)
    changed_prompt = GrowthOutbox(growing=True)
    changed_prompt.grow(A, PROMPT, 0, [4, 5], 0.5)
    changed_prompt.finish(A, [0, 2, 3], [4, 5, 6], 0.9)
    assert rows(changed_prompt)[1] == (0, [0, 2, 3, 4, 5, 6], True, 0.9)


def test_a_gap_waits_for_the_end():
    outbox = GrowthOutbox(growing=True)
    outbox.grow(A, PROMPT, 2, [6], 0.5)
    assert rows(outbox) == []
    outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
    outbox.grow(A, PROMPT, 4, [8], 0.5)
    outbox.finish(A, PROMPT, [4, 5, 6, 7, 8], 1.0)
    assert rows(outbox) == [(0, [1, 2, 3, 4, 5], False, 0.5), (5, [6, 7, 8], True, 1.0)]


def test_ends_alone_in_mode_sequence():
    outbox = GrowthOutbox(growing=False)
    outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
    outbox.finish(A, PROMPT, [4, 5], 0.5)
    assert rows(outbox) == [(0, [1, 2, 3, 4, 5], True, 0.5)]


EXTRAS = Extras(position_ids=np.zeros((4, 5), dtype=np.int32), multi_modal_inputs={})


@pytest.mark.parametrize("growing", [False, True])
def test_extras_come_with_the_whole_sequence(growing):
    outbox = GrowthOutbox(growing=growing)
    outbox.grow(A, PROMPT, 0, [4], 0.5)
    outbox.finish(A, PROMPT, [4, 5], 0.9, lambda: EXTRAS)
    *before, whole = taken(outbox).growths
    assert len(before) == growing
    assert (whole.row.start, whole.row.token_ids.tolist(), whole.row.last) == (0, [1, 2, 3, 4, 5], True)
    assert whole.row.extras is EXTRAS


def test_extras_are_not_made_of_what_is_not_told():
    """They cost the processor's time."""

    def made():
        raise AssertionError("nobody wants them")

    outbox = GrowthOutbox(growing=False)
    outbox.drop(A)
    outbox.finish(A, PROMPT, [4], 0.5, made)
    outbox.finish(B, PROMPT, [4], 0.5)
    outbox.finish(B, PROMPT, [4], 0.5, made)  # again
    (growth,) = taken(outbox).growths
    assert growth.row.extras is None


def test_what_a_group_keeps_is_told_once():
    outbox = GrowthOutbox(growing=True)
    outbox.keep([A, B])
    assert taken(outbox).kept == [A, B]
    assert taken(outbox).kept == []


def test_drops_are_told_once_and_only_of_what_was_told():
    outbox = GrowthOutbox(growing=True)
    outbox.grow(A, PROMPT, 0, [4, 5], 0.5)
    outbox.drop(A)
    outbox.drop(A)
    outbox.drop(B)
    outbox.grow(A, PROMPT, 2, [6], 0.5)
    outbox.finish(B, PROMPT, [4], 0.5)
    progress = taken(outbox)
    assert progress.dropped == [A]
    assert [g.row.key for g in progress.growths] == [A]
    assert taken(outbox).dropped == []


def test_a_wait_ends_with_reports_time_or_the_end():
    async def main():
        outbox = GrowthOutbox(growing=True)
        assert await outbox.take(0.01) == Progress()
        waiting = asyncio.ensure_future(outbox.take(30))
        await asyncio.sleep(0)
        outbox.grow(A, PROMPT, 0, [4], 0.5)
        assert len((await asyncio.wait_for(waiting, 100)).growths) == 1
        waiting = asyncio.ensure_future(outbox.take(30))
        await asyncio.sleep(0)
        outbox.end()
        assert (await asyncio.wait_for(waiting, 100)).ended
        return await outbox.take(0.0)

    assert asyncio.run(main()).ended
