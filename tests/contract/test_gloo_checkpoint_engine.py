"""Weights over gloo between real processes: the bytes, the group, and what happens when a side fails."""

import asyncio

import pytest
import torch
import weight_transfer as wt
from verl.checkpoint_engine import CheckpointEngineRegistry

from verl_patches.weights import gloo
from verl_patches.weights.gloo import GlooCheckpointEngine, WeightTransferError

BUCKET = 4096
F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64
# One is larger than a bucket and two are not a whole number of them; odd sizes move what follows off its alignment.
SIZES = [
    ("embed", (64, 33), F32),
    ("odd", (3,), BF16),
    ("after", (5, 7), F32),
    ("scalar", (), F32),
    ("exactly a bucket", (BUCKET // 2,), BF16),
    ("large", (3, 4099), BF16),
    ("count", (1,), I64),
    ("bytes", (BUCKET - 1,), torch.uint8),
    ("last", (11,), BF16),
]


def test_it_is_verls_backend_of_that_name():
    assert CheckpointEngineRegistry.get("gloo") is GlooCheckpointEngine


@pytest.mark.parametrize(("actors", "receivers"), [(1, 1), (2, 1), (2, 2)])
def test_two_updates_arrive_bit_for_bit_in_order_over_one_group(actors, receivers):
    with wt.members(actors, receivers, BUCKET) as made:
        groups = []
        for seed in (1, 2):
            groups.append({row["group"] for row in wt.connect(made, actors)})
            for member in made[:actors]:
                member.call(wt.send, seed, SIZES)
            for member in made[actors:]:
                member.call(wt.receive)
            assert [member.answer() for member in made[:actors]] == [len(SIZES)] * actors, (
                "every rank walks: collective"
            )
            expected = wt.described(wt.weights_of(seed, SIZES))
            assert [member.answer() for member in made[actors:]] == [expected] * receivers
            for member in made:
                member.call("finalize")
            assert [member.answer() for member in made] == [None] * len(made)
        assert groups[0] == groups[1]
        assert len(groups[0]) == 1


def test_views_arrive_as_what_they_show_and_empty_tensors_do_not():
    sizes = [("a", (5, 9), F32), ("b", (700, 2), BF16)]
    with wt.members(1, 1, BUCKET) as made:
        wt.connect(made, 1)
        made[0].call(wt.send_transposed, 3, sizes)
        made[1].call(wt.receive)
        assert made[0].answer() is None
        assert made[1].answer() == wt.described({n: w.t().contiguous() for n, w in wt.weights_of(3, sizes).items()})
        made[0].call(wt.send, 4, [("nothing", (0, 4), F32), *sizes, ("none", (0,), BF16)])
        made[1].call(wt.receive)
        assert made[1].answer() == wt.described(wt.weights_of(4, sizes))


def test_no_weights_at_all_is_an_update_too():
    with wt.members(1, 1, BUCKET) as made:
        wt.connect(made, 1)
        made[0].call(wt.send, 1, [])
        made[1].call(wt.receive)
        assert made[1].answer() == []


LONG = [(f"w{i}", (BUCKET,), F32) for i in range(400)]
"""More than sockets buffer: who sends must wait for who receives."""


@pytest.mark.parametrize(
    ("sending", "receiving", "fails", "says", "others_hear"),
    [
        pytest.param(
            wt.send,
            wt.receive_and_fail,
            2,
            "vLLM knows no w0",
            "receiver 2: what takes the weights stopped",
            id="server",
        ),
        pytest.param(wt.send_and_fail, wt.receive, 0, "cannot be gathered", "the sender: ValueError", id="trainer"),
    ],
)
def test_a_side_that_fails_ends_the_update_everywhere_and_the_next_one_works(
    sending, receiving, fails, says, others_hear
):
    with wt.members(1, 2, BUCKET) as made:
        before = wt.connect(made, 1)
        made[0].call(sending, 1, LONG)
        made[1].call(wt.receive)
        made[2].call(receiving)
        answers = [member.answer() for member in made]
        assert says in answers.pop(fails)
        assert all(f"failed in another process: {others_hear}" in answer for answer in answers), answers

        after = wt.connect(made, 1)
        assert after[0]["group"] != before[0]["group"]
        made[0].call(wt.send, 2, SIZES)
        made[1].call(wt.receive)
        made[2].call(wt.receive)
        expected = wt.described(wt.weights_of(2, SIZES))
        assert [member.answer() for member in made] == [len(SIZES), expected, expected]


@pytest.mark.parametrize(
    ("dies", "calls"),
    [
        pytest.param(0, [(wt.send_and_die, 1, LONG), (wt.receive,), (wt.receive,)], id="sender"),
        pytest.param(1, [(wt.send, 1, LONG), (wt.receive_and_die,), (wt.receive,)], id="receiver"),
    ],
)
def test_a_process_that_dies_ends_the_update_of_the_others(dies, calls):
    with wt.members(1, 2, BUCKET) as made:
        wt.connect(made, 1)
        for member, call in zip(made, calls, strict=True):
            member.call(*call)
        answers = [member.answer() for rank, member in enumerate(made) if rank != dies]
        assert all("WeightTransferError" in answer and "gone" in answer for answer in answers), answers


def test_silence_ends_at_the_limit(tmp_path):
    """The sender is silent until the receiver has given up."""
    with wt.members(1, 1, BUCKET) as made:
        wt.connect(made, 1)
        made[1].call(wt.limit_silence, 0.5)
        assert made[1].answer() is None
        made[0].call(wt.send_late, 1, SIZES, tmp_path / "given up")
        made[1].call(wt.receive)
        assert "VERL_PATCHES_WEIGHT_TIMEOUT_S" in made[1].answer()
        (tmp_path / "given up").touch()
        assert "failed in another process: receiver 1" in made[0].answer()


def test_a_group_is_made_anew_when_a_member_is_new():
    with wt.members(1, 2, BUCKET) as made:
        first = wt.connect(made[:2], 1)
        second = wt.connect(made, 1)
        assert {row["group"] for row in first}.isdisjoint(row["group"] for row in second)
        made[0].call(wt.send, 1, SIZES)
        made[1].call(wt.receive)
        made[2].call(wt.receive)
        expected = wt.described(wt.weights_of(1, SIZES))
        assert [member.answer() for member in made] == [len(SIZES), expected, expected]


def test_an_update_that_begins_before_the_sender_has_seen_the_last_ones_failure_is_whole(monkeypatch):
    """Both ends live on, as where the driver learns of the failure from the receiver and begins anew at once."""
    sender, receiver = (GlooCheckpointEngine(BUCKET, is_master=is_master) for is_master in (True, False))

    async def connect() -> None:
        sides = GlooCheckpointEngine.build_topology(1, 1, [sender.prepare(), receiver.prepare()])
        rows = [{key: value[0] for key, value in side.items()} for side in sides]
        ends = zip((sender, receiver), rows, strict=True)
        await asyncio.gather(*(asyncio.to_thread(end.init_process_group, **row) for end, row in ends))

    async def updates() -> list[tuple]:
        monkeypatch.setattr(gloo, "POLL_S", float("inf"))  # the sender has not looked yet
        await connect()
        failing = asyncio.ensure_future(wt.send(sender, 1, [(f"w{i}", (BUCKET,), F32) for i in range(2000)]))
        weights = receiver.receive_weights()
        await anext(weights)
        await weights.aclose()
        await connect()
        assert not failing.done(), "there is more than sockets hold"
        whole = asyncio.ensure_future(wt.receive(receiver))
        await wt.send(sender, 2, SIZES)
        received = await whole
        monkeypatch.setattr(gloo, "POLL_S", 0.0)
        with pytest.raises(WeightTransferError, match="failed in another process: receiver 1"):
            await failing
        assert sender.prepare().group is not None, "the new update's group is kept"
        return received

    assert asyncio.run(asyncio.wait_for(updates(), 300)) == wt.described(wt.weights_of(2, SIZES))
