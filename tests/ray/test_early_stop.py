"""Early stop in the agent-loop worker: real client and verl's agent loops, servers of scripted lengths and speeds."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest
from fakes import ScriptedServer, Turn, handle, prompts
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from worker_bench import CALL, Bench, lengths_of

from darts.messages import CANDIDATE
from darts.rollout.worker import CandidateError
from darts.selection import select

pytestmark = pytest.mark.usefixtures("virtual_time")

SHORTEST = "darts.selection.mode=shortest_only"


@pytest.fixture
def bench(make_config):
    return lambda *overrides: Bench(make_config("darts.streaming.chunk_tokens=2", *overrides))


def at_one_speed(*lengths: int) -> list[Turn]:
    return [Turn(length, delay=length / 20) for length in lengths]


def test_eager_keeps_the_first_m_valid_and_aborts_the_rest_in_one_call(bench):
    test = bench(SHORTEST, "darts.early_stop=eager")
    four, six, eight, five = at_one_speed(4, 6, 8, 5)
    slow = Turn(30, delay=9)
    test.script([[four, slow, six, eight, five, slow, Turn(3, delay=0.01, cut=True)]])
    start = time.monotonic()
    output, pool = test.run([7])
    assert time.monotonic() - start < 6, "the longest would take 9 s"
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 2, 3, 4]
    assert pool.aborted.tolist() == [False, True, False, False, False, True, False]
    assert pool.truncated.tolist() == [False] * 6 + [True]
    assert [sorted(ids) for ids in test.server.aborts] == [
        sorted(test.served()[candidate]["request_id"] for candidate in (1, 5))
    ]
    assert pool.length[[0, 2, 3, 4]].tolist() == [4, 6, 8, 5]
    generated = [record["generated"] for record in test.served()]
    assert pool.length.tolist() == generated, "the length of what was aborted, too"
    assert generated[1] < 20
    assert (pool.tokens_after[[1, 5]] <= 4).all()
    assert (pool.stop_seconds[[1, 5]] < 0.5).all()
    assert test.server.running == 0


def test_exact_keeps_what_a_run_without_early_stop_keeps_at_uneven_speeds(bench):
    rng = np.random.default_rng(3)
    groups = [
        [Turn(int(length), delay=float(length * rng.uniform(0.01, 0.06))) for length in rng.integers(2, 32, size=8)]
        for _ in range(4)
    ]
    kept = {}
    for mode in ("off", "exact", "eager"):
        test = bench(SHORTEST, f"darts.early_stop={mode}")
        test.script(groups)
        output, pool = test.run([8] * 4)
        kept[mode] = output.non_tensor_batch[CANDIDATE].tolist()
        if mode == "exact":
            assert pool.aborted.any()
            assert pool.length.sum() < sum(turn.length for group in groups for turn in group)
    expected = [c for group in groups for c in sorted(select([turn.length for turn in group], 4, 0))]
    assert kept["off"] == kept["exact"] == expected
    assert kept["eager"] != expected, "at uneven speeds the first are not the shortest"


def test_eager_and_exact_agree_where_all_start_together_at_one_speed(bench):
    lengths = [[9, 4, 20, 12, 30, 6, 16, 25], [7, 31, 11, 15, 19, 3, 23, 27]]
    kept = []
    for mode in ("eager", "exact"):
        test = bench(SHORTEST, f"darts.early_stop={mode}")
        test.script([at_one_speed(*group) for group in lengths])
        output, _ = test.run([8, 8])
        kept.append(output.non_tensor_batch[CANDIDATE].tolist())
    assert kept[0] == kept[1]


def test_dual_end_waits_for_its_longest(bench):
    test = bench("darts.selection.mode=dual_end", "darts.early_stop=eager")
    test.script([at_one_speed(4, 30, 6, 8, 5, 28)])
    output, pool = test.run([6])
    assert lengths_of(output) == [4, 30, 6, 5]
    assert not pool.aborted.any()


def test_a_group_is_settled_once_it_has_m_valid_and_stops_at_the_deadline(bench):
    """Group 0 is ready at 0.4 s, group 1 at 0.8 s; a truncated candidate is not valid."""
    test = bench("darts.selection.mode=dual_end", "darts.selection.long_wait=deadline")
    test.script(
        [
            [*at_one_speed(4, 6, 8, 5, 12), Turn(30, delay=9)],
            [*at_one_speed(16, 6, 8, 5), Turn(31, delay=9), Turn(28, delay=9), Turn(4, delay=0.2, cut=True)],
        ]
    )

    async def run():
        settle = asyncio.ensure_future(test.worker.settled(1, 0))
        await asyncio.sleep(0.1)
        assert not settle.done(), "it may be asked before the rollout has begun"
        rollout = asyncio.ensure_future(test.worker.generate_groups(test.batch([6, 7]), test.darts, 1))
        assert await settle == ["uid-0"]
        assert await test.worker.settled(1, 1) == ["uid-1"]
        settled = time.monotonic()
        await test.worker.end_waits(1)
        assert await test.worker.settled(1, 2) == [], "no more will come"
        return settled - start, await rollout

    start = time.monotonic()
    seconds, (output, pool, _) = asyncio.run(run())
    assert 0.85 < seconds < 8
    assert lengths_of(output) == [4, 6, 5, 12, 16, 6, 8, 5], "12 ended in time and is group 0's longest"
    assert np.flatnonzero(pool.aborted).tolist() == [5, 6 + 4, 6 + 5]


def test_a_tool_of_an_aborted_candidate_is_cancelled_and_released(bench, tmp_path):
    tools, log = tmp_path / "tools.py", tmp_path / "log"
    tools.write_text(
        "import asyncio\nfrom verl.tools.function_tool import function_tool\n\n\n"
        "@function_tool\n"
        "async def look_slowly(key: str) -> str:\n"
        '    """Looks a key up.\n\n    Args:\n        key: what to look up.\n    """\n'
        "    try:\n        await asyncio.sleep(60)\n        return 'never'\n"
        f"    finally:\n        open({str(log)!r}, 'a').write('released ')\n"
    )
    test = bench(
        SHORTEST,
        "darts.early_stop=eager",
        "data.max_response_length=160",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=true",
        "actor_rollout_ref.rollout.multi_turn.format=hermes",
        "actor_rollout_ref.rollout.max_model_len=512",
        "data.max_prompt_length=300",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={tools}",
    )
    call_tokens = [
        *test.worker.tokenizer.encode(CALL.replace("lookup", "look_slowly")),
        test.worker.tokenizer.eos_token_id,
    ]
    call = [Turn(len(call_tokens), tokens=call_tokens, delay=0.1), Turn(9)]
    test.script([[[Turn(5, delay=1)], call, [Turn(6, delay=1)], [Turn(7, delay=1)], call, [Turn(8, delay=1)]]])
    start = time.monotonic()
    output, pool = test.run([6])
    assert time.monotonic() - start < 10
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 2, 3, 5]
    assert log.read_text().split() == ["released"] * 2
    assert pool.aborted.tolist() == [False, True, False, False, True, False]
    assert pool.length[[1, 4]].tolist() == [len(call_tokens)] * 2, "what it had generated before its tool ran"
    assert len(test.server.served) == 6, "no second turn"
    assert test.server.aborts == [], "nothing to stop at the server"


def test_an_abort_that_is_not_heeded_fails_with_server_request_and_limit(bench):
    test = bench(SHORTEST, "darts.early_stop=eager", "darts.streaming.abort_timeout_s=1")
    test.server.script.deaf = True
    test.script([[*at_one_speed(4, 6, 8, 5), Turn(30, delay=120)]])
    start = time.monotonic()
    with pytest.raises(
        CandidateError,
        match=r"candidate 4 of prompt uid=uid-0 .*server 0 did not stop request \w+ within .*timeout_s=1",
    ):
        test.run([5])
    assert time.monotonic() - start < 10


def test_one_that_ends_before_the_abort_arrives_counts_as_finished_and_is_not_kept(bench):
    test = bench(SHORTEST, "darts.early_stop=eager")
    test.server.script.deaf = True
    test.script([[*at_one_speed(4, 6, 8, 5, 12), Turn(13, delay=0.65, cut=True)]])
    output, pool = test.run([6])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.length.tolist() == [4, 6, 8, 5, 12, 13]
    assert not pool.aborted.any()
    assert pool.truncated.tolist() == [False] * 5 + [True]
    assert (pool.stop_seconds[4:] > 0).all()


def test_a_request_that_the_server_ends_unasked_is_lost_and_the_group_goes_on(bench):
    test = bench(SHORTEST)
    test.script([[Turn(4), Turn(3, reason="abort"), Turn(6), Turn(8), Turn(0), Turn(5)]])
    output, pool = test.run([6])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 2, 3, 5]
    assert pool.lost.tolist() == [False, True, False, False, True, False]
    test.server.served.clear()
    test.script([[Turn(4), Turn(3, reason="abort"), Turn(6), Turn(8)]])
    with pytest.raises(CandidateError, match=r"candidate 1 .*1 candidates were lost, 3 are left: 4 are needed"):
        test.run([4])


def test_a_failure_stops_what_runs_at_the_servers(bench):
    test = bench()
    test.script([[Turn(5), Turn(30, delay=60), Turn(5, delay=2, error="CUDA says no"), Turn(5)]])
    with pytest.raises(CandidateError, match="CUDA says no"):
        test.run([4])
    (stopped,) = test.server.aborts
    assert test.served()[1]["request_id"] in stopped
    assert test.server.running == 0


def test_an_agent_loop_that_generates_by_other_means_is_refused(bench, monkeypatch):
    async def run(self, sampling_params, **kwargs):
        return AgentLoopOutput(
            prompt_ids=[1], response_ids=[2], response_mask=[1], metrics=AgentLoopMetrics(num_preempted=0)
        )

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    with pytest.raises(CandidateError, match="did not generate through its server_manager"):
        bench().run([4])


def loop_of(monkeypatch, run):
    """Puts `run(loop, generate, candidate)` in the place of verl's single-turn loop."""

    async def patched(self, sampling_params, priority=0, **kwargs):
        async def generate(prompt_ids=(1, 2, 3)):
            return await self.server_manager.generate(
                request_id="r", prompt_ids=list(prompt_ids), sampling_params=sampling_params, priority=priority
            )

        tokens = await run(generate, int(priority))
        metrics = AgentLoopMetrics(num_preempted=0)
        return AgentLoopOutput(prompt_ids=[1], response_ids=tokens, response_mask=[1] * len(tokens), metrics=metrics)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", patched)


