"""Streamed requests on verl's real vLLM server when things coincide: races, weight updates, 1,500 requests, deaths."""

import asyncio
import random
import statistics
import time
from collections import Counter

import pytest
import ray
from engine_state import LIMIT_S, EngineState, engine_config, start_servers
from server_probe import (
    NOTHING,
    Listener,
    abort,
    books,
    close_gate,
    cut,
    end,
    listen,
    request,
    sampled,
    stream,
    wait_until,
)

from darts.engines.start import engine_processes
from darts.rollout.client import DartsServerClient

CROWD = 1500


# --- an abort and the end of its request -----------------------------------------------------------------------------


def test_aborts_that_race_the_ends_leave_each_request_with_one_consistent_end(server):
    rng = random.Random(0)
    limits = {f"race-{n}": rng.choice([3, 10, 30, 100, 300]) for n in range(150)}
    pending = [
        stream(server, name, max_tokens=limit, chunk_tokens=rng.randint(1, 8), seed=limit)
        for name, limit in limits.items()
    ]
    names = rng.sample(list(limits), len(limits))
    ray.wait(pending, num_returns=5, timeout=LIMIT_S)  # the engine is warm
    for start in range(0, len(names), 3):
        time.sleep(rng.uniform(0, 0.03))
        server.abort_streams.remote(names[start : start + 3])
    ended = dict(zip(limits, end(*pending), strict=True))
    EngineState.wait_idle(server)
    wait_until(lambda: books(server) == NOTHING)
    counts = sampled(server)
    for name, (reason, tokens) in ended.items():
        assert reason in ("abort", "length")
        assert (tokens == limits[name]) == (reason == "length")
        assert tokens <= counts.get(name, 0)
    reasons = Counter(reason for reason, _ in ended.values())
    print(f"\n{dict(reasons)}")
    assert reasons.keys() == {"abort", "length"}


def test_an_abort_beside_the_last_token_is_an_abort_or_comes_too_late(server):
    reasons = Counter()
    for ticks in range(0, 800, 20):
        done = cut(server, 8, ticks, client="client", chunk_tokens=1, **request(max_tokens=9))
        reason, tokens = done.output.extra_fields["finish_reason"], len(done.output.token_ids)
        assert (reason, tokens == 9) in {("abort", False), ("length", True)}
        assert len(done.output.log_probs) == tokens
        reasons[reason] += 1
    print(f"\n{dict(reasons)}")
    wait_until(lambda: books(server) == NOTHING)
    EngineState.wait_idle(server)


# --- weight updates --------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(server):
    """Opened again after the test."""
    yield
    ray.get(server.resume_generation.remote(), timeout=LIMIT_S)


def test_a_weight_update_ends_open_streams_with_abort_and_parks_new_ones(server, gate):
    pending = [stream(server, f"open-{n}", max_tokens=1024, seed=n) for n in range(8)]
    wait_until(lambda: len(sampled(server)) == 8)
    ray.get(server.abort_all_requests.remote(), timeout=LIMIT_S)
    ended = end(*pending)
    assert {reason for reason, _ in ended} == {"abort"}
    assert all(0 < tokens < 1024 for _, tokens in ended)
    wait_until(lambda: books(server) == NOTHING)
    EngineState.wait_idle(server)

    parked = stream(server, "parked", max_tokens=100)
    assert ray.wait([parked], timeout=0.5) == ([], [parked])
    assert books(server).streams == ["parked"]
    assert EngineState.state(server)["waiting"] == 0
    ray.get(server.resume_generation.remote(), timeout=LIMIT_S)
    assert end(parked) == [("length", 100)]


def test_an_aborted_request_that_is_parked_ends_without_tokens_once_the_gate_opens(server, gate):
    ray.get(server.abort_all_requests.remote(), timeout=LIMIT_S)
    parked = stream(server, "parked")
    wait_until(lambda: books(server).streams == ["parked"])
    stopping = server.abort_streams.remote(["parked"])
    assert ray.wait([parked, stopping], timeout=0.5)[0] == [], "it waits for the gate"
    ray.get(server.resume_generation.remote(), timeout=LIMIT_S)
    assert end(parked) == [("abort", 0)]
    assert ray.get(stopping, timeout=LIMIT_S) == ["parked"]
    assert "parked" not in sampled(server)


