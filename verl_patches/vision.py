"""Vision models of verl 0.9.1, for rows and ranks without images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from verl.utils.transformers_compat import unpack_visual_output

from verl_patches.patching import replace

MODULE = "verl.models.transformers.qwen2_vl"


def patch_forward_without_images() -> bool:
    """Run text through Qwen2-VL and Qwen2.5-VL, where verl has built one.

    Symptom: ``'BaseModelOutputWithPooling' object has no attribute 'mean'`` for a micro-batch in which no row has an
    image. With overlap every rank without rows is one, also where all prompts have images.
    Upstream: ``verl.models.transformers.qwen2_vl._get_input_embeds`` (verl 0.9.1) gives the vision tower a dummy image
    there, so that all ranks of FSDP run it, and takes the mean of what it returns: a record since transformers 5.
    Delete: when it unpacks it, as ``qwen3_vl._get_input_embeds`` does.
    """
    if MODULE not in sys.modules:  # verl imports it with the first such model
        return False
    parameters = (
        "model", "input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw",
        "video_grid_thw",
    )  # fmt: skip
    return replace(sys.modules[MODULE], "_get_input_embeds", parameters, _of_visual_tensors)


def _of_visual_tensors(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def _get_input_embeds(model: Any, *args: Any, **kwargs: Any) -> Any:
        def visual(*inputs: Any, **settings: Any) -> Any:
            return unpack_visual_output(model.visual(*inputs, **settings))[0]

        visual.dtype = model.visual.dtype
        seen = SimpleNamespace(visual=visual, config=model.config, get_input_embeddings=model.get_input_embeddings)
        return upstream(seen, *args, **kwargs)

    return _get_input_embeds