def test_a_request_that_its_loop_gives_up_is_stopped_and_the_candidate_can_still_be_aborted(bench, monkeypatch):
    async def run(generate, candidate):
        if candidate == 4:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generate(), 0.1)
            await asyncio.sleep(60)  # a tool
        return (await generate()).token_ids

    loop_of(monkeypatch, run)
    test = bench(SHORTEST, "darts.early_stop=eager")
    test.script([[*at_one_speed(10, 11, 12, 13), Turn(30, delay=90)]])
    start = time.monotonic()
    output, pool = test.run([5])
    assert time.monotonic() - start < 10
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.aborted.tolist() == [False] * 4 + [True]
    assert len(test.server.aborts) == 1
    assert test.server.running == 0


def test_an_aborted_candidate_whose_loop_swallows_the_stop_opens_no_further_request(bench, monkeypatch):
    async def run(generate, candidate):
        answers = await asyncio.gather(generate(), return_exceptions=True)
        if isinstance(answers[0], BaseException):
            answers = [await generate()]
        return answers[0].token_ids

    loop_of(monkeypatch, run)
    test = bench(SHORTEST, "darts.early_stop=eager")
    test.script([[*at_one_speed(4, 6, 8, 5), Turn(30, delay=90)]])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.aborted.tolist() == [False] * 4 + [True]
    assert len(test.server.served) == 5


