"""Scripted stand-ins for what cannot be scripted otherwise: a server of known lengths, a reward that counts.

The server decides by the request's sampling seed, which `darts.rollout.candidate_seed` makes of (step, prompt,
candidate), so a test says which candidate is how long, and how late. It records what it served.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from verl.protocol import DataProto
from verl.workers.rollout.replica import TokenOutput

ANY_TOKEN = 5


@dataclass
class Turn:
    """One scripted answer of the server: `length` tokens, the last an end token unless `cut`; or an error."""

    length: int
    cut: bool = False
    delay: float = 0.0
    tokens: list[int] | None = None  # answer with exactly these instead
    error: str | None = None


@dataclass
class Script:
    """What each candidate gets, turn by turn, by its seed; `default` for requests without a scripted seed."""

    end_token: int
    turns: dict[int, list[Turn]] = field(default_factory=dict)
    default: Turn = field(default_factory=lambda: Turn(3))


class ScriptedServer:
    """The part of verl's `vLLMHttpServer` that a client calls. `served` has one record per request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.served: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0

    async def generate(
        self, *, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        seed = sampling_params.get("seed")
        turn_number = sum(record["seed"] == seed for record in self.served) if seed is not None else 0
        turns = self.script.turns.get(seed)
        turn = turns[turn_number] if turns else self.script.default
        record = dict(seed=seed, request_id=request_id, priority=kwargs.get("priority", 0), ended=False, **vars(turn))
        self.served.append(record)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(turn.delay)
        finally:
            self.running -= 1
        if turn.error is not None:
            raise RuntimeError(turn.error)
        record["ended"] = True
        tokens = turn.tokens
        if tokens is None:
            tokens = [ANY_TOKEN] * turn.length
            if tokens and not turn.cut:
                tokens[-1] = self.script.end_token
        return TokenOutput(
            token_ids=tokens, log_probs=[-0.5] * len(tokens), stop_reason="completed", extra_fields={"global_steps": 0}
        )

    async def load(self, turns: dict[int, list[Turn]], default: Turn | None = None) -> None:
        self.script.turns.update(turns)
        self.script.default = default or self.script.default

    async def take_records(self) -> list[dict[str, Any]]:
        """What was served since the last call."""
        served, self.served = self.served, []
        return served


class InProcessClient:
    """The part of verl's `LLMServerClient` that agent loops call, straight to one server object."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        kwargs.pop("mm_processor_output", None)
        return await self.server.generate(request_id=request_id, **kwargs)


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


class _Method:
    def __init__(self, method: Any) -> None:
        self.remote = method


def handle(worker: CountingReward) -> Any:
    """`worker` with a Ray handle's way of calling, in this process."""
    return type("Handle", (), {"compute_score": _Method(worker.compute_score)})()


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
    from verl.workers.rollout.router import GlobalRequestLoadBalancer

    return ray.remote(GlobalRequestLoadBalancer).remote(servers=servers)
