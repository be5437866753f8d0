"""Streamed requests on a real server, asked from the test or watched from within the server actor."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import uuid4

import ray
from engine_state import LIMIT_S, EngineState, run_in_server
from verl.workers.rollout.replica import TokenOutput

from darts.messages import Chunk
from darts.rollout.client import DartsServerClient, OpenRequest, current_listener

PROMPT = list(range(48, 98))


def request(request_id: str | None = None, prompt: list[int] = PROMPT, max_tokens: int = 200, **sampling: Any) -> dict:
    """Arguments of `generate`. Seeded: vLLM on CPU ignores all seeds of a step in which one request has none."""
    defaults = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "logprobs": True, "max_tokens": max_tokens}
    return {
        "request_id": request_id or uuid4().hex,
        "prompt_ids": prompt,
        "sampling_params": defaults | sampling,
    }


def stream(server: Any, *args: Any, client: str = "client", chunk_tokens: int = 16, **kwargs: Any) -> ray.ObjectRef:
    """A running `generate_streamed`; other arguments as `request`."""
    return server.generate_streamed.remote(client=client, chunk_tokens=chunk_tokens, **request(*args, **kwargs))


def end(*pending: ray.ObjectRef) -> list[tuple[str, int]]:
    """`(finish reason, tokens)` of each streamed request."""
    outputs = ray.get(list(pending), timeout=LIMIT_S)
    return [(output.extra_fields["finish_reason"], len(output.token_ids)) for output in outputs]


def abort(server: Any, request_ids: list[str]) -> list[str]:
    """The answer of `abort_streams`."""
    return ray.get(server.abort_streams.remote(request_ids), timeout=LIMIT_S)


def take(server: Any, client: str = "client", wait_s: float = 5.0) -> list[Chunk]:
    """The answer of `take_chunks`."""
    return ray.get(server.take_chunks.remote(client, wait_s), timeout=wait_s + LIMIT_S)


class Books(NamedTuple):
    """What a server knows of its requests."""

    streams: list[str]  # ids of those that run
    clients: list[str]  # for whom it keeps chunks
    admitting: int  # verl's count of those on their way into the engine, which weight updates wait for


NOTHING = Books([], [], 0)


def books(server: Any) -> Books:
    """As the server has them now."""
    return Books(*ray.get(server.__ray_call__.remote(_books), timeout=LIMIT_S))


def steps(server: Any) -> int:
    """The steps that its front end has read of its engine: all that were made, once a request has ended."""
    return ray.get(server.__ray_call__.remote(_steps), timeout=LIMIT_S)


def close_gate(server: Any) -> None:
    """From now on requests wait in the server, as during a weight update."""
    ray.get(server.__ray_call__.remote(_close_gate), timeout=LIMIT_S)


def sampled(server: Any, since: float = 0.0) -> dict[str, int]:
    """Tokens that the model sampled for each request after a `time.time()`."""
    counts: dict[str, int] = {}
    for at, name, count in EngineState.token_log(server):
        if at > since:
            counts[name] = counts.get(name, 0) + count
    return counts


def wait_until(condition: Callable[[], bool]) -> float:
    """Seconds until the condition held."""
    start = time.monotonic()
    while not condition():
        waited = time.monotonic() - start
        assert waited < LIMIT_S, f"not within {LIMIT_S:g} s"
        time.sleep(0.005)
    return time.monotonic() - start


class Listener:
    """Notes what the client tells it."""

    routing_key = None
    over = False

    def __init__(self, chunk_tokens: int = 16) -> None:
        self.chunk_tokens = self.first_tokens = chunk_tokens
        self.request: OpenRequest | None = None
        self.grown: list[int] = []  # tokens, at each chunk
        self.grown_after_the_end = 0
        self.finish_reason: str | None = None

    def opened(self, request: OpenRequest) -> None:
        """As `RequestListener.opened`."""
        self.request = request

    def grew(self, request: OpenRequest, chunk: Chunk, latency: float) -> None:
        """As `RequestListener.grew`."""
        self.grown.append(request.tokens)
        self.grown_after_the_end += self.finish_reason is not None

    def dropped(self, request: OpenRequest) -> None:
        """As `RequestListener.dropped`."""

    def closed(self, request: OpenRequest, output: TokenOutput, finish_reason: str) -> bool:
        """As `RequestListener.closed`."""
        assert self.finish_reason is None, "a request ends once"
        self.finish_reason = finish_reason
        return True


async def listen(client: DartsServerClient, listener: Listener, **arguments: Any) -> TokenOutput:
    """The answer to a request of the client under a listener; `arguments` as `request` gives them."""
    current_listener.set(listener)
    return await client.generate(**arguments)


class Cut(NamedTuple):
    """An aborted request."""

    output: TokenOutput
    chunks: list[Chunk]  # before the abort
    at: float  # `time.time()` of the abort
    running: list[str]  # what `abort_streams` returned


def cut(server: Any, chunks: int, ticks: int = 0, seconds: float = 0.0, **streamed: Any) -> Cut:
    """Aborts a request after its `chunks`-th chunk was made, and `ticks` turns of the server's event loop and `seconds`
    more."""
    return run_in_server(server, _cut, chunks, ticks, seconds, streamed)


def collect(server: Any, **streamed: Any) -> tuple[TokenOutput, list[Chunk]]:
    """A streamed request and its chunks, fetched without a gap."""
    return run_in_server(server, _collect, streamed)


# --- in the server actor ---------------------------------------------------------------------------------------------


def _books(server: Any) -> tuple[list[str], list[str], int]:
    return list(server._streams), list(server._outboxes), server._admitting


def _steps(server: Any) -> int:
    return server._engine_steps.steps


def _close_gate(server: Any) -> None:
    server._submission_paused = True
    server._resume_event.clear()


async def _cut(server: Any, chunks: int, ticks: int, seconds: float, streamed: dict[str, Any]) -> Cut:
    running = asyncio.create_task(server.generate_streamed(**streamed))
    taken: list[Chunk] = []
    while len(taken) < chunks and not running.done():
        taken += await server.take_chunks(streamed["client"], 5.0)
    for _ in range(ticks):
        await asyncio.sleep(0)
    if seconds:
        await asyncio.sleep(seconds)
    at = time.time()
    stopped = await server.abort_streams([streamed["request_id"]])
    return Cut(await running, taken, at, stopped)


async def _collect(server: Any, streamed: dict[str, Any]) -> tuple[TokenOutput, list[Chunk]]:
    running = asyncio.create_task(server.generate_streamed(**streamed))
    taken: list[Chunk] = []
    while not running.done():
        taken += await server.take_chunks(streamed["client"], 5.0)
    return await running, taken