def test_parallel_branches_of_an_aborted_candidate_are_all_left(bench, monkeypatch):
    """One generates, one is in a tool."""
    left = []

    async def run(generate, candidate):
        async def tool():
            try:
                await asyncio.sleep(60)
            finally:
                left.append(candidate)

        if candidate == 4:
            await asyncio.gather(generate(), tool())
        return (await generate()).token_ids

    loop_of(monkeypatch, run)
    test = bench(SHORTEST, "darts.early_stop=eager")
    test.script([[*at_one_speed(4, 6, 8, 5), Turn(30, delay=90)]])
    _, pool = test.run([5])
    assert pool.aborted.tolist() == [False] * 4 + [True]
    assert left == [4]


def test_what_fails_while_an_aborted_candidate_is_cleaned_up_costs_nothing(bench, monkeypatch, capsys):
    async def run(generate, candidate):
        try:
            return (await generate()).token_ids
        finally:
            if candidate == 4:
                raise ConnectionError("the sandbox is gone")

    loop_of(monkeypatch, run)
    test = bench(SHORTEST, "darts.early_stop=eager")
    test.script([[*at_one_speed(4, 6, 8, 5), Turn(30, delay=90)]])
    output, _ = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    said = "aborted candidate (prompt uid=uid-0) failed: ConnectionError: the sandbox is gone"
    assert said in capsys.readouterr().out


