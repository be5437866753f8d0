"""verl 0.9.1's agent loops, of which every candidate gets one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hydra
import ray
from omegaconf import DictConfig, OmegaConf
from verl.experimental.agent_loop import agent_loop
from verl.utils.device import get_resource_name
from verl.utils.transformers_compat import unpack_visual_output
from verl.workers.rollout.llm_server import LLMServerManager

from darts.messages import Node
from verl_patches.patching import PatchTargetMoved, replace
from verl_patches.pools import check_room_for_servers


def patch_building() -> bool:
    """Build agent loops by their class, without Hydra's machinery for configurations.

    Symptom: 1.7 ms of the worker's event loop for each candidate, of which the loop's own constructor takes 0.1: the
    last of 256 candidates starts almost half a second late.
    Upstream: ``hydra.utils.instantiate`` in ``verl.experimental.agent_loop.agent_loop.AgentLoopWorker._run_agent_loop``
    (verl 0.9.1), which copies, merges and resolves all arguments as configurations. A loop that is registered with
    settings of its own is still built by it.
    Delete: when verl keeps the class.
    """
    if agent_loop.hydra is not hydra:
        return False
    if "hydra" not in agent_loop.AgentLoopWorker._run_agent_loop.__code__.co_names:
        raise PatchTargetMoved("AgentLoopWorker._run_agent_loop does not use hydra any more: delete this patch")
    agent_loop.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=build))
    return True


def build(config: Any, **arguments: Any) -> Any:
    """The object of a configuration; its class is called where that is all it names."""
    if isinstance(config, dict) and set(config) == {"_target_"}:
        return hydra.utils.get_class(config["_target_"])(**arguments)
    return hydra.utils.instantiate(config=config, **arguments)


def patch_llm_server_manager() -> bool:
    """Make standalone servers where the run is disaggregated.

    Symptom: the servers start on the trainer's GPUs whatever `rollout.nnodes` says.
    Upstream: `verl.trainer.ppo.ray_trainer.RayPPOTrainer.init_workers` (verl 0.9.1) always hands the actor's worker
    group to `verl.workers.rollout.llm_server.LLMServerManager`, which makes standalone servers without one. Servers of
    teachers and reward models are made by other classes.
    Delete: when `RayPPOTrainer` makes standalone servers (verl's V1 trainers do), or with `RayPPOTrainer`.
    """
    parameters = ("self", "config", "worker_group", "rollout_resource_pool", "start_rank", "load_balancer_cls")
    return replace(LLMServerManager, "__init__", parameters, _with_placement)


def _with_placement(upstream: Callable[..., None]) -> Callable[..., None]:
    def __init__(
        self: LLMServerManager,
        config: DictConfig,
        worker_group: Any = None,
        rollout_resource_pool: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if OmegaConf.select(config, "darts.placement") == "disaggregated":
            worker_group = rollout_resource_pool = None
            left = ray._private.state.available_resources_per_node().values()  # as verl's ResourcePoolManager does
            free = [Node(resources.get(get_resource_name(), 0), resources.get("CPU", 0)) for resources in left]
            check_room_for_servers(config, free)
        upstream(self, config, worker_group, rollout_resource_pool, *args, **kwargs)

    return __init__


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
