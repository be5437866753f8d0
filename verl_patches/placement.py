"""Servers on GPUs of their own, for verl 0.9.1's `RayPPOTrainer`, which knows colocated ones only.

Contract: with `darts.placement=disaggregated` (and a checkpoint engine other than `naive`) actor workers hold no
rollout and `RayPPOTrainer.init_workers` starts standalone servers; every other run is upstream's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.utils.device import get_resource_name
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.llm_server import LLMServerManager

import verl_patches.gloo_checkpoint_engine  # noqa: F401  (registers it)
from darts.placement import Node, check_room_for_servers
from verl_patches.patching import replace


class PlacedActorWorker(ActorRolloutRefWorker):
    """verl's worker of the training GPUs; without a rollout where the servers stand alone.

    Upstream: `verl.workers.engine_workers.ActorRolloutRefWorker` (verl 0.9.1), whose `init_model` makes a rollout where
    the role's name has one in it, and wants the training GPUs to be a multiple of a server's.
    """

    def __init__(self, config: DictConfig, role: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, role, *args, **kwargs)
        if config.rollout.checkpoint_engine.backend != "naive":
            self.role = "_".join(part for part in role.split("_") if part != "rollout")
            self._is_rollout = False


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


def why_unavailable(backend: str) -> str | None:
    """Why verl does not have this checkpoint engine here; None if it does."""
    try:
        CheckpointEngineRegistry.get(backend)
    except ValueError:
        module = f"{backend.split('_')[0]}_checkpoint_engine"
        reason = CheckpointEngineRegistry._import_errors.get(module)
        known = ", ".join(sorted(CheckpointEngineRegistry._registry))
        return f"verl has no such checkpoint engine here (it has {known})" if reason is None else str(reason)
    return None