def test_a_loop_that_returns_nothing_generated_loses_its_candidate(bench, monkeypatch):
    async def run(generate, candidate):
        return [] if candidate == 1 else (await generate()).token_ids

    loop_of(monkeypatch, run)
    test = bench(SHORTEST)
    test.script([at_one_speed(4, 5, 6, 8, 5)])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 2, 3, 4]
    assert pool.lost.tolist() == [False, True, False, False, False]


def test_siblings_go_to_one_server_with_group_routing_and_spread_without(bench):
    for routing, servers_of_a_prompt in (("group", 1), ("balanced", 2)):
        test = bench(f"darts.routing={routing}")
        second = ScriptedServer(test.server.script)
        balancer = test.worker.llm_client._load_balancer
        balancer.target.add_servers({"1": handle(second)})
        test.script([[Turn(5, delay=0.1)] * 6] * 4)
        test.run([6] * 4)
        assert len(test.server.served) == len(second.served) == 12
        of_prompt = {}
        for record in test.server.served + second.served:
            prompt = record["priority"] // 6
            of_prompt.setdefault(prompt, set()).add(record["server"])
        assert {len(servers) for servers in of_prompt.values()} == {servers_of_a_prompt}, routing
        assert balancer.target.get_total_inflight() == 0


def test_a_candidate_that_is_aborted_while_it_asks_for_a_server_leaves_the_balancer_even(bench):
    """Otherwise the balancer would count a request for ever that no server runs."""
    test = bench(SHORTEST, "darts.early_stop=eager")
    balancer = test.worker.llm_client._load_balancer
    acquire, asked = balancer.acquire_server.remote, []

    def late(**kwargs):
        async def answer():
            asked.append(kwargs)
            if len(asked) == 5:
                group = test.worker._groups["uid-0"]
                while not group.machine.complete:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
            return await acquire(**kwargs)

        return asyncio.ensure_future(answer())

    balancer.acquire_server.remote = late

    async def run():
        await test.worker.generate_groups(test.batch([5]), test.darts, 1)
        await asyncio.sleep(1)

    test.script([at_one_speed(4, 6, 8, 5, 12)])
    asyncio.run(run())
    assert len(test.server.served) == 4
    assert balancer.target.get_total_inflight() == 0


def test_chunks_are_asked_for_once_per_server_not_once_per_request(bench):
    test = bench("darts.streaming.chunk_tokens=1")
    calls = []
    server = test.worker.llm_client._load_balancer.target._servers["0"]
    take = server.take_chunks.remote
    open_calls = [0]

    def counted(*args):
        async def call():
            open_calls[0] += 1
            calls.append(open_calls[0])
            try:
                return await take(*args)
            finally:
                open_calls[0] -= 1

        return asyncio.ensure_future(call())

    server.take_chunks.remote = counted
    test.script([at_one_speed(*[20] * 8)])
    _, pool = test.run([8])
    assert pool.chunks.tolist() == [19] * 8
    assert max(calls) == 1
    assert len(calls) < pool.chunks.sum() / 3


def test_what_is_not_streamed_stays_verls(bench):
    """Validation rows go to `generate`, and columns about streaming reach nobody."""
    test = bench()
    output = asyncio.run(test.worker.generate_sequences(prompts(["1+1="], group_size=1, validate=True)))
    assert not any(record["streamed"] for record in test.server.served)
    grouped, _ = test.run([4])
    assert all(record["streamed"] and record["chunk_tokens"] == 2 for record in test.server.served[1:])
    assert "finish_reason" not in grouped.non_tensor_batch
    assert set(grouped.non_tensor_batch) - set(output.non_tensor_batch) <= {CANDIDATE, "uid"}


def test_settings_belong_to_the_call(bench):
    """The manager may change them from rollout to rollout."""
    test = bench(SHORTEST)
    test.script([at_one_speed(4, 30, 6, 8, 5)])
    assert not test.run([5])[1].aborted.any()
    test.server.served.clear()
    test.darts = dataclasses.replace(test.darts, early_stop="eager")
    assert test.run([5])[1].aborted.any()
