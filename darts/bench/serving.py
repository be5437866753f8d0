"""Measured rollouts: one `DartsAgentLoopManager` with one agent-loop worker over real servers, and no trainer.

Contract: `RolloutBench.rollout` runs one rollout of DARTS's own manager, worker, client and servers with the settings
it is given, over emptied prefix caches, and returns what was measured. Nothing is scored: there is no reward worker.
What is added to the real classes only watches, or sets sampling parameters that no configuration can vary between
rollouts.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import psutil
import ray
from omegaconf import DictConfig
from verl.protocol import DataProto
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from darts.config import DartsConfig
from darts.engines.start import engine_config, engine_processes, process_of, start_servers
from darts.evidence.documents import finite
from darts.planning import Rollout, RolloutPlanner
from darts.rollout.client import RequestListener, current_listener
from darts.rollout.manager import DartsAgentLoopManager
from darts.rollout.worker import DartsAgentLoopWorker
from darts.testbed import assets_dir
from verl_patches.vllm_stream_server import StreamingReplica

SAMPLING = "bench_sampling"
"""Column of a batch: sampling parameters of a prompt's candidates."""


class CountingBalancer(GlobalRequestLoadBalancer):
    """verl's load balancer, which also counts the requests of each server."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._counts: Counter[str] = Counter()

    def acquire_server(self, request_id: str) -> tuple[str, Any]:
        """verl's choice, which is counted."""
        server_id, server_handle = super().acquire_server(request_id)
        self._counts[server_id] += 1
        return server_id, server_handle

    def take_counts(self) -> list[int]:
        """Requests of each server since the last call."""
        request_counts, self._counts = self._counts, Counter()
        return [request_counts[server_id] for server_id in self._servers]


class SamplingWorker(DartsAgentLoopWorker):
    """The agent-loop worker, with sampling parameters from the batch."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        sampling_params.update(kwargs.pop(SAMPLING))
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)


class SamplingManager(DartsAgentLoopManager):
    """The manager, with these workers."""

    agent_loop_workers_class = ray.remote(SamplingWorker)


class RolloutBench:
    """A manager over running servers.

    Args:
        servers: what `darts.engines.start.start_servers` gives.
        config: the servers' configuration; its block `darts:` is not used by `rollout`.
    """

    def __init__(self, servers: Any, config: DictConfig) -> None:
        self._servers = servers.server_handles
        self._manager = SamplingManager.create(config=config, llm_client=servers.get_client())
        self._processes = {
            "engine": [process for server in self._servers for process in engine_processes(server)],
            "server": [process_of(server) for server in self._servers],
            "worker": [process_of(worker) for worker in self._manager.agent_loop_workers],
            "driver": [psutil.Process()],
        }

    def rollout(
        self,
        darts: DartsConfig,
        questions: Sequence[str],
        step: int,
        sampling: Mapping[str, Any] | None = None,
        planner: RolloutPlanner | None = None,
    ) -> tuple[Rollout, dict[str, Any]]:
        """Runs one rollout; its record, for JSON, has the metrics without `darts/`, and lists with one for each prompt.

        Args:
            darts: its settings; `group_size` is M.
            questions: the user's message of each prompt.
            step: what candidates' seeds are made of besides `darts.seed` and their numbers.
            sampling: sampling parameters that all candidates get on top of the configuration's.
            planner: plans it, instead of the one that planned the rollout before.
        """
        rollout_manager = self._manager
        rollout_manager.planner = planner or rollout_manager.planner
        rollout_manager.begin_round(darts)
        ray.get([server_handle.clear_kv_cache.remote() for server_handle in self._servers], timeout=60)
        prompt_batch = batch_of(questions, darts.group_size, step, sampling or {})
        cpu_before = self._cpu_seconds()
        kept_rows = rollout_manager.generate_sequences(prompt_batch)
        ended_at, cpu_after = time.time(), self._cpu_seconds()
        if len(kept_rows) != darts.group_size * len(questions):
            raise RuntimeError(f"{len(kept_rows)} rows for {len(questions)} prompts and M={darts.group_size}.")
        rollout = rollout_manager.pop_rollout()
        pool = rollout.pool
        groups = [np.flatnonzero(pool.prompt == prompt) for prompt in np.unique(pool.prompt)]
        return rollout, {
            **{name.removeprefix("darts/"): finite(figure) for name, figure in rollout.metrics.items()},
            "seconds": rollout.metrics["darts/rollout/seconds"],
            "after_s": ended_at - float(pool.ended_at.max()),  # from the end of the last request to the batch
            **{f"cpu_{role_name}_s": cpu_after[role_name] - cpu_before[role_name] for role_name in cpu_after},
            "prompt_tokens": int(pool.prompt_tokens.sum()),
            "computed_tokens": int((pool.prompt_tokens - pool.cached_tokens).sum()),
            "lengths": [pool.length[group_rows].tolist() for group_rows in groups],
            "aborted_by_candidate": [pool.aborted[group_rows].tolist() for group_rows in groups],
            "kept": [pool.candidate[group_rows][pool.kept[group_rows]].tolist() for group_rows in groups],
        }

    def close(self) -> None:
        """Ends the agent-loop worker."""
        for loop_worker in self._manager.agent_loop_workers:
            ray.kill(loop_worker)

    def _cpu_seconds(self) -> dict[str, float]:
        return {
            role_name: sum(sum(role_process.cpu_times()[:2]) for role_process in role_processes)
            for role_name, role_processes in self._processes.items()
        }


@contextmanager
def serving(*overrides: str, replicas: int = 1, **limits: int | None) -> Iterator[tuple[Any, RolloutBench]]:
    """Servers that run, and a bench on them.

    Args:
        overrides: of the configuration.
        replicas: servers; several are behind a `CountingBalancer`.
        limits: `response_length` and `max_model_len` of `engine_config`.
    """
    engine_settings = engine_config(*overrides, replicas=replicas, **limits)
    several_servers = {} if replicas == 1 else {"start_rank": 1, "load_balancer_class": CountingBalancer}
    with start_servers(engine_settings, StreamingReplica, **several_servers) as servers:
        rollout_bench = RolloutBench(servers, engine_settings)
        yield servers, rollout_bench
        rollout_bench.close()


def train_questions(testbed: str) -> list[str]:
    """The testbed's train prompts, in their order."""
    prompts = pd.read_parquet(assets_dir(testbed) / "train.parquet", columns=["prompt"])["prompt"]
    return [messages[0]["content"] for messages in prompts]


def batch_of(questions: Sequence[str], group_size: int, step: int, sampling: Mapping[str, Any]) -> DataProto:
    """The batch that verl's trainer hands to the manager: each prompt `group_size` times, with a new uid."""

    def column(prompt_values: list[Any]) -> np.ndarray:
        object_array = np.empty(len(prompt_values), dtype=object)
        object_array[:] = prompt_values
        return np.repeat(object_array, group_size)

    return DataProto.from_dict(
        tensors={},
        non_tensors={
            "raw_prompt": column([[{"role": "user", "content": user_message}] for user_message in questions]),
            "uid": column([uuid4().hex for _ in questions]),
            "index": np.repeat(np.arange(len(questions)), group_size),
            SAMPLING: column([dict(sampling) for _ in questions]),
        },
        meta_info={"global_steps": step, "validate": False},
    )


class ChunkCounter(RequestListener):
    """Listens to one request, as a candidate does, and counts."""

    routing_key, over = None, False

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = self.first_tokens = chunk_tokens
        self.chunks = 0

    def grew(self, request: Any, chunk: Any, latency: float) -> None:
        """One more chunk."""
        self.chunks += 1

    def closed(self, request: Any, output: Any, finish_reason: str) -> bool:
        """The request is all there is, so whether to go on does not matter."""
        return True


async def stream_once(client: Any, requests: int, tokens: int, chunk: int | None, log_probs: bool) -> dict[str, Any]:
    """Runs `requests` requests of exactly `tokens` tokens at once; `chunk` None is verl's own path."""
    listeners = [ChunkCounter(chunk) for _ in range(requests)] if chunk is not None else []

    async def one(number: int) -> int:
        if chunk is not None:
            current_listener.set(listeners[number])
        output = await client.generate(
            uuid4().hex,
            prompt_ids=[48 + number % 10] * 30,
            sampling_params={"temperature": 1.0, "ignore_eos": True, "max_tokens": tokens, "logprobs": log_probs},
        )
        return len(output.token_ids)

    start = time.monotonic()
    lengths = await asyncio.gather(*map(one, range(requests)))  # in tasks, each with a listener of its own
    seconds = time.monotonic() - start
    if set(lengths) != {tokens}:
        raise RuntimeError(f"responses of {sorted(set(lengths))} tokens; {tokens} were asked for.")
    chunks, generated = sum(listener.chunks for listener in listeners), sum(lengths)
    return {"seconds": seconds, "tokens": generated, "tokens_per_s": generated / seconds, "chunks": chunks}
