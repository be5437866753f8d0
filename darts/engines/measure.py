"""Measures the latency curve of an engine on running servers.

Contract. `profile_servers` drives all servers that it is given at once. It starts none: `darts.engines.command` does,
and the trainer has them.

1. A figure is the time of decoding steps alone. All requests of a batch size decode before the clock runs, so prefill,
   queues and calls are outside; it stops before the first one ends. By the servers' clocks, the median over requests.
2. Every engine gets exactly as many requests as the batch size says, with different prompts, sampled as the rollout's.
   A batch size that the engines do not run at once, by their own count, is none: what is open may wait for KV cache.
3. No batch size is started that would, in proportion to the last, end after the limit; what was measured by then is the
   profile. Fewer than two batch sizes are an error.
4. Whatever happens, requests are aborted and have ended before `profile_servers` returns or raises.

The file of a profile is `darts.evidence.profile`.
"""

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

from darts.checks.model import model_config, model_id, vocabulary
from darts.evidence.machine import UNKNOWN, installed, processor
from darts.evidence.profile import LatencyProfile

TOKENS = 96
CHUNKS = 8
"""Chunks in the timed part of a request."""
MARGIN = 16
"""Tokens that the first of a batch may make before all of it decode."""
MOST_PROMPT_TOKENS = 256
"""Prompts are as long as the run's may be, up to this: they only fill the cache, and cost time to prefill."""
WARM_UP_SIZE = 8
SIZES = ("max_num_seqs", "max_model_len", "prompt_length", "data_parallel_size", "tensor_model_parallel_size")
AT_ONCE = 0.9
"""Share of a batch that an engine must run at once, in the median over the timed part."""
STOP_S = 30.0
"""Seconds in which a server must have ended aborted requests."""

DRAWS = random.Random()
"""A generator apart: whether engines were measured shall not show in anything that is drawn later."""


class ProfileError(RuntimeError):
    """Servers could not be measured; nothing runs on them."""


