"""What overlapped log-probs of vision models rely on in verl 0.9.1, and what they work around there."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vision
from tensordict import TensorDict
from transformers.modeling_outputs import BaseModelOutputWithPooling
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.protocol import DataProto
from verl.utils import tensordict_utils as tu
from verl.workers.engine import BaseEngine
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.padding import left_right_2_no_padding

from darts.messages import Extras
from darts.overlap.images import make_extras
from darts.overlap.join import _uneven
from verl_patches.log_prob_model import OverlapEngine, jagged_rows
from verl_patches.patches import patch_forward_without_images
from verl_patches.patching import original


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_compute_multi_modal_inputs", ["self", "output", "input_ids"]),
        (
            "_compute_position_ids",
            ["self", "input_ids", "attention_mask", "multi_modal_inputs", "mm_processor_kwargs"],
        ),
        ("_get_mm_processor_kwargs", ["self", "audio_data"]),
    ],
)
def test_methods_that_make_the_inputs(name, expected):
    found = inspect.signature(getattr(AgentLoopWorker, name)).parameters
    assert [parameter for parameter in found if parameter != "_ray_trace_ctx"] == expected  # Ray may have touched it
    assert f"self.{name}(" in inspect.getsource(AgentLoopWorker._agent_loop_postprocess)


@pytest.mark.parametrize("model", vision.MODELS)
def test_without_padding_the_inputs_are_those_of_the_batch(model):
    """The agent loop pads the prompt on the left and the response on the right before it makes them."""
    random = np.random.default_rng(0)
    image = vision.picture(random, 2, 3)
    maker = vision.Maker(model)
    prompt = [7, 8, *vision.span(image), 9]
    for images, begin in (([image], prompt), ([], prompt[:2])):
        output = maker.output([*begin, 10, 11, 12], len(begin), images)
        extras = make_extras(maker, output)
        padded = torch.tensor([[vision.PAD] * 5 + begin + [10, 11, 12] + [vision.PAD] * 4])
        mask = (padded != vision.PAD).long()
        inputs = maker._compute_multi_modal_inputs(output, padded)
        positions = maker._compute_position_ids(padded, mask, inputs)
        assert extras.position_ids.tolist() == positions[0][:, mask[0].bool()].tolist()
        assert extras.multi_modal_inputs.keys() == inputs.keys()
        assert bool(images) == ("pixel_values" in inputs)
        assert all(torch.equal(value, extras.multi_modal_inputs[name]) for name, value in inputs.items())


def test_text_needs_the_patch_and_images_do_not():
    """Delete the patch when the first part fails."""
    from verl.models.transformers import qwen2_vl

    tower = SimpleNamespace(in_channels=3, temporal_patch_size=2, patch_size=4)

    class Visual:
        dtype = torch.float32

        def __call__(self, pixel_values, grid_thw):
            assert grid_thw.tolist() == [[1, 4, 4]]
            return BaseModelOutputWithPooling(pooler_output=torch.ones(4, 8))

    model = SimpleNamespace(
        get_input_embeddings=lambda: torch.nn.Embedding(10, 8),
        config=SimpleNamespace(vision_config=tower, image_token_id=1),
        visual=Visual(),
    )
    with pytest.raises(AttributeError, match="mean"):
        original(qwen2_vl._get_input_embeds)(model, torch.tensor([[2, 3]]))
    assert qwen2_vl.__name__ in sys.modules
    patch_forward_without_images()
    assert not patch_forward_without_images()
    embeds, _ = qwen2_vl._get_input_embeds(model, torch.tensor([[2, 3]]))
    assert embeds.shape == (1, 2, 8)
    embeds, _ = qwen2_vl._get_input_embeds(
        model, torch.tensor([[1, 1, 1, 1, 5]]), None, torch.zeros(16, 96), None, torch.tensor([[1, 4, 4]])
    )
    assert embeds[0, :4].tolist() == torch.ones(4, 8).tolist()


@pytest.mark.parametrize("equally_long", [False, True])
def test_packed_rows_have_their_positions_and_images(equally_long):
    """`use_remove_padding=True` needs flash attention to run; here the inputs are composed only."""
    engine = object.__new__(OverlapEngine)
    engine.pad_to_length = engine.use_ulysses_sp = False
    lengths = [3, 3, 3] if equally_long else [3, 5, 2]
    extras = [
        Extras(
            position_ids=100 * at + np.arange(4 * length).reshape(4, length),
            multi_modal_inputs={"pixel_values": torch.full((2, 6), float(at))} if at else {},
        )
        for at, length in enumerate(lengths)
    ]
    data = jagged_rows([np.full(length, at) for at, length in enumerate(lengths)], extras)
    tu.assign_non_tensor(data, max_token_len_per_gpu=sum(lengths), use_dynamic_bsz=True, temperature=0.7)
    (micro_batch,), (order,) = prepare_micro_batches(data, same_micro_num_in_dp=False)
    inputs, _ = engine.prepare_model_inputs(micro_batch.to("cpu"))
    assert inputs["input_ids"][0].tolist() == [at for at in order for _ in range(lengths[at])]
    expected = np.concatenate([extras[at].position_ids for at in order], axis=1)
    assert inputs["position_ids"][:, 0].tolist() == expected.tolist()
    assert inputs["pixel_values"][:, 0].tolist() == [float(at) for at in order if at for _ in range(2)]


def batch_of(lengths: list[int], layers: int = 4) -> DataProto:
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    positions = torch.arange(6).expand(len(lengths), layers, 6)
    return DataProto.from_dict({"attention_mask": mask, "position_ids": positions if layers > 1 else positions[:, 0]})


def test_positions_of_equally_long_rows_are_lost_by_verl():
    """Delete `darts.overlap.join._uneven` when this fails."""

    def nested(lengths):
        batch = batch_of(lengths).batch.to_dict()
        ones = batch["attention_mask"]
        return left_right_2_no_padding(
            TensorDict(batch | {"input_ids": ones, "response_mask": ones}, batch_size=[len(lengths)])
        )

    assert nested([5, 6])["position_ids"].values().shape == (4, 11)
    equal = nested([6, 6])
    assert equal["position_ids"].values().shape == (8, 6), "rows below each other, not beside each other"
    tu.maybe_fix_3d_position_ids(equal)
    assert equal["position_ids"]._ragged_idx == 2, "and taken for beside each other"
    assert equal["position_ids"].offsets().tolist() == [0, 4, 8]
    assert "maybe_fix_3d_position_ids(data)" in inspect.getsource(BaseEngine.infer_batch)


def test_a_row_of_another_length_goes_with_equally_long_ones():
    assert _uneven(batch_of([4, 5, 4, 6]), np.array([0, 2])).tolist() == [0, 2, 1]
    assert _uneven(batch_of([4, 5, 4, 6]), np.array([0, 1])).tolist() == [0, 1]
    assert _uneven(batch_of([4, 4]), np.array([1])).tolist() == [1], "there is none"
    assert _uneven(batch_of([4, 5], layers=1), np.array([0])).tolist() == [0], "text"
    assert _uneven(batch_of([4, 5]), np.array([], dtype=int)).tolist() == []
