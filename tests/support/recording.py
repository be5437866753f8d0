"""Records, inside verl's vLLM server and beside the engine, what each request really gave: one JSON line per request
when it starts, one when it has ended. Requests that ignore the end token are the latency profile's: none are recorded.

Loaded with VERL_USE_EXTERNAL_MODULES=recording, it re-registers the name `vllm` with a server whose engine is watched.
The file is $DARTS_TEST_RECORD. With $DARTS_TEST_KILL_AFTER=n the engine's process is killed once n requests have run.
With `engine_state.watched_scheduler` as scheduler, there is also a line after each rollout, when the trainer lets
the servers drain: what the engine core still runs, and every token that it sampled since the last one.
"""

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import ray
from verl.workers.rollout.replica import RolloutReplicaRegistry


class WatchedEngine:
    """The engine, with its answers written down; everything else is the engine's own."""

    def __init__(self, engine: Any, server: Any) -> None:
        self._engine, self._server = engine, server
        self._started = 0
        self._kill_after = int(os.environ.get("DARTS_TEST_KILL_AFTER", "0"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, **kwargs: Any) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        about = {
            "weights": self._server.global_steps,
            "seed": kwargs["sampling_params"].seed,
            "priority": int(kwargs["priority"]),
            "request_id": kwargs["request_id"],
        }
        profile = kwargs["sampling_params"].ignore_eos
        if not profile:
            self._started += 1
            if self._started == self._kill_after:
                self._kill_engine()
            write({"started": time.time(), "prompt": list(kwargs["prompt"]["prompt_token_ids"]), **about})
        last, tokens = None, []
        async for last in self._engine.generate(**kwargs):
            part = last.outputs[0].token_ids
            tokens = [*tokens, *part] if kwargs["sampling_params"].output_kind == RequestOutputKind.DELTA else [*part]
            yield last
        answer = last.outputs[0]
        if profile:
            return
        record = about | {
            "ended": time.time(),
            "prompt": list(last.prompt_token_ids),
            "streamed": kwargs["sampling_params"].output_kind == RequestOutputKind.DELTA,
            "tokens": tokens,
            "finish_reason": answer.finish_reason,
        }
        write(record)

    async def abort(self, request_ids: list[str]) -> None:
        write({"aborted": list(request_ids), "time": time.time()})
        await self._engine.abort(request_ids)

    def _kill_engine(self) -> None:
        """Ends the engine core, a child of this server actor, as the out-of-memory killer would."""
        children = psutil.Process().children(recursive=True)
        cores = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        write({"killed": [core.pid for core in cores], "time": time.time()})
        for core in cores:
            os.kill(core.pid, signal.SIGKILL)


def write(record: dict[str, Any]) -> None:
    with open(os.environ["DARTS_TEST_RECORD"], "a") as file:
        file.write(json.dumps(record) + "\n")


def _replica_class() -> type:
    from verl_patches.vllm_stream_server import StreamingReplica, StreamingServer

    class RecordingServer(StreamingServer):
        async def run_server(self, args: Any) -> None:
            await super().run_server(args)
            # Between the engine and what cuts its answers into chunks.
            self.engine._engine = WatchedEngine(self.engine._engine, self)
            self._logged = 0

        async def wait_for_requests_to_drain(self) -> None:
            if "scheduler_cls" in self.config.engine_kwargs.get("vllm", {}):
                core = self.engine.engine_core
                state = await core.call_utility_async("darts_state")
                log = await core.call_utility_async("darts_token_log")
                write({"drained": time.time(), "weights": self.global_steps, **state, "sampled": log[self._logged :]})
                self._logged = len(log)
            await super().wait_for_requests_to_drain()

    class RecordingReplica(StreamingReplica):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(RecordingServer)

    return RecordingReplica


RolloutReplicaRegistry.register("vllm", _replica_class)
