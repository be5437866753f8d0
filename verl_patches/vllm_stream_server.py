"""verl's vLLM server, with requests that stream and that can be stopped. For GPU and CPU alike.

Contract. `StreamingServer` is `verl.workers.rollout.vllm_rollout.vllm_async_server.vLLMHttpServer` (verl 0.9.1) with
four methods more. Everything else is upstream's: gates, LoRA, limits, HTTP, and `generate` for whoever calls it.

1. `generate_streamed` is `generate` with chunks of new tokens on the side, for `take_chunks`. Its answer has all tokens
   and, in `extra_fields["finish_reason"]`, vLLM's own reason: `stop`, `length` or `abort`; aborted requests too.
2. `take_chunks` gives the chunks of all requests of one client at once, so its calls do not grow with the requests.
   Each chunk says how many sequences an engine of the server ran then, whoever's, and how many steps it had made, so
   that clients learn what a step costs. Both are counted in what the engines send (`_EngineSteps`): requests that are
   open may wait, for a place or, preempted, for KV cache.
3. `abort_streams` stops any number of requests in one call, keeps the prefix cache, and answers which of them ran. One
   abort is enough: a request on its way into the engine is stopped as soon as the engine knows it, and one on its way
   to the server, whose abort Ray ran first, ends without tokens. So an id that was aborted is not used again.
4. `generate` reaches the engine through `_StreamingEngine`, which cuts the output of streamed requests into chunks. On
   vLLM before 0.28, which has no stream interval per request, the engine's front end wakes for every token, as it does
   under plain verl.
5. `kv_tokens` tells for how many tokens an engine's KV cache has room.
6. A call that waits (1,500 requests on one server) must not keep an abort waiting: the replica admits `MAX_OPEN_CALLS`.

`register()` puts it in the place of verl's own for the name `vllm`, in the process that starts the servers.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from darts.messages import Chunk

logger = logging.getLogger(__name__)

MAX_OPEN_CALLS = 65_536
"""Calls that a server actor runs at once; waiting calls cost it next to nothing."""

MAX_EARLY_ABORTS = 65_536
"""Aborts that came before their request, or after its end, and are remembered."""

ABORT_WAITS_S = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between the attempts to abort a request that the engine does not know yet; the last one comes again."""

FRESH_S = 1.0
"""An engine of several that has made no step for so long runs nothing."""

HAS_STREAM_INTERVAL = "stream_interval" in SamplingParams.__struct_fields__


@dataclass(slots=True)
class _Outbox:
    """Chunks that a client has not fetched."""

    chunks: list[Chunk] = field(default_factory=list)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    streams: int = 0  # requests of the client that run
    takers: int = 0  # calls of the client that wait


@dataclass(slots=True)
class _EngineSteps:
    """Decoding steps of a server's engines (its data-parallel ranks), by the outputs that they send.

    An engine sends one output for each step, with an entry for every sequence that got a token. That needs no
    statistics of vLLM's, which verl switches off (`disable_log_stats`) and which cost time for each token, and it does
    not count a sequence that was preempted, which has begun and not ended. Under pipeline parallelism, which verl does
    not offer, an output is that of a micro-batch.
    """

    last: dict[int, tuple[int, float]] = field(default_factory=dict)  # engine -> sequences of its last step, when
    total: int = 0  # steps of all engines

    def watch(self, engine: Any) -> None:
        """Counts what `AsyncLLM`'s output handler gets from the engine cores, by one call per step."""
        core, get_output = engine.engine_core, engine.engine_core.get_output_async

        async def get_output_async() -> Any:
            outputs = await get_output()
            self.add(outputs.engine_index, len(outputs.outputs))
            return outputs

        core.get_output_async = get_output_async

    def add(self, engine_index: int, num_sequences: int) -> None:
        """An engine has made a step; one without sequences is none."""
        if num_sequences:
            self.last[engine_index] = num_sequences, time.monotonic()
            self.total += 1

    @property
    def running(self) -> float:
        """Sequences in the last step of an engine, mean over the engines that run any; 0.0 before the first step."""
        now = time.monotonic()
        counts = [count for count, made_at in self.last.values() if now - made_at < FRESH_S or len(self.last) == 1]
        return sum(counts) / len(counts) if counts else 0.0

    @property
    def steps(self) -> int:
        """Steps so far, mean over the engines that have run any."""
        return self.total // max(len(self.last), 1)


