"""Scripted stand-ins for what cannot be scripted otherwise: a server of known lengths, a reward that counts.

The server decides by the request's sampling seed, which `darts.rollout.candidate_seed` makes of (step, prompt,
candidate), so a test says which candidate is how long, and how late. It records what it served.
"""

import asyncio
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from verl.protocol import DataProto
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from darts.messages import Chunk
from darts.rollout.client import DartsServerClient

ANY_TOKEN = 5


@dataclass
class Turn:
    """One scripted answer of the server: `length` tokens, the last an end token unless `cut`; or an error."""

    length: int
    cut: bool = False
    delay: float = 0.0
    held: bool = False  # its last chunk does not come before the server is told to `release`
    tokens: list[int] | None = None  # answer with exactly these instead
    error: str | None = None
    reason: str | None = None  # finish reason; None: what the tokens say
    weights: int = 0  # version of the weights that answered


@dataclass
class Script:
    """What each candidate gets, turn by turn, by its seed; `default` for requests without a scripted seed."""

    end_token: int
    turns: dict[int, list[Turn]] = field(default_factory=dict)
    default: Turn = field(default_factory=lambda: Turn(3))
    deaf: bool = False  # aborts arrive and do nothing


class ScriptedServer:
    """The part of `verl_patches.vllm_stream_server.StreamingServer` that a client calls.

    A turn's tokens are spread evenly over its delay, chunk by chunk. `served` has one record per request, `aborts` the
    ids that each abort named.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.served: list[dict[str, Any]] = []
        self.aborts: list[list[str]] = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0  # requests that Ray cancelled, which a real server may not hear of
        self._stop: dict[str, asyncio.Event] = {}
        self._early_aborts: set[str] = set()
        self._released = False
        self._chunks: dict[str, list[Chunk]] = defaultdict(list)  # by client

    async def generate(self, **request: Any) -> TokenOutput:
        return await self._serve(client=None, chunk_tokens=1_000_000, **request)

    async def generate_streamed(
        self, *, client: str, chunk_tokens: int, first_tokens: int | None = None, **request: Any
    ) -> TokenOutput:
        return await self._serve(client=client, chunk_tokens=chunk_tokens, first_tokens=first_tokens, **request)

    async def take_chunks(self, client: str, wait_s: float) -> list[Chunk]:
        for _ in range(20):
            if self._chunks[client]:
                break
            await asyncio.sleep(0.005)
        return self._chunks.pop(client)

    async def abort_streams(self, request_ids: list[str]) -> list[str]:
        self.aborts.append(request_ids)
        running = [request_id for request_id in request_ids if request_id in self._stop]
        if not self.script.deaf:
            self._early_aborts.update(set(request_ids).difference(running))
            for request_id in running:
                self._stop[request_id].set()
        return running

    async def _serve(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        client: str | None,
        chunk_tokens: int,
        first_tokens: int | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        seed = sampling_params.get("seed")
        turn_number = sum(record["seed"] == seed for record in self.served) if seed is not None else 0
        turns = self.script.turns.get(seed)
        turn = turns[turn_number] if turns else self.script.default
        record = dict(seed=seed, request_id=request_id, priority=kwargs.get("priority", 0), ended=False, **vars(turn))
        record |= {"streamed": client is not None, "chunk_tokens": chunk_tokens, "server": f"{os.getpid()}-{id(self)}"}
        self.served.append(record)
        tokens = turn.tokens
        if tokens is None:
            tokens = [ANY_TOKEN] * turn.length
            if tokens and not turn.cut:
                tokens[-1] = self.script.end_token
        most_tokens = sampling_params.get("max_tokens", len(tokens))
        is_cut, tokens = turn.cut or len(tokens) > most_tokens, tokens[:most_tokens]
        stop = self._stop[request_id] = asyncio.Event()
        if request_id in self._early_aborts:
            stop.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        done = 0
        try:
            while done < len(tokens) and not stop.is_set():
                step = min(chunk_tokens if done or first_tokens is None else first_tokens, len(tokens) - done)
                if turn.held and not self._released and done + step == len(tokens):
                    await asyncio.sleep(0.01)
                    continue
                try:
                    await asyncio.wait_for(stop.wait(), turn.delay * step / len(tokens))
                except asyncio.TimeoutError:
                    done += step
                    if client is not None and done < len(tokens):
                        made = tokens[done - step : done]
                        chunk = Chunk(request_id, done - step, made, time.time(), self.running, steps=done)
                        self._chunks[client].append(chunk)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            del self._stop[request_id]
        if turn.error is not None:
            raise RuntimeError(turn.error)
        reason = turn.reason or ("length" if is_cut else "stop")
        if done < len(tokens):
            reason = "abort"
        record |= {"ended": reason != "abort", "generated": done, "prompt_ids": prompt_ids, "answer": tokens[:done]}
        output = TokenOutput(
            token_ids=tokens[:done],
            log_probs=[-0.5] * done if done or not stop.is_set() else None,  # as a server whose engine never saw it
            stop_reason="aborted" if reason == "abort" else "completed",
            extra_fields={"global_steps": turn.weights, "num_cached_tokens": 0},
        )
        if client is not None:
            output.extra_fields["finish_reason"] = reason
        return output

    async def forget(self) -> None:
        """As it began: an empty script, nothing released, nothing served."""
        self.script = Script(self.script.end_token)
        self.served, self.aborts, self.cancelled, self._released = [], [], 0, False

    async def load(self, turns: dict[int, list[Turn]], default: Turn | None = None) -> None:
        self._released = False
        self.script.turns.update(turns)
        self.script.default = default or self.script.default

    async def release(self) -> None:
        """What is held goes on, until a new script is loaded."""
        self._released = True

    async def count_running(self) -> int:
        return self.running

    async def count_cancelled(self) -> int:
        return self.cancelled

    async def take_records(self) -> list[dict[str, Any]]:
        """What was served since the last call."""
        served, self.served = self.served, []
        return served


def in_process_client(config: Any, *servers: ScriptedServer) -> DartsServerClient:
    """The real client over verl's real balancer and scripted servers, all in this process."""
    balancer = GlobalRequestLoadBalancer(servers={str(number): handle(server) for number, server in enumerate(servers)})
    return DartsServerClient(config, handle(balancer))


