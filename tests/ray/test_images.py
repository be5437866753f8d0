"""A worker whose model has a processor: what it tells of complete responses is what verl puts into the batch."""

import asyncio

import numpy as np
import pytest
import ray
import torch
import vision
from fakes import Turn
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from worker_bench import Bench

from darts.messages import Extras
from darts.overlap.images import SharedInputs
from darts.overlap.join import sequence_keys
from verl_patches.row_extras import fetch

LENGTHS = (3, 6, 9, 12, 15, 18)


@register("picture_agent")
class PictureLoop(AgentLoopBase):
    """One answer to a picture that the prompt names; every candidate opens a picture of its own."""

    def __init__(self, **parts):
        self.server_manager = parts["server_manager"]

    async def run(self, sampling_params, priority, picture, **kwargs):
        images = [] if picture is None else [vision.picture(np.random.default_rng(picture), 2, 3)]
        prompt = [7, *(token for image in images for token in vision.span(image)), 8]
        answer = await self.server_manager.generate(
            request_id=str(priority), prompt_ids=prompt, sampling_params=sampling_params, priority=int(priority)
        )
        return AgentLoopOutput(
            prompt_ids=prompt, response_ids=answer.token_ids, response_mask=[1] * len(answer.token_ids),
            multi_modal_data={"images": images} if images else {}, metrics=AgentLoopMetrics(), num_turns=2,
        )  # fmt: skip


@pytest.fixture
def told(local_ray, make_config):
    """A rollout of three prompts, the last without a picture: the batch, and what was told of it."""
    test = Bench(make_config("darts.overlap.mode=token", "darts.streaming.chunk_tokens=2"))
    test.worker.processor = vision.make_processor(vision.make_tokenizer())
    test.script([[Turn(length, delay=0.3) for length in LENGTHS]] * 3)
    pictures = np.array([1, 2, None], dtype=object)
    batch, _ = test.run([len(LENGTHS)] * 3, agent_name=np.array(["picture_agent"] * 3), picture=pictures)
    progress = asyncio.run(test.worker.take_growth(test.number, 0.0))
    assert progress.ended
    assert not test.worker._outbox.growing
    return batch, progress


def test_complete_responses_are_told_with_what_verl_computes_for_the_batch(told):
    batch, progress = told
    rows = {growth.row.key: growth.row for growth in progress.growths}
    assert len(rows) == len(progress.growths)
    assert all(row.start == 0 and row.last for row in rows.values()), "nothing grows"
    assert rows.keys() - set(progress.dropped) == set(sequence_keys(batch))
    for at, key in enumerate(sequence_keys(batch)):
        mask = batch.batch["attention_mask"][at].bool()
        assert rows[key].token_ids.tolist() == batch.batch["input_ids"][at][mask].tolist()
        (extras,) = fetch([rows[key].extras])
        assert extras.position_ids.tolist() == batch.batch["position_ids"][at][:, mask].tolist()
        inputs = batch.non_tensor_batch["multi_modal_inputs"][at]
        assert bool(inputs) == (key.uid != "uid-2")
        assert extras.multi_modal_inputs.keys() == inputs.keys()
        assert all(torch.equal(value, inputs[name]) for name, value in extras.multi_modal_inputs.items())


def test_candidates_of_a_prompt_share_their_picture(told):
    _, progress = told
    refs = {}
    for growth in progress.growths:
        refs.setdefault(growth.row.key.uid, []).append(growth.row.extras.multi_modal_inputs)
    assert len(set(refs["uid-0"])) == len(set(refs["uid-1"])) == 1
    assert refs["uid-0"][0] != refs["uid-1"][0]
    assert not any(refs["uid-2"])
    assert min(map(len, refs.values())) >= 4


def test_another_picture_is_not_shared(local_ray):
    shared = SharedInputs()
    first, same, other, more, odd = (
        shared.put(Extras(position_ids=np.zeros((4, 2)), multi_modal_inputs=inputs)).multi_modal_inputs
        for inputs in (
            {"pixel_values": torch.zeros(4)},
            {"pixel_values": torch.zeros(4)},
            {"pixel_values": torch.ones(4)},
            {"pixel_values": torch.zeros(4), "image_grid_thw": torch.ones(1, 3)},
            {"pixel_values": [torch.zeros(4)]},
        )
    )
    assert first == same
    assert len({first, other, more, odd}) == 4


@ray.remote
class Elsewhere:
    """A worker in a process of its own."""

    def put(self, inputs):
        self.shared = SharedInputs()
        extras = Extras(position_ids=np.arange(8).reshape(4, 2), multi_modal_inputs=inputs)
        return [self.shared.put(extras) for _ in range(3)]


@ray.remote
def forwarded(extras):
    """As a rank: what it gets, and how many copies of the picture."""
    values = fetch(extras)
    return values[0], len({id(one.multi_modal_inputs) for one in values})


def test_pixels_do_not_pass_through_the_process_between(local_ray):
    worker = Elsewhere.remote()
    pixels = torch.rand(1000, 1000)
    told = ray.get(worker.put.remote({"pixel_values": pixels}))
    assert all(isinstance(ref, ray.ObjectRef) for one in told for ref in (one.position_ids, one.multi_modal_inputs))
    values, copies = ray.get(forwarded.remote(told))
    assert copies == 1
    assert values.position_ids.tolist() == np.arange(8).reshape(4, 2).tolist()
    assert torch.equal(values.multi_modal_inputs["pixel_values"], pixels)
    ray.kill(worker)