class StuckRequests(RuntimeError):
    """A server did not end what was aborted: it cannot be used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What an engine is given to do."""

    batch_sizes: tuple[int, ...]
    tokens: int  # of a request, to be timed
    prompt_tokens: int
    max_tokens: int  # of a request, if nothing aborts it
    vocabulary: int
    engines_per_server: int  # data-parallel ranks
    sampling: dict[str, Any]

    @classmethod
    def plan(
        cls,
        rollout: Any,
        vocabulary: int,
        largest: int | None = None,
        tokens: int | None = None,
        prompt_tokens: int | None = None,
        seeded: bool = False,
    ) -> "Workload":
        """Batch sizes 1, 2, 4, ... up to the smaller of `max_num_seqs` and `largest`.

        Args:
            rollout: verl's `RolloutConfig`, or the configuration that becomes one.
            vocabulary: Size of the model's.
            largest: Largest batch size; None: `max_num_seqs`.
            tokens: Decoding steps to be timed; None: `TOKENS`, or as many as fit into the context.
            prompt_tokens: Of a request; None: `rollout.prompt_length`, at most `MOST_PROMPT_TOKENS`.
            seeded: Requests have a sampling seed each, as with `darts.seed`.

        Raises:
            ValueError: fewer than two batch sizes, too few tokens, a context that is too short for them, or a size in
                `rollout` that is no integer.
        """
        for name in SIZES:
            value = getattr(rollout, name)
            if not isinstance(value, int) and (value, name) != (None, "max_model_len"):
                raise ValueError(f"actor_rollout_ref.rollout.{name}={value!r}: must be an integer.")
        # 1. The batch sizes.
        top = rollout.max_num_seqs if largest is None else min(largest, rollout.max_num_seqs)
        if top < 2:
            raise ValueError(f"largest batch size {top}: must be at least 2 (max_num_seqs={rollout.max_num_seqs}).")
        # 2. How many tokens are timed, and whether they fit behind the prompt.
        prompt = min(rollout.prompt_length, MOST_PROMPT_TOKENS) if prompt_tokens is None else prompt_tokens
        if prompt < 1:
            raise ValueError(f"prompt_tokens={prompt}: must be at least 1.")
        context = rollout.max_model_len
        if tokens is None:
            context_room = TOKENS if context is None else (context - prompt - MARGIN) * CHUNKS // (CHUNKS + 2)
            tokens = max(min(TOKENS, context_room), CHUNKS)
        if tokens < CHUNKS:
            raise ValueError(f"tokens={tokens}: must be at least {CHUNKS}.")
        # Before all of a batch decode, the first to do so have made some tokens, and two chunks are not timed.
        needed_tokens = tokens + 2 * tokens // CHUNKS + MARGIN
        if context is not None and prompt + needed_tokens > context:
            raise ValueError(
                f"prompt_tokens={prompt}, tokens={tokens}: {prompt + needed_tokens} tokens do not fit into "
                f"max_model_len={context}."
            )
        return cls(
            batch_sizes=tuple(sorted({*(1 << power for power in range(top.bit_length())), top})),
            tokens=tokens,
            prompt_tokens=prompt,
            max_tokens=min(4 * needed_tokens + 256, sys.maxsize if context is None else context - prompt),
            vocabulary=vocabulary,
            engines_per_server=rollout.data_parallel_size,
            sampling={
                "temperature": rollout.temperature,
                "top_p": rollout.top_p,
                "top_k": rollout.top_k,
                "logprobs": bool(rollout.calculate_log_probs),
                "seeded": seeded,
            },
        )

    def request(self) -> dict[str, Any]:
        """A new request, as arguments of `generate_streamed`."""
        sampling = {key: value for key, value in self.sampling.items() if key != "seeded"}
        if self.sampling["seeded"]:
            sampling["seed"] = DRAWS.getrandbits(31)
        # From the middle of the vocabulary: special tokens stand at its ends.
        low_token, high_token = self.vocabulary // 4, self.vocabulary // 2
        return {
            "request_id": uuid4().hex,
            "prompt_ids": DRAWS.choices(range(low_token, high_token), k=self.prompt_tokens),
            "sampling_params": sampling | {"ignore_eos": True, "max_tokens": self.max_tokens},
            "chunk_tokens": max(self.tokens // CHUNKS, 1),
        }


async def profile_servers(
    servers: Sequence[Any],
    model: str,
    *,
    limit_s: float = 60.0,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
    **wanted: Any,
) -> LatencyProfile:
    """Measures PTL on idle, running servers (`verl_patches.vllm_stream_server`), all at once.

    Args:
        servers: Handles, as `LLMServerManager.server_handles` has them. All alike, awake, with weights.
        model: `actor_rollout_ref.model.path`.
        limit_s: Seconds that it may take, but for the end of what runs then.
        command: What measures again, for the profile.
        say: Gets a line per batch size.
        wanted: Of the workload, as `Workload.plan`.

    Raises:
        ValueError: as `Workload.plan`, no servers, or a limit that is not positive.
        ConfigError: as `model_id`.
        ProfileError: fewer than two batch sizes within the limit, or a server that does not answer.
        StuckRequests: a server that does not stop its requests.
    """
    if not servers:
        raise ValueError("servers=[]: there must be at least one.")
    if not limit_s > 0:
        raise ValueError(f"limit_s={limit_s}: must be positive.")
    end_s = time.monotonic() + limit_s
    # 1. What the servers are, and what they are given to do.
    try:
        rollout = await asyncio.wait_for(servers[0].get_rollout_config.remote(), limit_s)
        device = await asyncio.wait_for(engine_device(servers[0]), limit_s)
    except asyncio.TimeoutError:
        raise ProfileError(f"a server did not answer within {limit_s:g} s: look at its log.") from None
    workload = Workload.plan(rollout, vocabulary(model_config(model)), **wanted)
    # 2. Batch size and seconds of a step, as many as can be had until the end.
    sizes, points, took_s = workload.batch_sizes, [], 0.0
    try:
        say("warming up")
        # The first generation of an engine compiles and allocates.
        await _step_seconds(servers, replace(workload, tokens=CHUNKS), min(WARM_UP_SIZE, sizes[-1]), end_s)
        for size_number, size in enumerate(sizes, 1):
            expected_s, left_s = took_s * size / points[-1][0] if points else 0.0, end_s - time.monotonic()
            if expected_s > left_s:
                say(f"stopped: {size} sequences may take {expected_s:.1f} s, {left_s:.1f} s of {limit_s:g} s are left")
                break
            start_s = time.monotonic()
            step_s = await _step_seconds(servers, workload, size, end_s)
            if step_s is None:
                say(f"stopped: the engine does not run {size} sequences at once")
                break
            took_s = time.monotonic() - start_s
            points.append((size, step_s))
            progress_bar = f"[{'#' * size_number}{'.' * (len(sizes) - size_number)}] {size_number}/{len(sizes)}"
            say(f"{progress_bar} {size:5d} sequences {step_s * 1e3:9.3f} ms per step")
    except asyncio.TimeoutError:
        say(f"stopped: the limit of {limit_s:g} s is reached")
    if len(points) < 2:
        raise ProfileError(
            f"{len(points)} of {len(sizes)} batch sizes could be measured within {limit_s:g} s, a curve needs at least "
            "2: give it more time, or look at the log of the servers."
        )
    return LatencyProfile(
        model=model,
        model_id=model_id(model),
        tensor_parallel=rollout.tensor_model_parallel_size,
        device=device,
        versions={name: installed(name) or UNKNOWN for name in ("verl", "vllm", "torch")},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        engines=len(servers) * workload.engines_per_server,
        max_num_seqs=rollout.max_num_seqs,
        prompt_tokens=workload.prompt_tokens,
        tokens=workload.tokens,
        sampling=workload.sampling,
        batch_sizes=[size for size, _ in points],
        seconds=[seconds for _, seconds in points],
    )


async def _step_seconds(servers: Sequence[Any], work: Workload, size: int, end_s: float) -> float | None:
    """Seconds of a step with `size` sequences on every engine; None if they do not all run at once.

    Raises:
        asyncio.TimeoutError: not until `end_s`.
    """
    batches = [_Batch(server, work, size * work.engines_per_server) for server in servers]
    watch_tasks = [asyncio.ensure_future(batch.watch()) for batch in batches]
    try:
        paces = await asyncio.wait_for(asyncio.gather(*watch_tasks), end_s - time.monotonic())
    finally:
        for task in watch_tasks:
            task.cancel()
        # All of them, also if one fails.
        for failure in await asyncio.gather(*[batch.stop() for batch in batches], return_exceptions=True):
            if failure is not None:
                raise failure
    if None in paces:
        return None
    return statistics.median(pace for server_paces in paces for pace in server_paces)


class _Batch:
    """Requests that run on one server at once."""

    def __init__(self, server: Any, work: Workload, size: int) -> None:
        self._server = server
        self._tokens = work.tokens
        self._engine_size = size / work.engines_per_server
        self._client = uuid4().hex
        self._answers: dict[str, asyncio.Future[Any]] = {}
        for request in [work.request() for _ in range(size)]:
            pending_answer = server.generate_streamed.remote(client=self._client, **request)
            self._answers[request["request_id"]] = asyncio.ensure_future(pending_answer)

    async def watch(self) -> list[float] | None:
        """Seconds per step of each request, while all of them decode; None if they do not all run at once."""
        not_begun, timed_names, running_counts = set(self._answers), set(), []
        clocks: dict[str, list[float]] = {}  # since, until, tokens in between
        while len(timed_names) < len(self._answers):
            for chunk in await self._server.take_chunks.remote(self._client, 1.0):
                request_name = chunk.request_id
                if not_begun:
                    not_begun.discard(request_name)
                elif request_name not in clocks:
                    clocks[request_name] = [chunk.made_at, chunk.made_at, 0]
                else:
                    running_counts.append(chunk.running)
                    clocks[request_name][1] = chunk.made_at
                    clocks[request_name][2] += len(chunk.token_ids)
                    if clocks[request_name][2] >= self._tokens:
                        timed_names.add(request_name)
            if ended := [answer for answer in self._answers.values() if answer.done()]:
                for answer in ended:
                    answer.result()  # raises what went wrong
                break
        if running_counts and statistics.median(running_counts) < AT_ONCE * self._engine_size:
            return None
        paces = [(until_s - since_s) / tokens for since_s, until_s, tokens in clocks.values() if tokens]
        return paces if len(paces) == len(self._answers) else None

    async def stop(self) -> None:
        """Aborts what runs and waits for its end."""
        unended = {name: answer for name, answer in self._answers.items() if not answer.done()}
        if unended:
            abort_call = asyncio.ensure_future(self._server.abort_streams.remote(list(unended)))
            _, stuck_answers = await asyncio.wait(unended.values(), timeout=STOP_S)
            abort_call.cancel()  # if it fails, so do the requests
            await asyncio.gather(abort_call, return_exceptions=True)
            if stuck_answers:
                late = f"{len(stuck_answers)} requests within {STOP_S:g} s of their abort"
                raise StuckRequests(f"a server did not stop {late}.")
        for answer in self._answers.values():
            if not answer.cancelled():
                answer.exception()  # whoever needed it has heard it


async def kv_capacity(server: Any) -> int | None:
    """Tokens for which the KV cache of one of a server's engines has room; None: no limit is known."""
    return await server.kv_tokens.remote()


async def engine_device(server: Any) -> str:
    """The device of a server's engine: the name of its GPU, or of the CPU with the number of its cores."""
    return await server.__ray_call__.remote(_device)


def _device(server: Any) -> str:
    """Runs in the server: the driver may have another device, or none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"
