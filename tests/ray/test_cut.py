"""The cut long end in the agent-loop worker: what is kept is what was generated, whatever the agent loop is."""

import asyncio

import numpy as np
import pytest
from fakes import Turn
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from worker_bench import CALL, Bench, lengths_of

from darts.messages import CANDIDATE
from darts.pool import State

pytestmark = pytest.mark.usefixtures("virtual_time")

CUT = ("darts.selection.mode=dual_end", "darts.selection.long_end=cut")


@pytest.fixture
def bench(make_config):
    return lambda *overrides: Bench(make_config("darts.streaming.chunk_tokens=2", *CUT, *overrides))


def at_one_speed(*lengths: int) -> list[Turn]:
    return [Turn(length, delay=length / 20) for length in lengths]


def kept_tokens(output) -> list[list[int]]:
    """The response of each row."""
    responses, mask = output.batch["responses"].tolist(), output.batch["response_mask"].bool().tolist()
    return [[token for token, own in zip(*row, strict=True) if own] for row in zip(responses, mask, strict=True)]


@pytest.mark.parametrize("wait", ["deadline", "none"])
def test_the_longest_that_runs_is_kept_with_what_it_has(bench, wait):
    test = bench(f"darts.selection.long_wait={wait}")
    test.script([at_one_speed(4, 30, 6, 5, 32), at_one_speed(31, 8, 7, 9)])
    output, pool = test.run([5, 4]) if wait == "none" else test.run_until([5, 4], num_settled=2)
    kept = np.flatnonzero(pool.kept)
    assert [State(letter) for letter in pool.state[pool.kept]].count(State.CUT) == 2
    assert pool.cut[5], "the only one left"
    assert pool.cut[[1, 4]].sum() == 1
    assert pool.aborted[[1, 4]].sum() == 1
    generated = [record["answer"] for record in test.served()]
    assert kept_tokens(output) == [generated[candidate] for candidate in kept]
    assert pool.length.tolist() == [len(tokens) for tokens in generated]
    assert (pool.length[[1, 4, 5]] < 30).all()
    assert output.batch["rollout_log_probs"][output.batch["response_mask"].bool()].unique().tolist() == [-0.5]
    assert output.batch["prompts"][0].tolist() == output.batch["prompts"][1].tolist()
    assert output.non_tensor_batch["__num_turns__"].tolist() == [2] * 8
    assert sorted(test.reward.scored) == sorted(lengths_of(output)), "what is kept is scored, and nothing else"
    assert test.server.running == 0


def test_of_two_that_run_on_the_longer_is_kept(bench):
    test = bench("darts.selection.long_wait=none")
    slow, fast = Turn(30, delay=6), Turn(30, delay=1.5)
    test.script([[*at_one_speed(4, 6), slow, fast, *at_one_speed(5)]])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 3, 4]
    assert pool.length[2] < pool.length[3]


def test_one_that_ends_while_its_abort_is_on_the_way_is_kept_whole(bench):
    test = bench("darts.selection.long_wait=none")
    test.server.script.deaf = True
    test.script([at_one_speed(4, 6, 5, 9)])
    output, pool = test.run([4])
    assert lengths_of(output) == [4, 6, 5, 9]
    assert not pool.cut.any()


def test_one_that_waits_in_the_queue_has_nothing_to_be_kept_with(bench):
    test = bench("darts.selection.long_wait=none")
    test.script([[*at_one_speed(4, 6, 5), Turn(2, delay=8)]])
    output, pool = test.run([4])
    assert lengths_of(output)[3] == 1, "its first token, at the latest"
    assert pool.cut.tolist() == [False] * 3 + [True]


def test_groups_that_the_rollout_does_not_go_on_with_keep_nothing(bench):
    test = bench("darts.selection.long_wait=deadline")
    test.script([at_one_speed(4, 5, 6, 32), at_one_speed(8, 9, 7, 30), at_one_speed(28, 29, 30, 31)])
    output, pool = test.run_until([4, 4, 4], num_settled=2, trained=["uid-0", "uid-1"])
    assert output.non_tensor_batch["uid"].tolist() == ["uid-0"] * 4 + ["uid-1"] * 4
    assert pool.cut.tolist() == [False, False, False, True] * 2 + [False] * 4
    assert pool.aborted.tolist() == [False] * 8 + [True] * 4


def test_the_overlapped_actor_is_told_a_cut_one_to_its_last_token(bench):
    test = bench("darts.selection.long_wait=none", "darts.overlap.mode=token")
    test.script([at_one_speed(4, 30, 6, 5, 32)])
    test.run([5])
    progress = test.worker._outbox._news
    told: dict = {}
    for growth in progress.growths:
        told.setdefault(growth.row.key, []).extend(growth.row.token_ids.tolist())
        assert growth.row.start + len(growth.row.token_ids) == len(told[growth.row.key])
    (cut_key,) = [key for key in progress.kept if key.candidate in (1, 4)]
    record = test.served()[cut_key.candidate]
    assert told[cut_key] == [*record["prompt_ids"], *record["answer"]]
    assert progress.growths[-1].row.last


