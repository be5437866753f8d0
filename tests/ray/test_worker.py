"""The agent-loop worker in this process, with verl's own agent loops and a server of scripted lengths."""

import asyncio
import time

import numpy as np
import pytest
from fakes import Turn, prompts
from worker_bench import CALL, Bench, lengths_of

from darts.messages import CANDIDATE
from darts.rollout.worker import CandidateError, candidate_seed
from darts.selection import select

pytestmark = pytest.mark.usefixtures("virtual_time")


@pytest.fixture
def bench(make_config):
    return lambda *overrides: Bench(make_config(*overrides))


def test_kept_are_the_k_shortest_and_l_longest_of_each_group(bench):
    """Random lengths, budgets and arrival; expected from the script by brute force, not from the worker's log."""
    rng = np.random.default_rng(0)
    test = bench("darts.selection.num_long=1", "darts.allocation.high=9")
    budgets = [4, 5, 7, 9, 8, 6]
    groups = [
        [Turn(int(rng.integers(2, 32)), delay=float(rng.uniform(0.5, 0.6))) for _ in range(budget)]
        for budget in budgets
    ]
    groups[2][3] = Turn(32, cut=True, delay=0.6)
    test.script(groups)
    output, pool = test.run(budgets)
    expected = []
    for number, (group, budget) in enumerate(zip(groups, budgets, strict=True)):
        num_long = 0 if budget == 9 else 1  # saturated
        kept = sorted(select([turn.length for turn in group], 4, num_long, [turn.cut for turn in group]))
        expected += [(f"uid-{number}", candidate, group[candidate].length) for candidate in kept]
    rows = output.non_tensor_batch
    assert list(zip(rows["uid"], rows[CANDIDATE], lengths_of(output), strict=True)) == expected
    assert len(test.server.served) == sum(budgets) == len(pool)
    assert pool.length.tolist() == [turn.length for group in groups for turn in group]
    assert pool.truncated.sum() == 1
    assert test.server.most_running == sum(budgets), "all candidates of a worker run at the same time"


def test_every_candidate_has_a_request_a_seed_and_a_priority_of_its_own(bench):
    test = bench()
    test.script([[Turn(5)] * 6, [Turn(5)] * 8])
    test.run([6, 8])
    served = test.server.served
    for key in ("request_id", "seed", "priority"):
        assert len({record[key] for record in served}) == 14, key
    assert sorted(record["priority"] for record in served) == list(range(14))


def test_without_a_seed_the_engine_draws(bench):
    test = bench("darts.seed=null")
    test.run([4])
    assert [record["seed"] for record in test.server.served] == [None] * 4


def test_full_determinism_seeds_each_candidate(bench):
    """verl's server would give every request of a replica the same seed, and all candidates would come out equal."""
    test = bench("darts.seed=null", "actor_rollout_ref.rollout.full_determinism=true")
    test.run([4])
    assert len({record["seed"] for record in test.server.served} - {None}) == 4


def test_a_seed_does_not_depend_on_the_other_prompts(bench):
    seeds = {(p, c): candidate_seed(3, 7, p, c) for p in range(20) for c in range(16)}
    assert len(set(seeds.values())) == len(seeds)
    assert candidate_seed(3, 7, 2, 5) == seeds[2, 5]
    assert candidate_seed(3, 8, 2, 5) != seeds[2, 5]


def test_only_the_kept_are_scored(bench):
    test = bench("darts.selection.mode=shortest_only")
    test.script([[Turn(length) for length in (9, 3, 8, 4, 7, 5)]])
    output, pool = test.run([6])
    assert sorted(test.reward.scored) == [3, 4, 5, 7]
    assert output.batch["rm_scores"].sum(dim=1).tolist() == [3, 4, 7, 5]
    assert np.isnan(pool.reward).sum() == 2


def test_with_reward_pool_all_finished_are_scored_once(bench):
    test = bench("darts.selection.mode=shortest_only", "darts.reward.pool=true")
    test.script([[Turn(length) for length in (9, 3, 8, 4, 7, 5)]])
    output, pool = test.run([6])
    assert sorted(test.reward.scored) == [3, 4, 5, 7, 8, 9]
    assert pool.reward.tolist() == [9, 3, 8, 4, 7, 5]
    assert output.batch["rm_scores"].sum(dim=1).tolist() == [3, 4, 7, 5]
    assert output.non_tensor_batch["length"].tolist() == [3, 4, 7, 5], "reward_extra_info of the kept"


def test_a_response_that_ends_exactly_at_the_limit_is_valid_and_one_that_does_not_is_truncated(bench):
    test = bench("darts.selection.num_long=1")
    test.script([[Turn(2), Turn(3), Turn(4), Turn(32, cut=True), Turn(32), Turn(5)]])
    output, pool = test.run([6])
    assert pool.truncated.tolist() == [False, False, False, True, False, False]
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 4]


