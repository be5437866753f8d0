"""Streamed requests on verl's real vLLM server: their answers, their chunks, and their aborts."""

import asyncio
import statistics
import time
from uuid import uuid4

import pytest
import ray
from engine_state import BLOCK_SIZE, LIMIT_S, MAX_MODEL_LEN, EngineState
from server_probe import (
    NOTHING,
    PROMPT,
    Listener,
    abort,
    books,
    collect,
    cut,
    end,
    listen,
    request,
    sampled,
    stream,
    take,
    wait_until,
)

from darts.rollout.client import DartsServerClient
from verl_patches.vllm_stream_server import MAX_EARLY_ABORTS

LENGTH = 600


@pytest.fixture(autouse=True)
def tidy(server):
    """After each test the server knows of no request any more; a call for chunks may still wait."""
    yield
    left = books(server).streams
    abort(server, left)
    assert not left
    wait_until(lambda: books(server) == NOTHING)


@pytest.fixture
def client(engine, monkeypatch):
    """Polls for a shorter time than in production, so that its last call does not outlive the test."""
    monkeypatch.setattr("darts.rollout.client.POLL_S", 0.3)
    return DartsServerClient.of(engine.get_client())


@pytest.fixture(scope="module")
def plain(engine):
    """What verl's own `generate` gives for `request(max_tokens=LENGTH)`, alone and with an empty prefix cache."""
    server = engine.server_handles[0]
    EngineState.wait_idle(server)
    EngineState.reset(server)
    return ray.get(server.generate.remote(**request(max_tokens=LENGTH)), timeout=LIMIT_S)


def is_prefix(output, whole):
    """Whether an answer is the beginning of another, with as many log-probs as tokens."""
    count = len(output.token_ids)
    log_probs = pytest.approx(whole.log_probs[:count], abs=1e-3)  # other rows of a batch move the last digits
    return output.token_ids == whole.token_ids[:count] and output.log_probs == log_probs


# --- answers and chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 16, 256, LENGTH + 1])
def test_the_answer_is_that_of_plain_generate_and_the_chunks_are_its_beginning(server, plain, chunk_tokens):
    output, chunks = collect(server, client="client", chunk_tokens=chunk_tokens, **request(max_tokens=LENGTH))
    assert output.extra_fields.pop("finish_reason") == "length"
    assert len(output.token_ids) == LENGTH
    assert is_prefix(output, plain)
    assert output.model_dump(exclude={"log_probs"}) == plain.model_dump(exclude={"log_probs"})
    sent = 0
    for chunk in chunks:
        assert chunk.offset == sent
        assert len(chunk.token_ids) >= chunk_tokens
        sent += len(chunk.token_ids)
        assert chunk.token_ids == output.token_ids[chunk.offset : sent]
    assert bool(chunks) == (chunk_tokens < LENGTH), "the rest comes with the answer"
    assert sent >= LENGTH / 2 or chunk_tokens >= LENGTH


@pytest.mark.parametrize("chunk_tokens", [1, 16])
def test_a_model_that_ends_by_itself_ends_with_stop(server, chunk_tokens):
    asked = [request(max_tokens=400, seed=seed, ignore_eos=False) for seed in range(8)]
    plain = ray.get([server.generate.remote(**one) for one in asked], timeout=LIMIT_S)
    for one, whole in zip(asked, plain, strict=True):
        output, _ = collect(server, client="client", chunk_tokens=chunk_tokens, **one | {"request_id": uuid4().hex})
        assert output.token_ids == whole.token_ids
        assert is_prefix(output, whole)
        assert output.extra_fields["finish_reason"] == "stop"
        assert len(output.token_ids) < 400


def test_without_log_probs_there_are_none(server, plain):
    output, _ = collect(server, client="client", chunk_tokens=16, **request(max_tokens=60, logprobs=False))
    assert output.log_probs is None
    assert output.token_ids == plain.token_ids[:60]


def test_plain_generate_beside_streams_is_untouched(server, plain):
    streams = [stream(server, max_tokens=300, seed=seed, chunk_tokens=4) for seed in range(6)]
    asked = [server.generate.remote(**request(max_tokens=200)) for _ in range(3)]
    for output in ray.get(asked, timeout=LIMIT_S):
        assert is_prefix(output, plain)
        assert output.extra_fields.keys() == plain.extra_fields.keys()
        assert output.stop_reason == "completed"
    assert end(*streams) == [("length", 300)] * 6