class CountingReward:
    """A reward-loop worker: scores a response by its number of tokens, and counts. Use as actor or through `handle`."""

    def __init__(self) -> None:
        self.scored: list[int] = []

    async def compute_score(self, data: DataProto) -> dict[str, Any]:
        length = int(data.batch["responses"].shape[1])
        self.scored.append(length)
        return {"reward_score": float(length), "reward_extra_info": {"length": length}}

    async def lengths(self) -> list[int]:
        return self.scored


class _Handle:
    """`target` with a Ray handle's way of calling, in this process."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> asyncio.Future:
            async def call() -> Any:
                answer = getattr(self.target, name)(*args, **kwargs)
                return await answer if asyncio.iscoroutine(answer) else answer

            # As with Ray, who cancels the wait does not cancel the call.
            return asyncio.shield(asyncio.ensure_future(call()))

        method = type("Method", (), {"remote": staticmethod(remote)})()
        setattr(self, name, method)  # a test may replace its `remote`
        return method


def handle(target: Any) -> Any:
    """`target` with a Ray handle's way of calling, in this process."""
    return _Handle(target)


def prompts(questions: list[str], group_size: int, step: int = 1, validate: bool = False) -> DataProto:
    """A batch as verl's trainer hands it to the rollout manager: each prompt `group_size` times, interleaved."""

    def column(values: list[Any]) -> np.ndarray:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return np.repeat(array, group_size)

    count = len(questions)
    return DataProto.from_dict(
        tensors={},
        non_tensors={
            "raw_prompt": column([[{"role": "user", "content": question}] for question in questions]),
            "uid": column([f"uid-{number}" for number in range(count)]),
            "index": np.repeat(np.arange(count), group_size),
            "data_source": column(["scripted"] * count),
            "reward_model": column([{"style": "rule", "ground_truth": "0"}] * count),
            "extra_info": column([{"index": number} for number in range(count)]),
        },
        meta_info={"global_steps": step, "validate": validate},
    )


def balancer(servers: dict[str, Any]) -> Any:
    """verl's own load balancer, as an actor, over actor handles of servers."""
    return ray.remote(GlobalRequestLoadBalancer).remote(servers=servers)