def test_the_limit_is_what_max_model_len_leaves(bench):
    """A context of 40 leaves less than the response length; filling it without an end token is truncated."""
    test = bench("actor_rollout_ref.rollout.max_model_len=40")
    prompt = test.worker.tokenizer.apply_chat_template(
        [{"role": "user", "content": "0+1="}], add_generation_prompt=True, return_dict=False
    )
    left = 40 - len(prompt)
    assert 2 < left < 32
    test.script([[Turn(2), Turn(3), Turn(4), Turn(left, cut=True), Turn(5)]])
    _, pool = test.run([5])
    assert pool.truncated.tolist() == [False, False, False, True, False]


def test_without_max_model_len_the_limit_is_the_models(bench):
    """verl's server then takes the model's context length (512 here), in a configuration that only it sees."""
    test = bench(
        "actor_rollout_ref.rollout.max_model_len=null", "data.max_response_length=600", "data.max_prompt_length=64"
    )
    prompt = test.worker.tokenizer.apply_chat_template(
        [{"role": "user", "content": "0+1="}], add_generation_prompt=True, return_dict=False
    )
    test.script([[Turn(2), Turn(3), Turn(4), Turn(512 - len(prompt), cut=True), Turn(500 - len(prompt)), Turn(5)]])
    output, pool = test.run([6])
    assert pool.truncated.tolist() == [False, False, False, True, False, False]
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 4]


def test_arrival_is_the_end_of_generation_not_of_scoring(bench):
    test = bench("darts.reward.pool=true")
    test.script([[Turn(length, delay=length / 20) for length in (3, 4, 5, 6, 7)]])
    score = test.reward.compute_score

    async def slow_for_short(data):
        await asyncio.sleep(1 / data.batch["responses"].shape[1])
        return await score(data)

    test.worker.reward_loop_worker_handles[0].compute_score.remote = slow_for_short
    _, pool = test.run([5])
    assert pool.arrival.tolist() == [0, 1, 2, 3, 4]
    assert pool.reward.tolist() == [3, 4, 5, 6, 7]


def test_a_second_rollout_at_the_same_time_is_refused(bench):
    test = bench()
    test.worker._groups = {"uid": None}
    with pytest.raises(RuntimeError, match="still runs 1 prompts of another rollout"):
        test.run([4])


def test_too_few_valid_are_filled_with_truncated_ones_and_counted(bench):
    test = bench()
    test.script([[Turn(32, cut=True), Turn(4), Turn(32, cut=True), Turn(32, cut=True), Turn(32, cut=True)]])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert (pool.kept & pool.truncated).sum() == 3


def test_no_valid_candidate_fills_or_fails_as_asked(bench):
    cut = [[Turn(32, cut=True)] * 5]
    fill = bench()
    fill.script(cut)
    output, _ = fill.run([5])
    assert len(output) == 4
    fail = bench("darts.selection.on_no_valid=fail")
    fail.script(cut)
    with pytest.raises(CandidateError, match=r"uid=uid-0 .*none of the 5 candidates ended within the response budget"):
        fail.run([5])


def test_a_failing_agent_loop_fails_the_rollout_at_once_with_uid_and_cause(bench):
    """The other candidates are cancelled, not waited for, and none of them goes on."""
    test = bench()
    test.script([[Turn(5)] * 4, [Turn(5, delay=60), Turn(5), Turn(5, error="CUDA says no"), Turn(5)]])
    start = time.monotonic()
    with pytest.raises(CandidateError, match=r"candidate 2 of prompt uid=uid-1 .*RuntimeError: CUDA says no"):
        test.run([4, 4])
    assert time.monotonic() - start < 20
    assert test.server.running == 0
    assert not test.worker._groups
    assert not test.worker.llm_client._open


def test_a_rollout_that_is_given_up_stops_and_the_next_begins(bench):
    test = bench()
    test.script([[Turn(5, delay=60)] * 4])

    async def give_up_twice() -> None:
        rollout = asyncio.ensure_future(test.worker.generate_groups(test.batch([4]), test.darts, 1))
        while test.server.running < 4:
            await asyncio.sleep(0.01)
        await test.worker.give_up(1)
        await asyncio.sleep(0)  # the rollout stops its candidates now
        await test.worker.give_up(1)
        with pytest.raises(asyncio.CancelledError):
            await rollout
        assert len(test.server.aborts) == 1, "one call for all requests"
        assert not test.worker.llm_client._open
        while test.server.running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(give_up_twice(), 20))
    assert not test.worker._groups
    test.number = 1
    test.server.served.clear()
    test.script([[Turn(5)] * 4])
    output, _ = test.run([4])
    assert len(output) == 4