def test_a_server_that_leaves_the_rotation_ends_streams_with_abort(server, gate):
    ray.get(server.abort_all_requests.remote(reject_request=True), timeout=LIMIT_S)
    assert end(stream(server)) == [("abort", 0)]


# --- load ------------------------------------------------------------------------------------------------------------


def test_an_abort_is_quick_among_1500_requests_and_one_call_ends_them_all(server):
    names = [f"crowd-{n}" for n in range(CROWD)]
    pending = {
        name: stream(server, name, chunk_tokens=64, max_tokens=1024, seed=n, logprobs=False)
        for n, name in enumerate(names)
    }
    taken = wait_until(lambda: len(books(server).streams) == CROWD)
    running = sampled(server)
    waiting = [name for name in names if name not in running]
    latency = {}
    for name in [*list(running)[:10], *waiting[-10:]]:
        start = time.monotonic()
        stopping = server.abort_streams.remote([name])
        assert end(pending.pop(name))[0][0] == "abort"
        latency[name] = time.monotonic() - start
        assert ray.get(stopping, timeout=LIMIT_S) == [name]
    state = EngineState.state(server)
    start = time.monotonic()
    stopped = abort(server, list(pending))
    answered = time.monotonic() - start
    ended = Counter(reason for reason, _ in end(*pending.values()))
    everyone = time.monotonic() - start
    EngineState.wait_idle(server)
    idle = time.monotonic() - start
    print(
        f"\n{CROWD} known after {taken:.2f} s; abort of one: at most {max(latency.values()) * 1000:.0f} ms"
        f"\nabort of {len(stopped)} ({state['running']} running, {state['waiting']} waiting): answered after "
        f"{answered:.2f} s, all ended after {everyone:.2f} s, engine idle after {idle:.2f} s"
    )
    assert ended == {"abort": CROWD - 20}
    assert statistics.median(latency.values()) < taken, "one is ended in less time than it took to ask for all"
    assert sum(sampled(server).values()) < CROWD * 1024 / 2, "what was aborted ended early"
    wait_until(lambda: books(server) == NOTHING)


# --- deaths; last, since they start a server of their own ------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(engine_ray, replica_class):
    """A manager with a server that may be killed."""
    with start_servers(engine_config(), replica_class, start_rank=5) as manager:
        yield manager


def outlive(manager, kill, others=0):
    """Errors of four requests that a client had open at `kill`, and the seconds that they took; its poller ends too."""
    client = DartsServerClient.of(manager.get_client())
    server = manager.server_handles[0]

    async def run():
        asked = [asyncio.create_task(listen(client, Listener(8), **request(max_tokens=1024))) for _ in range(4)]
        await asyncio.to_thread(wait_until, lambda: len(books(server).streams) == 4 + others)
        pollers = list(client._pollers.values())
        assert len(pollers) == 1
        start = time.monotonic()
        kill()
        await asyncio.wait(asked, timeout=LIMIT_S)
        seconds = time.monotonic() - start
        assert all(task.done() for task in asked)
        await asyncio.wait(pollers, timeout=LIMIT_S)
        assert not client._pollers
        assert not client._open
        return [task.exception() for task in asked], seconds

    return asyncio.run(run())


@pytest.mark.slow
def test_a_dead_engine_fails_all_its_requests(mortal):
    server = mortal.server_handles[0]
    core = next(process for process in engine_processes(server) if process.name().startswith("VLLM::EngineCor"))
    others = [stream(server, max_tokens=1024, seed=n) for n in range(300)]
    errors, seconds = outlive(mortal, core.kill, others=len(others))
    start = time.monotonic()
    assert len(ray.wait(others, num_returns=len(others), timeout=LIMIT_S)[0]) == len(others)
    print(f"\nfailed after {seconds:.2f} s and {time.monotonic() - start:.2f} s")
    for error in errors:
        assert "EngineDeadError" in type(error).__name__
        assert "EngineCore encountered an issue" in str(error)
        assert len(str(error)) < 10_000, "one traceback, not those of all requests"


@pytest.mark.slow
def test_a_dead_server_fails_its_requests(mortal):
    server = mortal.server_handles[0]
    close_gate(server)  # its engine may be dead already
    errors, seconds = outlive(mortal, lambda: ray.kill(server))
    print(f"\nfailed after {seconds:.2f} s: {errors[0]}")
    for error in errors:
        assert isinstance(error, ray.exceptions.RayActorError)
        assert isinstance(error, ray.exceptions.ActorUnavailableError) or "killed" in str(error)