@dataclass(slots=True)
class _Stream:
    """One streamed request."""

    request_id: str
    chunk_tokens: int
    first_tokens: int  # of the first chunk
    outbox: _Outbox
    engine_steps: _EngineSteps = field(repr=False)
    delta: bool = True  # outputs hold the new tokens, not all
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    sent: int = 0
    aborted: bool = False
    finish_reason: str = "abort"  # of a request that never reached the engine, too

    def add(self, output: RequestOutput) -> None:
        """Takes the new tokens of an output; a finished one then has all tokens."""
        for part in output.outputs:
            new_tokens = part.token_ids if self.delta else part.token_ids[len(self.token_ids) :]
            self.token_ids.extend(new_tokens)
            if new_tokens and part.logprobs is not None:
                # Where there are no new tokens, vLLM gives the log-probs of all.
                self.logprobs.extend(part.logprobs[-len(new_tokens) :])
            if output.finished:
                part.token_ids = self.token_ids
                part.logprobs = self.logprobs if part.logprobs is not None else None
                self.finish_reason = part.finish_reason
        least_tokens = self.chunk_tokens if self.sent else self.first_tokens
        if not output.finished and len(self.token_ids) - self.sent >= least_tokens:
            self._send()

    def _send(self) -> None:
        new_tokens, engines = self.token_ids[self.sent :], self.engine_steps
        chunk = Chunk(self.request_id, self.sent, new_tokens, time.time(), engines.running, engines.steps)
        self.outbox.chunks.append(chunk)
        self.outbox.filled.set()
        self.sent = len(self.token_ids)


# The stream of the call that the current task serves; None for upstream's plain path.
_stream: contextvars.ContextVar[_Stream | None] = contextvars.ContextVar("stream", default=None)


