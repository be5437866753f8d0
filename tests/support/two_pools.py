"""Both ends of a weight update as Ray actors: verl's own workers, with a scripted model and a scripted server."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.workers.rollout.base import get_rollout_class
from weight_transfer import described, weights_of

from verl_patches.placement import PlacedActorWorker

SIZES = [("first", (33, 1000), torch.float32), ("odd", (3,), torch.bfloat16), ("large", (3_000_000,), torch.bfloat16)]
LONG = [(f"w{i}", (1 << 20,), torch.float32) for i in range(40)]
"""More than sockets hold: who sends must wait for who takes."""
BUCKET = 1 << 20


class Trainer(PlacedActorWorker):
    """An actor rank without a model: `update_weights` and `execute_checkpoint_engine` are the real ones."""

    def __init__(self) -> None:
        Worker.__init__(self)
        self.actor = SimpleNamespace(engine=self)
        self.checkpoint_engine = CheckpointEngineRegistry.new("gloo", is_master=self.rank == 0, bucket_size=BUCKET)

    def begin(self, mode: str) -> None:
        """What updates do from now on."""
        self.mode, self.updates = mode, 0

    def get_per_tensor_param(self) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
        self.updates += 1
        return self._walk(self.updates), None

    def _walk(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights_of(seed, SIZES if self.mode == "works" else LONG).items()
        if self.mode == "dies":
            os._exit(1)


class Adapter:
    """What takes the weights for vLLM, in the server's worker."""

    replica_rank, is_leader_rank = 0, True

    def __init__(self, mode: str) -> None:
        self.mode, self.taken = mode, []

    async def update_weights(self, weights: Any, global_steps: int | None = None, wire_format: str = "") -> None:
        taken = {}
        async for name, weight in weights:
            taken[name] = weight.clone()
            if self.mode == "fails":
                raise KeyError(f"vLLM knows no {name}")
            if self.mode == "dies":
                os._exit(1)
        self.taken.append((global_steps, described(taken)))


class Server(CheckpointEngineWorker):
    """The worker beside a standalone server."""

    def __init__(self, rollout_config: Any) -> None:
        super().__init__(rollout_config, model_config=None, server_adapter=Adapter("works"))

    def begin(self, mode: str) -> None:
        """What takes the weights from now on."""
        if mode == "vLLM fails":  # verl's own adapter, and `FailingVllm` behind it
            kind = get_rollout_class(self.rollout_config.name, self.rollout_config.mode)
            self.server_adapter = kind(config=self.rollout_config, model_config=None, device_mesh=None, replica_rank=0)
        else:
            self.server_adapter = Adapter(mode)


class FailingVllm:
    """A server whose engine cannot take weights."""

    async def collective_rpc(self, method: str, **kwargs: Any) -> None:
        assert method == "update_weights_from_ipc"
        raise AttributeError("'Parameter' object has no attribute 'weight_loader'")
