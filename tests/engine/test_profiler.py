"""The profiler on verl's real vLLM server."""

import asyncio
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from engine_state import EngineState
from server_probe import NOTHING, books, wait_until

from darts.engines import measure
from darts.engines.measure import ProfileError, profile_servers


@pytest.fixture
def profile(engine, server):
    """Measures the one server; afterwards it is idle and knows of no request."""
    model = engine.config.actor_rollout_ref.model.path

    def run(**options):
        try:
            return asyncio.run(profile_servers([server], model, **options))
        finally:
            assert books(server).streams == []

    yield run
    wait_until(lambda: books(server) == NOTHING)
    EngineState.wait_idle(server)


def steps(server, since):
    """`(time, requests that got a token)` of every step of the engine after `since` (`time.time()`)."""
    found = {}
    for at, name, _ in EngineState.token_log(server):
        if at > since:
            found.setdefault(at, set()).add(name)
    return sorted((at, len(names)) for at, names in found.items())


def test_a_curve_of_a_real_engine(profile, server):
    start = time.time()
    measured = profile(limit_s=3000, largest=8, tokens=160)
    assert measured.batch_sizes == [1, 2, 4, 8]
    assert all(seconds > 0 for seconds in measured.seconds)
    assert measured.curve().batch_sizes == (1, 2, 4, 8)
    assert (measured.tensor_parallel, measured.max_num_seqs, measured.engines) == (1, 256, 1)
    assert measured.device
    made = steps(server, start)
    for size, seconds in zip(measured.batch_sizes, measured.seconds, strict=True):
        times = [at for at, running in made if running == size]
        assert len(times) >= 160
        # The engine's own clock: what went on between the first and the last step of this size, the warm-up's apart.
        gaps = sorted(after - before for before, after in pairwise(times))
        assert gaps[len(gaps) // 10] < seconds < 5 * gaps[len(gaps) // 2]


@pytest.fixture
def clock(monkeypatch):
    """A clock of the limit that goes on by 25 s for each sequence of a batch, however long it really took."""
    clock, step_seconds = SimpleNamespace(now=0.0), measure._step_seconds

    async def measured(servers, work, size, end):
        try:
            return await step_seconds(servers, work, size, end)
        finally:
            clock.now += 25 * size

    monkeypatch.setattr(measure, "_step_seconds", measured)
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: clock.now))


def test_the_limit_holds_and_nothing_stays_behind(profile, clock):
    """After 8 sequences to warm up and 1, 2, 4, 8 to measure, 16 may take twice as long as the last 8."""
    said = []
    measured = profile(limit_s=900, say=said.append)
    assert measured.batch_sizes == [1, 2, 4, 8]
    assert said[-1] == "stopped: 16 sequences may take 400.0 s, 325.0 s of 900 s are left"


def test_too_little_time_is_an_error(profile, clock):
    with pytest.raises(ProfileError, match=r"0 of 9 batch sizes could be measured within 150 s"):
        profile(limit_s=150)
