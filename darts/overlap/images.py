"""What a model with a processor takes of a response besides tokens, on its way from an agent-loop worker to a rank.

Contract.
1. `make_extras` asks the methods of verl that fill the batch (`AgentLoopWorker._compute_multi_modal_inputs` and
   `_compute_position_ids`, verl 0.9.1) for the response without padding, which verl's forward does not get either. They
   see nothing but the agent loop's output, so a row of the batch with the same tokens has the same extras: the checksum
   of the tokens is enough for the join.
2. Values are in Ray's object store, and calls carry references: a megapixel image is 25 MB, and no call or process
   between worker and rank has it. Candidates of a prompt that have the same images share them. Ray frees a value with
   the last reference, those of the group at the end of the rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import torch

from darts.messages import Extras

if TYPE_CHECKING:
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker


def make_extras(worker: AgentLoopWorker, output: AgentLoopOutput) -> Extras:
    """The extras of a complete response, as values."""
    input_ids = torch.tensor([[*output.prompt_ids, *output.response_ids]])  # [1, tokens]
    image_inputs = worker._compute_multi_modal_inputs(output, input_ids)
    processor_settings = output.mm_processor_kwargs
    if processor_settings is None:
        processor_settings = worker._get_mm_processor_kwargs((output.multi_modal_data or {}).get("audios"))
    # [1, tokens] or [1, 4, tokens]; takes out of the inputs what positions alone need.
    position_ids = worker._compute_position_ids(input_ids, torch.ones_like(input_ids), image_inputs, processor_settings)
    position_layers = position_ids.reshape(-1, input_ids.shape[1]).to(torch.int32)
    return Extras(position_ids=position_layers.numpy(), multi_modal_inputs=image_inputs)


class SharedInputs:
    """Puts the extras of a prompt's candidates in the object store, inputs once for all that have the same."""

    def __init__(self) -> None:
        self._known: list[tuple[dict[str, Any], ray.ObjectRef]] = []

    def put(self, extras: Extras) -> Extras:
        """The same with references; nobody changes the values any more."""
        image_inputs = extras.multi_modal_inputs
        if image_inputs:
            same_refs = (input_ref for known_inputs, input_ref in self._known if _same(known_inputs, image_inputs))
            input_ref = next(same_refs, None)
            if input_ref is None:
                input_ref = ray.put(image_inputs)
                self._known.append((image_inputs, input_ref))
            image_inputs = input_ref
        return Extras(position_ids=ray.put(extras.position_ids), multi_modal_inputs=image_inputs)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are the same tensors; what else there may be is never taken for the same."""
    return one.keys() == other.keys() and all(
        isinstance(value, torch.Tensor) and isinstance(other[name], torch.Tensor) and torch.equal(value, other[name])
        for name, value in one.items()
    )
