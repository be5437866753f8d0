"""Records, inside verl's vLLM server and beside the engine, what each request really gave: one JSON line per request.

Loaded with VERL_USE_EXTERNAL_MODULES=recording, it re-registers the name `vllm` with a server whose engine is watched.
The file is $DARTS_TEST_RECORD. With $DARTS_TEST_KILL_AFTER=n the engine's process is killed once n requests have run.
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
        self._started += 1
        if self._started == self._kill_after:
            self._kill_engine()
        last = None
        async for last in self._engine.generate(**kwargs):
            yield last
        answer = last.outputs[0]
        record = {
            "weights": self._server.global_steps,
            "prompt": list(last.prompt_token_ids),
            "seed": kwargs["sampling_params"].seed,
            "priority": int(kwargs["priority"]),
            "request_id": kwargs["request_id"],
            "tokens": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
        }
        with open(os.environ["DARTS_TEST_RECORD"], "a") as file:
            file.write(json.dumps(record) + "\n")

    def _kill_engine(self) -> None:
        """Ends the engine core, a child of this server actor, as the out-of-memory killer would."""
        children = psutil.Process().children(recursive=True)
        cores = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        with open(os.environ["DARTS_TEST_RECORD"], "a") as file:
            file.write(json.dumps({"killed": [core.pid for core in cores], "time": time.time()}) + "\n")
        for core in cores:
            os.kill(core.pid, signal.SIGKILL)


def _replica_class() -> type:
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class RecordingServer(vLLMHttpServer):
        async def launch_server(self, *args: Any, **kwargs: Any) -> None:
            await super().launch_server(*args, **kwargs)
            self.engine = WatchedEngine(self.engine, self)

    class RecordingReplica(vLLMReplica):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(RecordingServer)

    return RecordingReplica


RolloutReplicaRegistry.register("vllm", _replica_class)
