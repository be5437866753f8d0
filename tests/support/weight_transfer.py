"""Processes that move weights through verl's checkpoint engine `gloo`, as `CheckpointEngineManager` has them do it."""

import asyncio
import hashlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Children of a process that has done the imports, and nothing else: no threads of torch's.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["verl_patches.weights.gloo"])


def weights_of(seed: int, sizes: list[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Tensors of random bits: every byte counts, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape, dtype in sizes:
        numbers = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator)
        made[name] = numbers.to(torch.uint8).view(dtype).view(shape)
    return made


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def described(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...], str]]:
    return [(name, w.dtype, tuple(w.shape), digest(w)) for name, w in weights.items()]


class Member:
    """One process with an engine; calls return at once, `answer` waits."""

    def __init__(self, is_master: bool, bucket_size: int, timeout_s: float, poll_s: float) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, is_master, bucket_size, timeout_s, poll_s))
        self.process.start()

    def call(self, what: Callable[..., Any], *args: Any) -> None:
        """`what(engine, *args)` in the process, a function of this module or a method's name."""
        self._pipe.send((what, args))

    def answer(self, limit_s: float = 600.0) -> Any:
        """What the last call gave; its exception as text."""
        assert self._pipe.poll(limit_s), f"no answer within {limit_s:g} s"
        return self._pipe.recv()


@contextmanager
def members(actors: int, receivers: int, bucket_size: int, timeout_s: float = 900.0) -> Iterator[list[Member]]:
    """Actor ranks, then receivers. No test's answer comes of the limit of silence: it is above that of `answer`."""
    made = [Member(rank == 0, bucket_size, timeout_s, 0.1) for rank in range(actors + receivers)]
    try:
        yield made
    finally:
        for member in made:
            member.process.kill()
            member.process.join()


def connect(made: list[Member], actors: int) -> list[dict[str, Any]]:
    """`CheckpointEngineManager.build_process_group`; returns each member's arguments."""
    from verl_patches.weights.gloo import GlooCheckpointEngine

    for member in made:
        member.call("prepare")
    metadata = [member.answer() for member in made]
    ours, theirs = GlooCheckpointEngine.build_topology(actors, len(made) - actors, metadata)
    rows = [
        {key: values[i] for key, values in side.items()} for side in (ours, theirs) for i in range(len(side["rank"]))
    ]
    for member, row in zip(made, rows, strict=True):
        member.call(_init, row)
    assert [member.answer() for member in made] == [None] * len(made)
    return rows


def _serve(pipe: Connection, is_master: bool, bucket_size: int, timeout_s: float, poll_s: float) -> None:
    from verl_patches.weights import gloo as module

    module.POLL_S = poll_s
    engine = module.GlooCheckpointEngine(bucket_size, is_master=is_master, timeout_s=timeout_s)
    loop = asyncio.new_event_loop()  # one for all calls, as an actor of Ray has
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(engine, what)(*args) if isinstance(what, str) else what(engine, *args)
            pipe.send(loop.run_until_complete(result) if asyncio.iscoroutine(result) else result)
        except Exception as error:
            pipe.send("".join(traceback.format_exception_only(error)).strip())
            del error
        loop.run_until_complete(asyncio.sleep(0.01))  # as Ray's loop goes on: it closes what a failure left open


# --- calls -----------------------------------------------------------------------------------------------------------


def _init(engine: Any, arguments: dict[str, Any]) -> None:
    engine.init_process_group(**arguments)


async def send(engine: Any, seed: int, sizes: list) -> int:
    """Sends `weights_of(seed, sizes)`; returns how many of them the engine walked."""
    walked = []

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights_of(seed, sizes).items():
            walked.append(name)
            yield name, weight

    await engine.send_weights(walk())
    return len(walked)


async def send_transposed(engine: Any, seed: int, sizes: list) -> None:
    """Sends views that are not contiguous and want gradients, as a model's parameters may be."""
    await engine.send_weights((name, w.t().requires_grad_()) for name, w in weights_of(seed, sizes).items())


async def send_and_fail(engine: Any, seed: int, sizes: list) -> None:
    """The trainer's model fails in the middle."""

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights_of(seed, sizes).items())[: len(sizes) // 2]
        raise ValueError("the model cannot be gathered")

    await engine.send_weights(walk())


async def receive(engine: Any) -> list[tuple]:
    """All weights; each is looked at only when all have come."""
    return described({name: weight async for name, weight in engine.receive_weights()})


async def receive_and_fail(engine: Any) -> None:
    """vLLM takes the first weight and fails at it."""
    async for name, _ in engine.receive_weights():
        raise KeyError(f"vLLM knows no {name}")


async def receive_and_die(engine: Any) -> None:
    async for _ in engine.receive_weights():
        os._exit(1)


async def send_and_die(engine: Any, seed: int, sizes: list) -> None:
    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights_of(seed, sizes).items())[: len(sizes) // 2]
        os._exit(1)

    await engine.send_weights(walk())


def limit_silence(engine: Any, seconds: float) -> None:
    engine._group.timeout_s = seconds


async def send_late(engine: Any, seed: int, sizes: list, gate: Path) -> None:
    """Sends once a file is there."""

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        while not gate.exists():
            time.sleep(0.02)
        yield from weights_of(seed, sizes).items()

    await engine.send_weights(walk())