TOOLS = """
import asyncio
from verl.tools.function_tool import function_tool


@function_tool
async def find(key: str) -> str:
    \"\"\"Looks a key up.

    Args:
        key: what to look up.
    \"\"\"
    return "forty"


@function_tool
async def find_slowly(key: str) -> str:
    \"\"\"Looks a key up.

    Args:
        key: what to look up.
    \"\"\"
    await asyncio.sleep(60)
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A file of tools; verl refuses the same names from another."""
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    return path


@pytest.fixture
def tool_bench(bench, tools):
    return bench(
        "darts.selection.long_wait=none",
        "data.max_response_length=200",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=true",
        "actor_rollout_ref.rollout.multi_turn.format=hermes",
        "actor_rollout_ref.rollout.max_model_len=1024",
        "data.max_prompt_length=700",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={tools}",
    )


def test_of_several_turns_the_answer_is_what_it_has_and_one_in_its_tool_is_passed_over(tool_bench):
    test = tool_bench
    tokenizer = test.worker.tokenizer

    def call(name):
        tokens = [*tokenizer.encode(CALL.replace("lookup", name)), tokenizer.eos_token_id]
        return Turn(len(tokens), tokens=tokens, delay=0.1)

    short = [[Turn(5, delay=2)], [Turn(6, delay=2)], [Turn(7, delay=2)]]
    cut, in_tool = [call("find"), Turn(60, delay=12)], [call("find_slowly"), Turn(9)]
    test.script([[cut, *short, in_tool]])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.cut.tolist() == [True] + [False] * 4
    assert pool.aborted.tolist() == [False] * 4 + [True]
    first, second = sorted(
        (record for record in test.server.served if record["seed"] == test.served()[0]["seed"]),
        key=lambda record: len(record["prompt_ids"]),
    )
    prompt, whole = first["prompt_ids"], [*second["prompt_ids"], *second["answer"]]
    attended = output.batch["attention_mask"][0].bool()
    assert output.batch["input_ids"][0][attended].tolist() == whole
    assert kept_tokens(output)[0] == [*first["answer"], *second["answer"]]
    assert pool.length[0] == len(first["answer"]) + len(second["answer"])
    response_mask = output.batch["response_mask"][0][: len(whole) - len(prompt)]
    tool_answer = second["prompt_ids"][len(prompt) + len(first["answer"]) :]
    assert (response_mask == 0).sum() == len(tool_answer) > 0
    log_probs = output.batch["rollout_log_probs"][0][: len(whole) - len(prompt)]
    assert log_probs.tolist() == [-0.5 if own else 0.0 for own in response_mask]
    assert output.non_tensor_batch["__num_turns__"].tolist() == [4, 2, 2, 2]


def test_a_group_waits_for_one_in_its_tool_where_it_has_no_other(tool_bench):
    test = tool_bench
    tokens = [*test.worker.tokenizer.encode(CALL.replace("lookup", "find_slowly")), test.worker.tokenizer.eos_token_id]
    in_tool = [Turn(len(tokens), tokens=tokens, delay=0.1), Turn(60, delay=12)]
    test.script([[[Turn(5, delay=2)], [Turn(6, delay=2)], [Turn(7, delay=2)], in_tool]])
    output, pool = test.run([4])
    assert pool.cut.tolist() == [False] * 3 + [True]
    assert pool.length[3] == len(tokens), "it is cut as soon as it has begun the turn behind its tool"
    assert kept_tokens(output)[3] == tokens
    assert output.non_tensor_batch["__num_turns__"].tolist() == [2] * 4, "of the turn behind it nothing is there"


def test_a_loop_that_rewrites_its_context_is_passed_over(bench, monkeypatch):
    """What its requests had does not follow one another, so there is no answer that they make."""
    run = SingleTurnAgentLoop.run

    async def twice(self, sampling_params, priority=0, **kwargs):
        if priority == 4:
            await self.server_manager.generate(
                request_id="r", prompt_ids=[7, 7, 7], sampling_params=sampling_params, priority=int(priority)
            )
        return await run(self, sampling_params, priority=priority, **kwargs)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", twice)
    test = bench("darts.selection.long_wait=none")
    test.script([[*at_one_speed(14, 16, 15, 30), [Turn(2, delay=0.1), Turn(31, delay=1.0)]]])
    output, pool = test.run([5])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.length[4] > pool.length[3], "though it was longer"


def test_a_request_that_its_loop_gave_up_leaves_nothing_to_be_cut_with(bench, monkeypatch):
    """The deadline falls before the loop tries again; the group waits for it."""
    run, tries = SingleTurnAgentLoop.run, []

    async def hasty(self, sampling_params, priority=0, **kwargs):
        if priority == 3 and not tries:
            tries.append(asyncio.ensure_future(run(self, sampling_params, priority=priority, **kwargs)))
            await asyncio.wait(tries, timeout=0.6)
            tries[0].cancel()
            await asyncio.sleep(1)
        return await run(self, sampling_params, priority=priority, **kwargs)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", hasty)
    test = bench("darts.selection.long_wait=none")
    late = [Turn(30, delay=3), Turn(30, delay=3)]
    test.script([[*at_one_speed(14, 16, 15), late]])
    output, pool = test.run([4])
    assert output.non_tensor_batch[CANDIDATE].tolist() == [0, 1, 2, 3]
    assert pool.cut.tolist() == [False] * 3 + [True]
    assert lengths_of(output)[3] > 0
