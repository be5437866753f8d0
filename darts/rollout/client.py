"""The client of the rollout servers, which knows every response as it grows and can stop it.

Contract. Agent loops call `generate` as they call verl's client, once per turn. Under a `RequestListener` (a context
variable, so agent loops never see it) the request is streamed; without one it takes verl's path untouched.

1. Chunks of one server come in batches: one call per server is open at a time, however many requests run there. They
   are a side channel: the answer of `generate` holds all tokens, so a chunk that comes after it is dropped.
2. `abort` sends one call per server, however many requests it stops, and does not wait; the server sees to it that they
   stop, also where Ray runs the abort before its request. A server that has not ended an aborted request after its
   limit is an error: an abort that does not arrive is worse than none.
3. A candidate that shall not go on after a request leaves its agent loop by `CandidateStopped`, a `CancelledError`:
   no tool and no further turn runs, and what the loop holds is released.
4. From the second chunk of a request on, the time between two chunks tells how long the server's decoding steps take;
   the client keeps it, by the number of sequences that an engine ran, for whoever calls `take_step_times`. A request
   that was preempted in between tells nothing.

The servers are those of `verl_patches.vllm_stream_server`.
"""

import asyncio
import contextvars
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from darts.latency import StepTimes
from darts.messages import Chunk

POLL_S = 5.0
MEDIA = ("image_data", "video_data", "audio_data", "mm_processor_kwargs")
"""What a request of verl's client holds besides tokens and sampling parameters."""

PREEMPTED = 2
"""A request was preempted if its engine has made more than so many steps for each of its tokens."""


class AbortTimeout(TimeoutError):
    """A server did not end a request that was aborted."""


class CandidateStopped(asyncio.CancelledError):
    """Unwinds the agent loop of a candidate that is not needed any more."""


class RequestListener(Protocol):
    """Who is told what the requests of the current task do."""

    chunk_tokens: int
    first_tokens: int  # of the first chunk
    routing_key: str | None  # requests of one key go to one server; None: wherever verl sends them
    over: bool  # no further request is wanted

    def opened(self, request: "OpenRequest") -> None:
        """A request is on its way."""

    def grew(self, request: "OpenRequest", chunk: Chunk, latency: float) -> None:
        """A chunk arrived `latency` seconds after it was made (by the clocks of both hosts)."""

    def dropped(self, request: "OpenRequest") -> None:
        """Whoever waited for a request waits no longer; it is stopped, and nothing more is heard of it."""

    def closed(self, request: "OpenRequest", output: TokenOutput, finish_reason: str) -> bool:
        """A request ended, by `stop`, `length` or `abort`, with all its tokens. Returns whether the loop goes on."""


current_listener: contextvars.ContextVar[RequestListener | None] = contextvars.ContextVar("darts", default=None)


class OpenRequest:
    """A request that a server runs."""

    def __init__(self, request: dict[str, Any], server_id: str, server: Any, listener: RequestListener) -> None:
        self.request_id: str = request["request_id"]
        self.prompt_ids: list[int] = request["prompt_ids"]
        self.media = {name: value for name, value in request.items() if name in MEDIA and value is not None}
        self.server_id = server_id
        self.server = server
        self.listener = listener
        self.opened_at = time.monotonic()
        self.tokens = 0  # generated, as far as chunks tell
        self._chunk: Chunk | None = None  # the last one
        self._answer: asyncio.Future | None = None
        self._failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._limit: asyncio.TimerHandle | None = None

    async def wait(self, ref: ray.ObjectRef) -> TokenOutput:
        """The server's answer, or the failure that was set in between. A cancelled wait leaves the request watched."""
        self._answer = asyncio.ensure_future(ref)
        self._answer.add_done_callback(self._ended)
        await asyncio.wait({self._answer, self._failure}, return_when=asyncio.FIRST_COMPLETED)
        if self._answer.done():
            return self._answer.result()
        raise self._failure.result()

    def grow(self, chunk: Chunk, step_times: StepTimes) -> None:
        """Takes a chunk; the steps since the one before go to `step_times`, with the sequences that an engine ran."""
        last_chunk, self._chunk = self._chunk, chunk
        self.tokens = chunk.offset + len(chunk.token_ids)
        # Equal or earlier where the server's clock was set. The first chunk's time has the prompt's in it.
        if last_chunk is None or chunk.made_at <= last_chunk.made_at:
            return
        was_preempted = chunk.steps - last_chunk.steps > PREEMPTED * len(chunk.token_ids)
        if not was_preempted and last_chunk.running and chunk.running:  # 0: the server does not know
            mean_running = max((last_chunk.running + chunk.running) / 2, 1.0)
            step_times.add(mean_running, chunk.made_at - last_chunk.made_at, len(chunk.token_ids))

    @property
    def ended(self) -> bool:
        """Whether the server has answered."""
        return self._answer is not None and self._answer.done()

    @property
    def stopping(self) -> bool:
        """Whether an abort was sent."""
        return self._limit is not None

    def fail(self, error: Exception) -> None:
        """Ends the wait with an error."""
        if not self._failure.done():
            self._failure.set_result(error)

    def limit(self, seconds: float) -> None:
        """From now on the wait ends after `seconds`."""
        if self.stopping or self.ended:
            return
        error = AbortTimeout(
            f"server {self.server_id} did not stop request {self.request_id} within "
            f"darts.streaming.abort_timeout_s={seconds:g} of its abort: look at the server's log."
        )
        self._limit = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def _ended(self, answer: asyncio.Future) -> None:
        if self._limit is not None:
            self._limit.cancel()
        if not answer.cancelled():
            answer.exception()  # nobody may be left to hear it