def test_a_rollout_that_is_given_up_while_it_stops_stops_to_the_end(bench):
    """A candidate has failed; its rollout waits for a server that answers aborts late."""
    test = bench()
    test.script([[Turn(5, error="CUDA says no"), Turn(5, delay=60), Turn(5), Turn(5)]])
    stopping, may_stop = asyncio.Event(), asyncio.Event()
    stop_all = test.worker._stop_all

    async def late_stop() -> None:
        stopping.set()
        await may_stop.wait()
        await stop_all()

    test.worker._stop_all = late_stop

    async def give_up_meanwhile() -> None:
        rollout = asyncio.ensure_future(test.worker.generate_groups(test.batch([4]), test.darts, 1))
        await stopping.wait()
        await test.worker.give_up(1)
        await asyncio.sleep(0.05)
        assert not rollout.done()
        may_stop.set()
        with pytest.raises(CandidateError, match="CUDA says no"):
            await rollout
        assert not test.worker.llm_client._open

    asyncio.run(asyncio.wait_for(give_up_meanwhile(), 20))
    assert not test.worker._groups


def test_a_rollout_that_is_given_up_before_it_begins_does_not_begin(bench):
    """Ray may run the small call first."""
    test = bench()

    async def give_up_first() -> None:
        listening = [test.worker.settled(1, 0), test.worker.take_growth(1, 5.0), test.worker.end_waits(1, [])]
        listening = [asyncio.ensure_future(call) for call in listening]
        await asyncio.sleep(0)
        await test.worker.give_up(1)
        await asyncio.wait_for(asyncio.gather(*listening), 5)
        with pytest.raises(asyncio.CancelledError):
            await test.worker.generate_groups(test.batch([4]), test.darts, 1)

    asyncio.run(give_up_first())
    assert test.server.served == []
    test.number = 1
    output, _ = test.run([4])
    assert len(output) == 4


def test_an_empty_response_is_a_failure_not_a_shorter_batch(bench):
    test = bench()
    test.script([[Turn(5), Turn(5), Turn(0), Turn(5)]])
    with pytest.raises(CandidateError, match=r"candidate 2 of prompt uid=uid-0 .*1 candidates were lost, 3 are left"):
        test.run([4])


def test_a_failing_reward_names_the_candidate(bench):
    test = bench()
    test.script([[Turn(5)] * 4])

    async def compute_score(data):
        raise ValueError("no such ground truth")

    test.worker.reward_loop_worker_handles[0].compute_score.remote = compute_score
    with pytest.raises(CandidateError, match=r"of prompt uid=uid-0 .*ValueError: no such ground truth"):
        test.run([4])


def test_after_a_failure_the_worker_serves_the_next_batch(bench):
    test = bench()
    test.script([[Turn(5), Turn(5), Turn(5, error="once"), Turn(5)]])
    with pytest.raises(CandidateError):
        test.run([4])
    test.script([[Turn(6)] * 4])
    test.server.served.clear()
    output, _ = test.run([4])
    assert lengths_of(output) == [6] * 4


def test_validation_and_plain_batches_take_verls_path(bench):
    test = bench()
    batch = prompts(["1+1=", "2+2="], group_size=1, validate=True)
    output = asyncio.run(test.worker.generate_sequences(batch))
    assert len(output) == 2
    assert CANDIDATE not in output.non_tensor_batch
    assert len(test.server.served) == 2


@pytest.fixture
def tool_file(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(
        "from verl.tools.function_tool import function_tool\n\n\n"
        "@function_tool\n"
        "def lookup(key: str) -> str:\n"
        '    """Looks a key up.\n\n    Args:\n        key: what to look up.\n    """\n'
        '    return "b" * 6\n'
    )
    return path


def test_multi_turn_length_is_what_the_model_generated_over_all_turns(bench, tool_file):
    """verl's tool agent loop with a local tool: tool tokens count for the limit, not for the length."""
    test = bench(
        "data.max_response_length=160",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=true",
        "actor_rollout_ref.rollout.multi_turn.format=hermes",
        "actor_rollout_ref.rollout.max_model_len=512",
        "data.max_prompt_length=300",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={tool_file}",
    )
    call_tokens = [*test.worker.tokenizer.encode(CALL), test.worker.tokenizer.eos_token_id]
    call = Turn(len(call_tokens), tokens=call_tokens)
    groups = [
        [
            [call, Turn(4)],
            [Turn(9)],
            [call, Turn(160, cut=True)],
            [Turn(5)],
            [Turn(6)],
            [call, Turn(30)],
        ]
    ]
    test.script(groups)
    output, pool = test.run([6])
    called = len(call_tokens)
    assert pool.length.tolist()[:2] == [called + 4, 9]
    assert pool.length.tolist()[3:] == [5, 6, called + 30]
    assert pool.truncated.tolist() == [False, False, True, False, False, False]
    assert pool.length[2] < 160, "the tool's tokens took part of the response budget"
    assert output.non_tensor_batch[CANDIDATE].tolist() == [1, 3, 4, 5]
    assert output.non_tensor_batch["__num_turns__"].tolist() == [2, 2, 2, 4]
