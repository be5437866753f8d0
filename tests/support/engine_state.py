"""The truth at the engine cores of real vLLM servers, for tests.

The servers are those of `darts.engines.start`. `EngineState` asks the EngineCore process of a server what it runs and
which tokens it sampled: `watched_scheduler` lives there, since `engine_config` names it as vLLM's `scheduler_cls`. This
module imports neither verl nor vLLM before they are needed.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from omegaconf import DictConfig

from darts.engines import start as engines
from darts.engines.start import MAX_MODEL_LEN, RESPONSE_LENGTH, start_servers

__all__ = [
    "BLOCK_SIZE",
    "LIMIT_S",
    "MAX_MODEL_LEN",
    "RESPONSE_LENGTH",
    "EngineState",
    "engine_config",
    "local_ray",
    "run_in_server",
    "start_servers",
    "watched_scheduler",
]

LIMIT_S = 300.0
"""A limit against hanging alone: no test expects to come near it, on any machine."""
BLOCK_SIZE = 16
"""Tokens of a KV-cache block; what the prefix cache shares are whole blocks."""


def engine_config(*overrides: str, replicas: int = 1) -> DictConfig:
    """As `darts.engines.start.engine_config`, with the scheduler that `EngineState` asks."""
    return engines.engine_config(
        f"+{engines.ENGINE}.block_size={BLOCK_SIZE}",
        f"+{engines.ENGINE}.scheduler_cls={__name__}.watched_scheduler",
        "actor_rollout_ref.rollout.max_num_seqs=256",
        "actor_rollout_ref.rollout.disable_log_stats=false",
        *overrides,
        replicas=replicas,
    )


def local_ray(num_gpus: int = 3) -> AbstractContextManager[None]:
    """As `darts.engines.start.local_ray`, with workers that can import the tests' modules."""
    return engines.local_ray(
        num_gpus,
        environment={"PYTHONPATH": str(Path(__file__).parent)},
        log_to_driver="DARTS_TEST_LOG" in os.environ,
    )


# --- in the EngineCore process ---------------------------------------------------------------------------------------


def watched_scheduler(**kwargs: Any) -> Any:
    """vLLM's scheduler, called by its engine core as a class; it logs what the model sampled."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    class WatchedScheduler(Scheduler):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.token_log: list[tuple[float, str, int]] = []

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            now, sampled = time.time(), model_runner_output.sampled_token_ids
            if sampled:
                for request_id, row in model_runner_output.req_id_to_index.items():
                    if count := len(sampled[row]):
                        self.token_log.append((now, request_id, count))
            return super().update_from_output(scheduler_output, model_runner_output)

    EngineCore.darts_state = _state
    EngineCore.darts_token_log = _token_log
    EngineCore.darts_reset = _reset
    return WatchedScheduler(**kwargs)


def _state(core: Any) -> dict[str, int]:
    running, waiting = core.scheduler.get_request_counts()
    pool = core.scheduler.kv_cache_manager.block_pool
    # One block is a placeholder that is never given out.
    return {
        "running": running,
        "waiting": waiting,
        "free_blocks": pool.get_num_free_blocks(),
        "total_blocks": pool.num_gpu_blocks - 1,
    }


def _token_log(core: Any) -> list[tuple[float, str, int]]:
    return core.scheduler.token_log


def _reset(core: Any) -> None:
    core.scheduler.token_log.clear()
    if not core.scheduler.reset_prefix_cache():
        raise RuntimeError("requests are running: the prefix cache cannot be emptied")


# --- in the server actor ---------------------------------------------------------------------------------------------


def _begin(server: Any, function: Callable[..., Awaitable[Any]], args: tuple) -> str:
    key = uuid4().hex
    # Ray runs what `__ray_call__` calls beside the actor's event loop, which verl's HTTP server is a task of.
    loop = server._server_task.get_loop()
    tasks = server.__dict__.setdefault("test_tasks", {})
    tasks[key] = asyncio.run_coroutine_threadsafe(function(server, *args), loop)
    return key


def _poll(server: Any, key: str) -> tuple[Any] | None:
    if not server.test_tasks[key].done():
        return None
    return (server.test_tasks.pop(key).result(),)


async def _ask_core(server: Any, method: str) -> Any:
    return await server.engine.engine_core.call_utility_async(method)


async def _abort(server: Any, request_id: str) -> None:
    await server.engine.abort(request_id)


# --- in the test -----------------------------------------------------------------------------------------------------


def run_in_server(server: Any, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """The result of the coroutine `function(server object, *args)`, run in the actor, which must be able to import it.

    Ray's `__ray_call__` does not await what it calls, so the coroutine is started by one call and fetched by others.
    """
    end = time.monotonic() + LIMIT_S
    key = ray.get(server.__ray_call__.remote(_begin, function, args), timeout=LIMIT_S)
    while True:
        if answer := ray.get(server.__ray_call__.remote(_poll, key), timeout=max(0.0, end - time.monotonic())):
            return answer[0]
        if time.monotonic() > end:
            raise TimeoutError(f"{function.__name__} took over {LIMIT_S:g} s")
        time.sleep(0.002)


class EngineState:
    """What the engine core of a server knows. Blocking calls: beside a running event loop use `asyncio.to_thread`."""

    @staticmethod
    def state(server: Any) -> dict[str, int]:
        """`running`, `waiting`: requests; `free_blocks`, `total_blocks`: of the KV cache. Taken between two steps."""
        return run_in_server(server, _ask_core, "darts_state")

    @staticmethod
    def token_log(server: Any) -> list[tuple[float, str, int]]:
        """`(time.time() at the step's end, request id as it was given, tokens sampled)`, in order.

        Tokens that were sampled after an abort, and thrown away, are in it.
        """
        entries = run_in_server(server, _ask_core, "darts_token_log")
        # vLLM appends a random part to the id.
        return [(at, request_id.rpartition("-")[0], count) for at, request_id, count in entries]

    @staticmethod
    def reset(server: Any) -> None:
        """Empties the token log and the prefix cache of an idle engine."""
        run_in_server(server, _ask_core, "darts_reset")

    @staticmethod
    def abort(server: Any, request_id: str) -> None:
        """vLLM's own `engine.abort`."""
        run_in_server(server, _abort, request_id)

    @classmethod
    def wait_idle(cls, server: Any) -> float:
        """Seconds until nothing runs or waits and all blocks are free."""
        start = time.monotonic()
        while True:
            state = cls.state(server)
            waited = time.monotonic() - start
            if state["running"] == state["waiting"] == 0 and state["free_blocks"] == state["total_blocks"]:
                return waited
            if waited > LIMIT_S:
                raise TimeoutError(f"the engine is not idle after {LIMIT_S:g} s: {state}")
