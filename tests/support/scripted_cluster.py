"""Servers with a script, workers, balancer and reward in processes of one Ray.

The files of the tier share them, since each process takes seconds to import verl. The managers are their own.
"""

import itertools
import time
from typing import Any

import ray
from fakes import CountingReward, Script, ScriptedServer, balancer
from omegaconf import DictConfig
from transformers import AutoTokenizer
from verl.workers.rollout.llm_server import LLMServerClient

from darts.rollout.manager import DartsAgentLoopManager


def kill(actor: Any) -> None:
    """Kills an actor and returns when it is dead: what was sent to it right after `ray.kill` may still be answered."""
    ray.kill(actor)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            ray.get(actor.__ray_ready__.remote())
        except ray.exceptions.ActorDiedError:
            return
        except ray.exceptions.ActorUnavailableError:
            pass
        time.sleep(0.1)
    raise AssertionError("the actor still answers")


class ScriptedCluster:
    """Servers, as many workers as the configuration says, and what stands between them."""

    def __init__(self, config: DictConfig, num_servers: int = 2) -> None:
        script = Script(end_token=AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path).eos_token_id)
        server = ray.remote(ScriptedServer).options(max_concurrency=1000)
        self.servers = [server.remote(script) for _ in range(num_servers)]
        names = {str(number): server for number, server in enumerate(self.servers)}
        self._client = LLMServerClient(config, balancer(names))
        self._reward = ray.remote(CountingReward).remote()
        self._first = DartsAgentLoopManager.create(config=config, **self._arguments())
        self._numbers = itertools.count(1000, 1000)

    def _arguments(self) -> dict[str, Any]:
        return {"llm_client": self._client, "reward_loop_worker_handles": [self._reward]}

    def manager(self, config: DictConfig) -> DartsAgentLoopManager:
        """A manager that has learnt nothing over the first of the workers; the servers' scripts are empty."""
        ray.get([server.forget.remote() for server in self.servers])
        manager = DartsAgentLoopManager(config=config, **self._arguments())
        num_workers = config.actor_rollout_ref.rollout.agent.num_workers
        manager.agent_loop_workers = self._first.agent_loop_workers[:num_workers]
        manager._number = next(self._numbers)  # workers know rollouts by numbers that grow
        return manager
