"""What a real server tells of its engine: the sequences that it runs, its steps, the room of its KV cache."""

import pytest
import ray
from engine_state import BLOCK_SIZE, LIMIT_S, EngineState
from server_probe import abort, books, collect, end, request, steps, stream, take, wait_until


def test_chunks_tell_what_the_engine_runs_and_not_what_is_open(server):
    """300 requests where 256 find a place; those that wait are open, and run nothing."""
    names = [f"stream-{n}" for n in range(300)]
    pending = [stream(server, name, max_tokens=1024, chunk_tokens=4, seed=n) for n, name in enumerate(names)]
    wait_until(lambda: any(chunk.offset > 16 for chunk in take(server)))  # all prompts are computed
    assert {name: EngineState.state(server)[name] for name in ("running", "waiting")} == {"running": 256, "waiting": 44}
    chunks = take(server)
    assert len(books(server).streams) == 300
    assert {chunk.running for chunk in chunks} == {256}
    counts = [chunk.steps for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert len(abort(server, names)) == 300
    end(*pending)


def test_plain_requests_count_as_running_too(server):
    plain = [server.generate.remote(**request(max_tokens=1000, seed=n)) for n in range(5)]
    asked = stream(server, max_tokens=900, chunk_tokens=4)
    wait_until(lambda: EngineState.state(server)["running"] == 6)
    take(server)
    assert {chunk.running for chunk in take(server)} == {6}
    ray.get(plain, timeout=LIMIT_S)
    assert end(asked) == [("length", 900)]


def test_steps_are_counted_as_the_engine_makes_them(server):
    """The count is exact once the request has ended; before that it may be ahead, by tokens that are not taken yet."""
    steps_before = steps(server)
    _, chunks = collect(server, client="client", chunk_tokens=16, **request(max_tokens=200))
    assert steps(server) - steps_before == 200
    assert len(chunks) >= 2
    for chunk in chunks:
        assert chunk.steps - steps_before >= chunk.offset + len(chunk.token_ids), "a token without a step"
        assert chunk.running == 1
    counts = [chunk.steps for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] - steps_before <= 200


def test_the_kv_cache_has_room_for_as_many_tokens_as_the_engine_has_blocks(server):
    blocks = EngineState.state(server)["total_blocks"]
    kv_tokens = ray.get(server.kv_tokens.remote(), timeout=LIMIT_S)
    assert kv_tokens == pytest.approx(blocks * BLOCK_SIZE, rel=0.01, abs=2 * BLOCK_SIZE)