def test_a_duplicate_of_a_running_request_is_refused_and_the_first_goes_on(server, plain):
    first = stream(server, "same", max_tokens=LENGTH)
    assert take(server)
    with pytest.raises(ValueError, match="'same' runs already; each request needs an id of its own"):
        ray.get(stream(server, "same"), timeout=LIMIT_S)
    output = ray.get(first, timeout=LIMIT_S)
    assert output.token_ids == plain.token_ids
    assert end(stream(server, "same", max_tokens=5)) == [("length", 5)], "once it has ended, the id is free"


# --- clients ---------------------------------------------------------------------------------------------------------


def test_each_client_gets_its_own_chunks(server):
    pending = [stream(server, f"{client}-{n}", client=client, max_tokens=200) for client in "ab" for n in range(4)]
    names = {client: set() for client in "ab"}
    while ray.wait(pending, num_returns=len(pending), timeout=0)[1]:
        for client in "ab":
            names[client] |= {chunk.request_id for chunk in take(server, client, 0.2)}
    assert names == {client: {f"{client}-{n}" for n in range(4)} for client in "ab"}
    assert end(*pending) == [("length", 200)] * 8


def test_a_call_for_chunks_returns_with_the_clients_last_stream_and_the_server_forgets_the_client(server):
    pending = [stream(server, f"stream-{n}", client="a", chunk_tokens=2000, max_tokens=400) for n in range(2)]
    other = stream(server, "other", client="b", chunk_tokens=2000, max_tokens=1024)
    wait_until(lambda: len(books(server).streams) == 3)
    assert take(server, "a", LIMIT_S) == [], "it returns while the other client's stream runs"
    assert end(*pending) == [("length", 400)] * 2
    assert books(server) == (["other"], ["b"], 0)
    assert abort(server, ["other"]) == ["other"]
    assert end(other)[0][0] == "abort"


def test_a_client_that_never_asks_for_chunks_leaves_nothing_behind(server):
    asked = [stream(server, chunk_tokens=1, max_tokens=length) for length in (50, 60)]
    assert end(*asked) == [("length", 50), ("length", 60)]
    assert books(server) == NOTHING


def test_a_call_for_chunks_may_come_before_the_stream(server):
    taking = server.take_chunks.remote("client", 20)
    wait_until(lambda: books(server).clients == ["client"])
    asked = stream(server, "late", max_tokens=100)
    assert ray.get(taking, timeout=LIMIT_S)[0].request_id == "late"
    assert end(asked) == [("length", 100)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [(request(prompt=[65] * MAX_MODEL_LEN), "leaves no room to generate"), (request(prompt=[10**6]), "vocabulary")],
)
def test_a_request_that_is_refused_leaves_nothing_behind(server, asked, message):
    with pytest.raises(ray.exceptions.RayTaskError, match=message):
        ray.get(server.generate_streamed.remote(client="client", chunk_tokens=16, **asked), timeout=LIMIT_S)
    assert books(server) == NOTHING


def test_a_cancelled_call_stops_its_request(server):
    asked = stream(server, "cancelled", max_tokens=1024)
    assert take(server)
    ray.cancel(asked)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(asked, timeout=LIMIT_S)
    wait_until(lambda: books(server) == NOTHING)
    EngineState.wait_idle(server)
    assert sampled(server)["cancelled"] < 1024


def test_a_call_for_chunks_after_the_end_is_empty_within_its_time(server):
    end(stream(server, chunk_tokens=1, max_tokens=20))
    start = time.monotonic()
    assert take(server, wait_s=0.3) == []
    assert time.monotonic() - start > 0.25


