"""Servers on GPUs of their own, for verl 0.9.1's `RayPPOTrainer`, which knows colocated ones only.

Contract: with `darts.placement=disaggregated` (and a checkpoint engine other than `naive`) actor workers hold no
rollout and `RayPPOTrainer.init_workers` starts standalone servers; every other run is upstream's.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker

import verl_patches.weights.gloo  # noqa: F401  (registers it)


class PlacedActorWorker(ActorRolloutRefWorker):
    """verl's worker of the training GPUs; without a rollout where the servers stand alone.

    Upstream: `verl.workers.engine_workers.ActorRolloutRefWorker` (verl 0.9.1), whose `init_model` makes a rollout where
    the role's name has one in it, and wants the training GPUs to be a multiple of a server's.
    """

    def __init__(self, config: DictConfig, role: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, role, *args, **kwargs)
        if config.rollout.checkpoint_engine.backend != "naive":
            self.role = "_".join(role_part for role_part in role.split("_") if role_part != "rollout")
            self._is_rollout = False


def why_unavailable(backend: str) -> str | None:
    """Why verl does not have this checkpoint engine here; None if it does."""
    try:
        CheckpointEngineRegistry.get(backend)
    except ValueError:
        engine_module = f"{backend.split('_')[0]}_checkpoint_engine"
        reason = CheckpointEngineRegistry._import_errors.get(engine_module)
        known_backends = ", ".join(sorted(CheckpointEngineRegistry._registry))
        return f"verl has no such checkpoint engine here (it has {known_backends})" if reason is None else str(reason)
    return None