class _StreamingEngine:
    """vLLM's engine; what is generated under a stream goes there chunk by chunk, and to verl as one whole."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, **request: Any) -> AsyncIterator[RequestOutput]:
        """Generates as `AsyncLLM` does."""
        stream = _stream.get()
        return self._engine.generate(**request) if stream is None else self._streamed(stream, **request)

    async def _streamed(
        self, stream: _Stream, *, sampling_params: SamplingParams, **request: Any
    ) -> AsyncIterator[RequestOutput]:
        if stream.aborted:
            yield RequestOutput(
                request_id=stream.request_id, prompt=None, prompt_token_ids=None, prompt_logprobs=None, outputs=[],
                finished=True,
            )  # fmt: skip
            return
        if stream.delta:
            sampling_params.output_kind = RequestOutputKind.DELTA
            if HAS_STREAM_INTERVAL:
                sampling_params.stream_interval = stream.chunk_tokens
        prompt_logprobs = None
        try:
            async for output in self._engine.generate(sampling_params=sampling_params, **request):
                prompt_logprobs = output.prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                stream.add(output)
                yield output
        except EngineDeadError:
            # vLLM gives all requests one exception, whose traceback grows with each that raises it: with 300 open
            # requests it took Ray 40 s to report them all.
            raise EngineDeadError from None


class StreamingServer(vLLMHttpServer):
    """verl's vLLM server with streamed requests; see the module's contract."""

    def _post_init(self, cuda_visible_devices: str) -> None:
        super()._post_init(cuda_visible_devices)
        self._engine_steps = _EngineSteps()
        self._streams: dict[str, _Stream] = {}
        self._outboxes: dict[str, _Outbox] = {}
        self._early_aborts: dict[str, None] = {}  # ids, the oldest first

    async def run_server(self, args: Any) -> None:
        await super().run_server(args)
        self._engine_steps.watch(self.engine)
        self.engine = _StreamingEngine(self.engine)

    async def kv_tokens(self) -> int | None:
        """Tokens for which the KV cache of one engine (data-parallel rank) has room; None: vLLM does not tell.

        By vLLM's own account, which it also logs. Compressed caches are in it, and so are layers with a sliding window
        or a state of fixed size, but for sequences as long as the context: of shorter ones fewer tokens find room.
        """
        return getattr(self.engine.vllm_config.cache_config, "kv_cache_size_tokens", None)

    async def generate_streamed(
        self, *, client: str, chunk_tokens: int, request_id: str, first_tokens: int | None = None, **request: Any
    ) -> TokenOutput:
        """Generates as `generate` does; chunks of `chunk_tokens` tokens wait for `take_chunks(client)` meanwhile.

        The first one has `first_tokens`; None: as many as the others. With 1 it tells when the request has begun.

        Raises:
            ValueError: a request of this id runs already.
        """
        if request_id in self._streams:
            raise ValueError(f"request_id={request_id!r} runs already; each request needs an id of its own.")
        outbox = self._outboxes.setdefault(client, _Outbox())
        # vLLM loses `routed_experts` where it merges two outputs of kind DELTA.
        wants_delta = not self.config.enable_rollout_routing_replay
        first_tokens = chunk_tokens if first_tokens is None else first_tokens
        stream = _Stream(request_id, chunk_tokens, first_tokens, outbox, self._engine_steps, wants_delta)
        self._streams[request_id] = stream
        stream.aborted = request_id in self._early_aborts
        self._early_aborts.pop(request_id, None)
        outbox.streams += 1
        _stream.set(stream)
        try:
            output = await self.generate(request_id=request_id, **request)
        finally:
            del self._streams[request_id]
            outbox.streams -= 1
            self._release(client, outbox)
        output.extra_fields["finish_reason"] = stream.finish_reason
        return output

    async def take_chunks(self, client: str, wait_s: float) -> list[Chunk]:
        """The chunks since the last call, at once if there are any; empty after `wait_s` seconds, or once the client's
        last request has ended."""
        outbox = self._outboxes.setdefault(client, _Outbox())
        outbox.takers += 1
        try:
            await asyncio.wait_for(outbox.filled.wait(), wait_s)
        except asyncio.TimeoutError:
            pass
        finally:
            outbox.takers -= 1
            outbox.filled.clear()
            chunks, outbox.chunks = outbox.chunks, []
            self._release(client, outbox)
        return chunks

    async def abort_streams(self, request_ids: list[str]) -> list[str]:
        """Stops streamed requests. Returns the ids of those that ran."""
        running_ids = [request_id for request_id in request_ids if request_id in self._streams]
        for request_id in running_ids:
            self._streams[request_id].aborted = True
        self._early_aborts |= dict.fromkeys(name for name in request_ids if name not in self._streams)
        while len(self._early_aborts) > MAX_EARLY_ABORTS:
            del self._early_aborts[next(iter(self._early_aborts))]
        still_running, attempt = running_ids, 0
        while True:
            await asyncio.sleep(ABORT_WAITS_S[min(attempt, len(ABORT_WAITS_S) - 1)])
            still_running = [request_id for request_id in still_running if request_id in self._streams]
            if not still_running:
                return running_ids
            if attempt == len(ABORT_WAITS_S):
                logger.warning("aborted requests still run: %s", still_running)
            await self.engine.abort(still_running)
            attempt += 1

    def _release(self, client: str, outbox: _Outbox) -> None:
        """Wakes a waiting call when nothing will come any more, and forgets a client that has left."""
        if outbox.streams == 0:
            outbox.filled.set()
            if outbox.takers == 0 and self._outboxes.get(client) is outbox:
                del self._outboxes[client]


class StreamingReplica(vLLMReplica):
    """verl's vLLM replica with `StreamingServer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(StreamingServer)

    @property
    def max_concurrency(self) -> int:
        """Calls that a server runs at once."""
        return max(super().max_concurrency, MAX_OPEN_CALLS)


def register() -> None:
    """Makes verl start `StreamingServer`s for the rollout named `vllm`; a registered subclass is left as it is.

    Raises:
        RuntimeError: another plugin has registered a replica of its own.
    """
    registered: type[RolloutReplica] = RolloutReplicaRegistry.get("vllm")
    if issubclass(registered, StreamingReplica):
        return
    if registered is not vLLMReplica:
        raise RuntimeError(
            f"the rollout `vllm` is registered as {registered.__module__}.{registered.__qualname__}, which cannot "
            "stream: make it a subclass of verl_patches.vllm_stream_server.StreamingReplica."
        )
    RolloutReplicaRegistry.register("vllm", lambda: StreamingReplica)