def test_the_client_hears_nothing_of_a_request_after_its_end(client):
    async def run():
        listeners = [Listener(chunk_tokens=1 + n % 4) for n in range(40)]
        asked = [
            asyncio.create_task(listen(client, one, **request(max_tokens=150, seed=n)))
            for n, one in enumerate(listeners)
        ]
        for listener, answer in zip(listeners[::2], asked[::2], strict=True):
            await asyncio.sleep(0.02)
            while listener.request is None and not answer.done():
                await asyncio.sleep(0.01)
            if listener.request is not None:
                client.abort([listener.request], timeout_s=LIMIT_S)
        outputs = await asyncio.gather(*asked)
        await asyncio.wait_for(asyncio.gather(*client._pollers.values()), LIMIT_S)  # what is on its way still comes
        return listeners, outputs

    listeners, outputs = asyncio.run(run())
    assert {listener.finish_reason for listener in listeners[1::2]} == {"length"}
    assert {"abort"} <= {listener.finish_reason for listener in listeners[::2]} <= {"abort", "length"}
    for listener, output in zip(listeners, outputs, strict=True):
        assert listener.grown_after_the_end == 0
        assert listener.grown == sorted(listener.grown)
        assert listener.grown[-1:] <= [len(output.token_ids)]
    assert sum(len(listener.grown) for listener in listeners) > 100


def test_the_client_learns_what_a_decoding_step_costs(client):
    async def run(requests):
        asked = [
            asyncio.create_task(listen(client, Listener(chunk_tokens=8), **request(max_tokens=150, seed=n)))
            for n in range(requests)
        ]
        start = time.monotonic()
        await asyncio.gather(*asked)
        return time.monotonic() - start

    for requests in (1, 24):
        seconds = asyncio.run(run(requests))
        points = client.take_step_times().points()
        size, step, steps = points[-1]
        assert requests / 2 <= size <= requests
        assert len(points) == 1 or requests > 1
        assert requests * 60 <= steps <= requests * 150, "all but the first chunk and what comes with the answer"
        assert seconds / 150 / 10 < step < seconds / 150 * 2
        assert not client.take_step_times()


# --- aborts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 16])
def test_an_abort_at_any_moment_returns_the_tokens_so_far(server, plain, chunk_tokens):
    aborted_at = {}
    since_the_last_chunk = []
    for chunks in (1, 2, 4):
        for seconds in (0, 0.0005, 0.002, 0.005, 0.011):
            name = uuid4().hex
            done = cut(server, chunks, 0, seconds, client="client", chunk_tokens=chunk_tokens, **request(name))
            assert done.running == [name]
            assert done.output.extra_fields["finish_reason"] == "abort"
            assert done.output.stop_reason == "aborted"
            assert is_prefix(done.output, plain)
            sent = sum(len(chunk.token_ids) for chunk in done.chunks)
            assert chunks * chunk_tokens <= sent <= len(done.output.token_ids) < 200
            since_the_last_chunk.append(len(done.output.token_ids) - sent)
            aborted_at[name] = done.at
    EngineState.wait_idle(server)
    log = EngineState.token_log(server)
    late = [sum(n for at, name, n in log if name == cut_ and at > limit) for cut_, limit in aborted_at.items()]
    print(f"\ntokens since the last chunk: {sorted(since_the_last_chunk)}; sampled after the abort: {sorted(late)}")
    assert since_the_last_chunk.count(0) > 1, "vLLM then returns no token, and the log-probs of all"
    assert max(since_the_last_chunk) > 0
    assert statistics.median(late) <= 3
    assert max(late) <= 32


def test_one_call_stops_many_and_ignores_what_does_not_run(server):
    names = [f"stream-{n}" for n in range(64)]
    end(stream(server, "ended", max_tokens=3))
    pending = [stream(server, name, max_tokens=1024, seed=n) for n, name in enumerate(names)]
    plain = server.generate.remote(**request("plain", max_tokens=100))
    wait_until(lambda: len(sampled(server)) == 66)
    assert abort(server, []) == []
    assert abort(server, ["never", "ended", "plain"]) == []
    assert abort(server, ["never", *names[1:], "ended", "plain"]) == names[1:]
    ended = end(*pending[1:])
    assert {reason for reason, _ in ended} == {"abort"}
    assert all(0 < tokens < 1024 for _, tokens in ended)
    assert len(ray.get(plain, timeout=LIMIT_S).token_ids) == 100
    assert end(*pending[:1]) == [("length", 1024)], "who was not named goes on"
    assert abort(server, names) == []