class DartsServerClient(LLMServerClient):
    """verl's client, streaming for whoever listens. Arguments as `LLMServerClient`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._name = uuid.uuid4().hex
        self._open: dict[str, OpenRequest] = {}
        self._running: Counter[str] = Counter()
        self._pollers: dict[str, asyncio.Task] = {}
        self._step_times = StepTimes()

    @classmethod
    def of(cls, client: LLMServerClient) -> "DartsServerClient":
        """A client of the same servers."""
        return cls(config=client.config, load_balancer_handle=client._load_balancer)

    def __reduce__(self) -> Any:
        """Each process gets a client of its own, with a name of its own."""
        return type(self).of, (LLMServerClient(self.config, self._load_balancer),)

    def abort(self, requests: Iterable[OpenRequest], timeout_s: float) -> None:
        """Stops requests. Their `generate` ends with the tokens so far, or fails after `timeout_s`."""
        requests = list(requests)
        for request in requests:
            request.limit(timeout_s)
        self._send_abort(requests)

    def abort_open(self, timeout_s: float) -> None:
        """Stops every request that is still open."""
        self.abort(self._open.values(), timeout_s)

    def take_step_times(self) -> StepTimes:
        """How long decoding steps took, since the last call, on all servers that streamed to this client."""
        taken_times, self._step_times = self._step_times, StepTimes()
        return taken_times

    def _send_abort(self, requests: list[OpenRequest]) -> None:
        by_server: dict[str, list[OpenRequest]] = {}
        for request in requests:
            by_server.setdefault(request.server_id, []).append(request)
        for group in by_server.values():
            group[0].server.abort_streams.remote([request.request_id for request in group])

    def _vllm_request_id(self, request_id: str) -> str:
        """An id for each request: under `full_determinism` verl's would be the same in every turn and step."""
        return uuid.uuid4().hex if current_listener.get() is not None else super()._vllm_request_id(request_id)

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        listener = current_listener.get()
        if listener is None:
            return await super()._acquire_server(request_id, **extra)
        balancer_key = listener.routing_key or request_id
        acquired_server = asyncio.ensure_future(super()._acquire_server(balancer_key, **extra))
        try:
            server_id, server = await asyncio.shield(acquired_server)
        except asyncio.CancelledError:  # the balancer has counted this request, or will
            acquired_server.add_done_callback(lambda _: self._release_acquired(acquired_server, balancer_key))
            raise
        # verl's `generate` calls `server.generate.remote(...)`.
        streamed_call = partial(self.generate_streamed, server_id, server, listener)
        return server_id, SimpleNamespace(generate=SimpleNamespace(remote=streamed_call))

    def _release_acquired(self, acquired: asyncio.Future, key: str) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            super()._release_server(acquired.result()[0], request_id=key)

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        listener = current_listener.get()
        routing_key = listener.routing_key if listener is not None else None
        super()._release_server(server_id, request_id=routing_key or request_id)

    async def generate_streamed(
        self, server_id: str, server: Any, listener: RequestListener, /, **request: Any
    ) -> TokenOutput:
        """Runs one request on a server, with its chunks going to the listener."""
        if listener.over:
            raise CandidateStopped
        open_request = OpenRequest(request, server_id, server, listener)
        chunk_sizes = {"chunk_tokens": listener.chunk_tokens, "first_tokens": listener.first_tokens}
        answer_ref = server.generate_streamed.remote(client=self._name, **chunk_sizes, **request)
        self._open[open_request.request_id] = open_request
        self._running[server_id] += 1
        if server_id not in self._pollers:
            self._pollers[server_id] = asyncio.create_task(self._poll(server_id, server))
        try:
            listener.opened(open_request)
            output = await open_request.wait(answer_ref)
        except BaseException:
            if not (open_request.ended or open_request.stopping):
                self._send_abort([open_request])
            listener.dropped(open_request)
            raise
        finally:
            del self._open[open_request.request_id]
            self._running[server_id] -= 1
        if not listener.closed(open_request, output, output.extra_fields.pop("finish_reason")):
            raise CandidateStopped
        return output

    async def _poll(self, server_id: str, server: Any) -> None:
        """Hands out the chunks of one server while requests run there."""
        try:
            while self._running[server_id]:
                chunks = await server.take_chunks.remote(self._name, POLL_S)
                received_at = time.time()
                for chunk in chunks:
                    if (open_request := self._open.get(chunk.request_id)) is not None:
                        open_request.grow(chunk, self._step_times)
                        open_request.listener.grew(open_request, chunk, max(received_at - chunk.made_at, 0.0))
        except ray.exceptions.RayActorError:
            pass  # the requests that run there fail with the same cause
        except Exception as error:
            for open_request in self._open.values():
                if open_request.server_id == server_id:
                    open_request.fail(error)
        finally:
            del self._pollers[server_id]
