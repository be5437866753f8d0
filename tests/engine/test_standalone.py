"""The tier's own footing: a real server that answers, and a view into its engine core that tells the truth."""

import asyncio
import time
from collections import Counter
from uuid import uuid4

import pytest
import ray
from engine_state import BLOCK_SIZE, LIMIT_S, EngineState

PROMPT = list(range(48, 98))
IDLE = {"running": 0, "waiting": 0}


def ask(server, prompt=PROMPT, request_id=None, max_tokens=40, **sampling):
    """A running `generate`."""
    sampling = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "max_tokens": max_tokens} | sampling
    return server.generate.remote(prompt_ids=prompt, sampling_params=sampling, request_id=request_id or uuid4().hex)


def answer(*args, **kwargs):
    return ray.get(ask(*args, **kwargs), timeout=LIMIT_S)


def wait_for_tokens(server, request_id, count):
    end = time.monotonic() + LIMIT_S
    while sum(n for _, name, n in EngineState.token_log(server) if name == request_id) < count:
        assert time.monotonic() < end, f"{request_id} has no {count} tokens"
        time.sleep(0.005)


def test_a_seed_repeats_and_another_differs(server):
    first, again, other = answer(server), answer(server), answer(server, seed=2)
    assert len(first.token_ids) == 40
    assert first.token_ids == again.token_ids != other.token_ids


def test_the_state_follows_the_requests(server):
    before = EngineState.state(server)
    assert before == IDLE | {"free_blocks": before["total_blocks"], "total_blocks": before["total_blocks"]}
    pending = [ask(server, max_tokens=1024, seed=n) for n in range(4)]
    deadline = time.monotonic() + LIMIT_S
    while (busy := EngineState.state(server))["running"] < 4:
        assert time.monotonic() < deadline, busy
    assert busy["free_blocks"] <= busy["total_blocks"] - len(PROMPT) // BLOCK_SIZE
    assert [len(output.token_ids) for output in ray.get(pending, timeout=LIMIT_S)] == [1024] * 4
    EngineState.wait_idle(server)


def test_more_requests_than_places_wait(server):
    pending = [ask(server, max_tokens=100, seed=None) for _ in range(300)]
    deadline = time.monotonic() + LIMIT_S
    while (busy := EngineState.state(server))["running"] < 256:
        assert time.monotonic() < deadline, busy
    assert busy["running"] == 256
    assert busy["waiting"] > 0
    ray.get(pending, timeout=LIMIT_S)


def test_the_token_log_counts_what_was_returned(server):
    began = time.time()
    lengths = {f"request-{n}": 20 + 7 * n for n in range(5)}
    outputs = ray.get([ask(server, request_id=name, max_tokens=n) for name, n in lengths.items()], timeout=LIMIT_S)
    log = EngineState.token_log(server)
    counted = Counter()
    for _, name, count in log:
        counted[name] += count
    assert counted == lengths
    assert [len(output.token_ids) for output in outputs] == list(lengths.values())
    times = [at for at, _, _ in log]
    assert sorted([began, *times]) == [began, *times]
    assert times[-1] <= time.time()


@pytest.mark.parametrize("others", [0, 16])
def test_an_abort_returns_what_there_is_and_frees_the_blocks(server, others):
    pending = [ask(server, request_id=f"other-{n}", max_tokens=1024, seed=n) for n in range(others)]
    request = ask(server, request_id="victim", max_tokens=1024)
    wait_for_tokens(server, "victim", 20)
    sent = time.time()
    EngineState.abort(server, "victim")
    output = ray.get(request, timeout=LIMIT_S)
    assert output.stop_reason == "aborted"
    sampled = [(at, n) for at, name, n in EngineState.token_log(server) if name == "victim"]
    assert 20 <= len(output.token_ids) <= sum(n for _, n in sampled)
    after = sum(n for at, n in sampled if at > sent)
    assert after < (1024 - sum(n for at, n in sampled if at <= sent)) / 2, "not even half of what it had left"
    for n in range(others):
        EngineState.abort(server, f"other-{n}")
    assert {output.stop_reason for output in ray.get(pending, timeout=LIMIT_S)} <= {"aborted"}
    EngineState.wait_idle(server)


def test_the_prefix_cache_shares_whole_blocks(server):
    assert answer(server).extra_fields["num_cached_tokens"] == 0
    assert answer(server, seed=2).extra_fields["num_cached_tokens"] == len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE


def test_verls_client_reaches_the_server(engine, server):
    async def generate():
        return await engine.get_client().generate(uuid4().hex, prompt_ids=PROMPT, sampling_params={"max_tokens": 5})

    assert 1 <= len(asyncio.run(generate()).token_ids) <= 5


@pytest.mark.slow
def test_two_servers_share_the_requests(two_engines):
    async def generate():
        client = two_engines.get_client()
        ask = [client.generate(uuid4().hex, prompt_ids=PROMPT, sampling_params={"max_tokens": 5}) for _ in range(8)]
        return await asyncio.gather(*ask)

    outputs = asyncio.run(generate())
    logs = [EngineState.token_log(server) for server in two_engines.server_handles]
    assert sum(n for log in logs for _, _, n in log) == sum(len(output.token_ids) for output in outputs)
    assert [len({name for _, name, _ in log}) for log in logs] == [4, 4]