@pytest.mark.parametrize("ticks", range(1, 25, 3))
def test_an_abort_of_a_request_on_its_way_into_the_engine_stops_it(server, ticks):
    names = [f"young-{n}" for n in range(5)]
    for name in names:
        done = cut(server, 0, ticks, client="client", chunk_tokens=16, **request(name, max_tokens=1024))
        assert done.output.extra_fields["finish_reason"] == "abort"
        assert len(done.output.log_probs or []) == len(done.output.token_ids) <= 16
        assert books(server) == NOTHING
    EngineState.wait_idle(server)
    assert all(count <= 40 for count in sampled(server).values())


def test_an_abort_that_comes_before_its_request_ends_it_without_tokens(server):
    assert abort(server, ["early", "other"]) == []
    assert end(stream(server, "early"), stream(server, "later", max_tokens=5)) == [("abort", 0), ("length", 5)]
    assert "early" not in sampled(server)
    assert end(stream(server, "early", max_tokens=5)) == [("length", 5)], "it is remembered once"


def test_the_server_remembers_so_many_early_aborts(server):
    newest = [f"unknown-{n}" for n in range(MAX_EARLY_ABORTS)]
    assert abort(server, ["oldest"]) == abort(server, newest) == []
    assert end(stream(server, "oldest", max_tokens=5)) == [("length", 5)]
    assert end(stream(server, newest[0])) == [("abort", 0)]


@pytest.mark.parametrize("payload", [0, 300_000], ids=["small", "large"])
def test_an_abort_right_behind_its_request_stops_it(client, payload):
    """Ray runs the calls of an async actor as they become ready: one with large arguments may come after later ones."""

    class Hasty(Listener):
        def opened(self, request):
            super().opened(request)
            client.abort([request], timeout_s=LIMIT_S)

    extra = {"mm_processor_kwargs": {"ballast": "x" * payload}} if payload else {}
    asked = [request(max_tokens=1024, seed=n) for n in range(30)]

    async def run():
        listeners = [Hasty() for _ in asked]
        outputs = await asyncio.gather(
            *[listen(client, one, **arguments, **extra) for one, arguments in zip(listeners, asked, strict=True)]
        )
        return [(one.finish_reason, len(output.token_ids)) for one, output in zip(listeners, outputs, strict=True)]

    ended = asyncio.run(run())
    assert {reason for reason, _ in ended} == {"abort"}
    assert max(tokens for _, tokens in ended) < 100


def test_an_abort_of_a_request_that_waits_for_a_place_ends_it_at_once(server):
    running = [f"running-{n}" for n in range(256)]
    pending = [stream(server, name, max_tokens=1024, seed=n) for n, name in enumerate(running)]
    wait_until(lambda: EngineState.state(server)["running"] == 256)
    waiting = stream(server, "waiting")
    wait_until(lambda: EngineState.state(server)["waiting"] == 1)
    assert abort(server, ["waiting"]) == ["waiting"]
    assert end(waiting) == [("abort", 0)]
    assert EngineState.state(server)["running"] == 256, "no place has become free"
    assert ray.get(waiting).log_probs == []
    wait_until(lambda: EngineState.state(server)["waiting"] == 0)
    assert "waiting" not in sampled(server)
    assert len(abort(server, running)) == 256
    assert {reason for reason, _ in end(*pending)} == {"abort"}


def test_an_abort_keeps_the_prefix_cache_and_leaves_the_siblings_alone(server):
    prompt = PROMPT * 8
    names = [f"sibling-{n}" for n in range(8)]

    def start():
        return [stream(server, name, prompt=prompt, max_tokens=300, seed=n) for n, name in enumerate(names)]

    undisturbed = ray.get(start(), timeout=LIMIT_S)
    pending = start()
    wait_until(lambda: any(chunk.offset > 32 for chunk in take(server)))
    assert abort(server, names[::2]) == names[::2]
    assert {reason for reason, _ in end(*pending[::2])} == {"abort"}
    assert end(*pending[1::2]) == [("length", 300)] * 4
    outputs = ray.get(pending)
    assert all(is_prefix(output, whole) for output, whole in zip(outputs, undisturbed, strict=True))
    late = ray.get(stream(server, prompt=prompt, max_tokens=5), timeout=LIMIT_S)
    assert late.extra_fields["num_cached_tokens"] >= len(prompt) // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE
