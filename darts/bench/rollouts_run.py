"""Measured rollouts: one `DartsAgentLoopManager` with one agent-loop worker over real servers, and no trainer.

Contract: `Bench.rollout` runs one rollout of DARTS's own manager, worker, client and servers with the settings it is
given, over emptied prefix caches, and returns what was measured. Nothing is scored: there is no reward worker. What is
added to the real classes only watches, or sets sampling parameters that no configuration can vary between rollouts.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import ray
from omegaconf import DictConfig
from verl.protocol import DataProto
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from darts.config import DartsConfig
from darts.engines.start import engine_processes, process_of
from darts.pool import CandidatePool
from darts.rollout.client import current_listener
from darts.rollout.manager import DartsAgentLoopManager
from darts.rollout.worker import DartsAgentLoopWorker

SAMPLING = "bench_sampling"
"""Column of a batch: sampling parameters of a prompt's candidates."""


class CountingBalancer(GlobalRequestLoadBalancer):
    """verl's load balancer, which also counts the requests of each server."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._counts: Counter[str] = Counter()

    def acquire_server(self, request_id: str) -> tuple[str, Any]:
        """As verl's."""
        server_id, server = super().acquire_server(request_id)
        self._counts[server_id] += 1
        return server_id, server

    def take_counts(self) -> list[int]:
        """Requests of each server since the last call."""
        counts, self._counts = self._counts, Counter()
        return [counts[server_id] for server_id in self._servers]


class SamplingWorker(DartsAgentLoopWorker):
    """The agent-loop worker, with sampling parameters from the batch."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        sampling_params.update(kwargs.pop(SAMPLING))
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)


class SamplingManager(DartsAgentLoopManager):
    """The manager, with these workers."""

    agent_loop_workers_class = ray.remote(SamplingWorker)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rollout."""

    metrics: dict[str, float]
    """As `darts.metrics.rollout_metrics` gives them."""
    pool: CandidatePool
    after_s: float
    """From the end of the last request to the batch being there."""
    cpu_s: dict[str, float]
    """CPU seconds of the engines, of the servers' front ends, of the agent-loop worker, and of this process."""

    def record(self) -> dict[str, Any]:
        """The figures of a benchmark's report, ready for JSON; lists have an entry per prompt."""
        metrics = self.metrics
        groups = [np.flatnonzero(self.pool.prompt == prompt) for prompt in np.unique(self.pool.prompt)]
        return {
            "seconds": metrics["darts/rollout/seconds"],
            "tail_s": metrics["darts/rollout/tail_s"],
            "after_s": self.after_s,
            "cpu_s": self.cpu_s,
            "launched": int(metrics["darts/candidates/launched"]),
            "aborted": int(metrics["darts/candidates/aborted"]),
            "tokens": int(metrics["darts/tokens/generated"]),
            "tokens_kept": int(metrics["darts/tokens/kept"]),
            "tokens_after": int(metrics["darts/early_stop/tokens_after"]),
            "chunks": int(metrics["darts/streaming/chunks"]),
            "kept_mean": metrics["darts/length/kept_mean"],
            "arrival_disagreement": metrics["darts/selection/arrival_disagreement"],
            "cached_share": metrics["darts/rollout/prefix_cached_share"],
            "prompt_tokens": int(self.pool.prompt_tokens.sum()),
            "computed_tokens": int((self.pool.prompt_tokens - self.pool.cached_tokens).sum()),
            "lengths": [self.pool.length[rows].tolist() for rows in groups],
            "aborted_by_candidate": [self.pool.aborted[rows].tolist() for rows in groups],
            "kept": [self.pool.candidate[rows][self.pool.kept[rows]].tolist() for rows in groups],
        }


class Bench:
    """A manager over running servers.

    Args:
        servers: What `darts.engines.start.start_servers` gives.
        config: The servers' configuration; its block `darts:` is not used by `rollout`.
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
        self, darts: DartsConfig, questions: Sequence[str], step: int, sampling: Mapping[str, Any] | None = None
    ) -> Measured:
        """Runs one rollout.

        Args:
            darts: Its settings; `group_size` is M.
            questions: The user's message of each prompt.
            step: What candidates' seeds are made of besides `darts.seed` and their numbers.
            sampling: Sampling parameters that all candidates get on top of the configuration's.
        """
        manager = self._manager
        manager.begin_round(darts)
        ray.get([server.clear_kv_cache.remote() for server in self._servers], timeout=60)
        batch = batch_of(questions, darts.group_size, step, sampling or {})
        before = self._cpu_seconds()
        output = manager.generate_sequences(batch)
        ended, after = time.time(), self._cpu_seconds()
        if len(output) != darts.group_size * len(questions):
            raise RuntimeError(f"{len(output)} rows for {len(questions)} prompts and M={darts.group_size}.")
        rollout = manager.pop_rollout()
        return Measured(
            metrics=rollout.metrics,
            pool=rollout.pool,
            after_s=ended - float(rollout.pool.ended_at.max()),
            cpu_s={name: after[name] - before[name] for name in after},
        )

    def close(self) -> None:
        """Ends the agent-loop worker."""
        for worker in self._manager.agent_loop_workers:
            ray.kill(worker)

    def _cpu_seconds(self) -> dict[str, float]:
        return {
            name: sum(sum(process.cpu_times()[:2]) for process in processes)
            for name, processes in self._processes.items()
        }


def batch_of(questions: Sequence[str], group_size: int, step: int, sampling: Mapping[str, Any]) -> DataProto:
    """A batch as verl's trainer hands it to the manager: each prompt `group_size` times, with a new uid."""

    def column(values: list[Any]) -> np.ndarray:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return np.repeat(array, group_size)

    return DataProto.from_dict(
        tensors={},
        non_tensors={
            "raw_prompt": column([[{"role": "user", "content": question}] for question in questions]),
            "uid": column([uuid4().hex for _ in questions]),
            "index": np.repeat(np.arange(len(questions)), group_size),
            SAMPLING: column([dict(sampling) for _ in questions]),
        },
        meta_info={"global_steps": step, "validate": False},
    )


# --- one server, without a manager ------------------------------------------------------------------------------------


class ChunkCounter:
    """Listens to one request, as a candidate does, and counts."""

    routing_key = None
    over = False

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.chunks = 0

    def opened(self, request: Any) -> None:
        """Nothing to do."""

    def grew(self, request: Any, chunk: Any, latency: float) -> None:
        """One more chunk."""
        self.chunks += 1

    def dropped(self, request: Any) -> None:
        """Nothing to do."""

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
    lengths = await asyncio.gather(*[asyncio.create_task(one(number)) for number in range(requests)])
    seconds = time.monotonic() - start
    if set(lengths) != {tokens}:
        raise RuntimeError(f"responses of {sorted(set(lengths))} tokens; {tokens} were asked for.")
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "tokens_per_s": sum(lengths) / seconds,
        "chunks": sum(listener.chunks for listener in listeners),
    }
