"""Rollouts by the real manager, agent-loop worker, client, balancer and vLLM server; only the reward is a counter."""

import asyncio
import dataclasses
import threading
import time
from collections import Counter

import numpy as np
import pandas
import pytest
import ray
from engine_state import LIMIT_S, EngineState, engine_config, run_in_server
from fakes import CountingReward, prompts
from start_together import hold, release

from darts.messages import CANDIDATE
from darts.rollout import manager as manager_module
from darts.rollout.manager import DartsAgentLoopManager
from darts.selection import select
from darts.testbed import assets_dir

M, CANDIDATES, PROMPTS = 8, 12, 6
TIMES = ("darts/early_stop/stop_s_max", "darts/rollout/tail_s", "darts/rollout/seconds")


@pytest.fixture(scope="module")
def manager(engine, tmp_path_factory):
    """12 candidates for 8, seeded; a local tool for verl's tool agent loop."""
    tools = tmp_path_factory.mktemp("tools") / "tools.py"
    tools.write_text(
        "from verl.tools.function_tool import function_tool\n\n\n@function_tool\n"
        'def look_up(key: str) -> str:\n    """Looks up.\n\n    Args:\n        key: a key.\n    """\n    return key\n'
    )
    config = engine_config(
        "darts.allocation.mode=uniform",
        "darts.allocation.high=null",
        f"darts.allocation.mean_candidates={CANDIDATES}",
        "darts.selection.mode=shortest_only",
        "darts.streaming.chunk_tokens=4",
        "darts.reward.pool=false",
        "darts.progress_s=0",
        "darts.timeout_s=600",
        "data.max_prompt_length=256",
        "actor_rollout_ref.rollout.multi_turn.format=hermes",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={tools}",
    )
    reward = ray.remote(CountingReward).remote()
    manager = DartsAgentLoopManager.create(
        config=config, llm_client=engine.get_client(), reward_loop_worker_handles=[reward]
    )
    manager.generate_sequences(batch(1, step=0))  # starts the worker
    yield manager
    for worker in manager.agent_loop_workers:
        ray.kill(worker)


@pytest.fixture
def configure(manager, monkeypatch):
    """Changes settings for the rest of the test."""

    def change(selection="shortest_only", long_wait="all", long_end="finished", **changes):
        modes = {"mode": selection, "long_wait": long_wait, "long_end": long_end}
        sections = {"selection": dataclasses.replace(manager.rules.selection, **modes)}
        monkeypatch.setattr(manager, "rules", dataclasses.replace(manager.rules, **sections, **changes))

    return change


def batch(count, step, validate=False):
    questions = pandas.read_parquet(assets_dir("overthink") / "train.parquet")["prompt"]
    return prompts([questions[number][0]["content"] for number in range(count)], M, step=step, validate=validate)


def responses(output):
    """Response tokens by (uid, candidate)."""
    rows = zip(output.non_tensor_batch["uid"], output.non_tensor_batch[CANDIDATE], strict=True)
    masks, tokens = output.batch["response_mask"].bool(), output.batch["responses"]
    return {row: tokens[i][masks[i]].tolist() for i, row in enumerate(rows)}


def pools(manager, monkeypatch):
    """Collects the pool of each rollout, which the manager otherwise turns into metrics at once."""
    collected, metrics = [], manager_module.rollout_metrics
    monkeypatch.setattr(
        manager_module, "rollout_metrics", lambda pool, *args: (collected.append(pool), metrics(pool, *args))[1]
    )
    return collected


def test_exact_keeps_what_the_same_seeds_give_without_stopping(manager, configure, server, monkeypatch):
    """On a busy machine all may have ended before anybody is stopped: then with the next step's seeds again."""
    collected = pools(manager, monkeypatch)
    num_stopped = tokens_saved = 0
    for step in range(1, 21):
        configure(early_stop="off")
        full = responses(manager.generate_sequences(batch(PROMPTS, step=step)))
        configure(early_stop="exact")
        output = responses(manager.generate_sequences(batch(PROMPTS, step=step)))
        EngineState.wait_idle(server)
        off, exact = collected[-2:]
        expected = {
            (f"uid-{p}", c)
            for p in range(PROMPTS)
            for c in select(off.length[off.prompt == p].tolist(), M, 0, off.truncated[off.prompt == p].tolist())
        }
        assert set(output) == set(full) == expected
        assert output == full, "token for token"
        assert not off.aborted.any()
        stopped = exact.aborted
        assert (exact.length[~stopped] == off.length[~stopped]).all()
        assert (exact.length[stopped] <= off.length[stopped]).all()
        num_stopped += stopped.sum()
        tokens_saved += off.length.sum() - exact.length.sum()
        if num_stopped >= PROMPTS:
            break
    assert num_stopped >= PROMPTS
    assert tokens_saved > 0


def test_eager_and_exact_agree_where_all_start_together(manager, configure, server, monkeypatch):
    """The engine holds the twelve back until all are there.

    Of rollouts whose ends were heard in another order than that of their lengths, as a busy machine may do, eager and
    exact keep what they heard of; they come again with another step.
    """
    collected = pools(manager, monkeypatch)
    kept, agreed = {}, 0
    for step in range(2, 32):
        for mode in ("eager", "exact"):
            configure(early_stop=mode)
            run_in_server(server, hold)
            thread = threading.Thread(target=release_when_all_wait, args=(server,))
            thread.start()
            kept[mode] = responses(manager.generate_sequences(batch(1, step=step)))
            thread.join(timeout=LIMIT_S)
        lengths = {mode: sorted(len(tokens) for tokens in rows.values()) for mode, rows in kept.items()}
        assert all(np.array(lengths["eager"]) >= lengths["exact"]), "the shortest are the shortest"
        if not heard_in_order(collected[-2]):
            continue
        assert lengths["eager"] == lengths["exact"], "ties apart, the same responses"
        same = set(kept["eager"]) & set(kept["exact"])
        assert all(kept["eager"][row] == kept["exact"][row] for row in same)
        ties = lengths["eager"].count(lengths["eager"][-1])
        assert len(same) >= M - ties
        agreed += 1
        if agreed == 5:
            break
    assert agreed == 5
    assert sum(pool.aborted.sum() for pool in collected) >= 5


def heard_in_order(pool):
    """Whether nobody who was dropped has fewer tokens than one who was kept."""
    return pool.length[~pool.kept].min() >= pool.length[pool.kept].max()


def release_when_all_wait(server):
    deadline = time.monotonic() + LIMIT_S
    while EngineState.state(server)["waiting"] < CANDIDATES:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run_in_server(server, release)


@pytest.mark.parametrize(("selection", "long_wait"), [("shortest_only", "all"), ("dual_end", "deadline")])
def test_nothing_runs_on_after_any_rollout(manager, configure, server, selection, long_wait):
    """0 running, 0 waiting, all KV blocks free; and an abort takes a small part of a rollout, not a time-out."""
    configure(selection=selection, long_wait=long_wait, early_stop="eager")
    aborted, totals = 0, Counter()
    for step in range(10, 15):
        manager.generate_sequences(batch(PROMPTS, step=step))
        state = EngineState.state(server)
        assert (state["running"], state["waiting"]) == (0, 0)
        assert state["free_blocks"] == state["total_blocks"]
        metrics = manager.pop_rollout().metrics
        aborted += metrics["darts/candidates/aborted"]
        assert metrics["darts/candidates/lost"] == 0
        totals.update({name: metrics.get(name, 0) for name in TIMES})
    stop, tail, seconds = (totals[name] for name in TIMES)
    assert max(stop, tail) < seconds / 2
    assert aborted >= 5 * PROMPTS


def test_the_deadline_keeps_a_long_example_of_what_has_finished(manager, configure, server, monkeypatch):
    collected = pools(manager, monkeypatch)
    configure(selection="dual_end", long_wait="deadline")
    output = responses(manager.generate_sequences(batch(PROMPTS, step=20)))
    (pool,) = collected
    assert pool.aborted.any()
    for p in range(PROMPTS):
        rows = np.flatnonzero((pool.prompt == p) & (pool.arrival >= 0))
        valid = rows[~pool.truncated[rows]]
        assert len(valid) >= M
        kept = select(pool.length[valid].tolist(), M, 1)
        # One that had ended before its abort arrived has finished, but was not chosen from.
        late = valid[~np.isnan(pool.stop_seconds[valid])]
        if not len(late):
            assert {c for uid, c in output if uid == f"uid-{p}"} == set(pool.candidate[valid[kept]].tolist())


@pytest.mark.parametrize("long_wait", ["deadline", "none"])
def test_what_was_cut_is_the_beginning_of_what_the_same_seeds_give(manager, configure, server, monkeypatch, long_wait):
    """M of M candidates are kept, so every row has its counterpart in a run that stops nothing."""
    collected, num_cut = pools(manager, monkeypatch), 0
    m_of_m = dataclasses.replace(manager.rules.allocation, mode="off")
    for step in range(70, 90):
        configure(early_stop="off", allocation=m_of_m)
        full = responses(manager.generate_sequences(batch(PROMPTS, step=step)))
        configure(selection="dual_end", long_end="cut", long_wait=long_wait, allocation=m_of_m)
        output = responses(manager.generate_sequences(batch(PROMPTS, step=step)))
        EngineState.wait_idle(server)
        pool = collected[-1]
        assert set(output) == set(full)
        assert len(output) == PROMPTS * M
        names = [(f"uid-{prompt}", candidate) for prompt, candidate in zip(pool.prompt, pool.candidate, strict=True)]
        lengths = dict(zip(names, pool.length, strict=True))
        cut = {name for name, is_cut in zip(names, pool.cut, strict=True) if is_cut}
        for row, tokens in output.items():
            assert len(tokens) == lengths[row] > 0
            assert tokens == (full[row][: len(tokens)] if row in cut else full[row])
        assert all(pool.cut[pool.prompt == prompt].sum() <= 1 for prompt in range(PROMPTS))
        num_cut += len(cut)
        if num_cut >= PROMPTS:
            break
    assert num_cut >= PROMPTS


def test_siblings_share_the_prompt_and_an_abort_leaves_it_cached(manager, configure, server):
    configure(early_stop="eager")
    manager.generate_sequences(batch(PROMPTS, step=30))
    first = manager.pop_rollout().metrics
    manager.generate_sequences(batch(PROMPTS, step=31))
    again = manager.pop_rollout().metrics
    assert first["darts/candidates/aborted"] > 0
    assert again["darts/rollout/prefix_cached_share"] >= first["darts/rollout/prefix_cached_share"] > 0


def test_a_weight_update_in_the_middle_of_a_rollout_is_refused(manager, configure, server):
    configure(selection="dual_end")

    in_the_middle = []

    def update_once_some_have_ended():
        most, deadline = 0, time.monotonic() + LIMIT_S
        while (running := EngineState.state(server)["running"]) >= most or not most:
            assert time.monotonic() < deadline
            most = max(most, running)
            time.sleep(0.005)
        ray.get(server.set_global_steps.remote(8))
        in_the_middle.append(EngineState.state(server)["running"] > 0)

    ray.get(server.set_global_steps.remote(7))
    manager.generate_sequences(batch(1, step=40))
    assert manager.pop_rollout().metrics["darts/rollout/weights_step"] == 7
    said = []
    for step in range(41, 45):  # on a busy machine the rollout may be over first
        ray.get(server.set_global_steps.remote(7))
        thread = threading.Thread(target=update_once_some_have_ended)
        thread.start()
        try:
            manager.generate_sequences(batch(PROMPTS, step=step))
        except RuntimeError as error:
            said.append(str(error))
            break
        finally:
            thread.join()
        assert in_the_middle[-1] is False, "some ended before the update and some after it, and nobody minded"
    assert len(said) == 1
    assert "generated by weights of steps [7, 8]" in said[0]


def test_an_engine_paused_for_a_weight_update_ends_the_rollout_with_the_cause(manager, configure, server):
    """verl's own `abort_all_requests` ends every open stream; too few are left, and nothing hangs."""
    configure(early_stop="eager")

    async def pause_in_the_middle():
        rollout = asyncio.ensure_future(manager._generate_groups(batch(PROMPTS, step=50)))
        while (await asyncio.to_thread(EngineState.state, server))["running"] < PROMPTS * CANDIDATES / 2:
            await asyncio.sleep(0.01)
        await _wait(server.abort_all_requests.remote())
        try:
            await asyncio.wait_for(rollout, LIMIT_S)
        finally:
            await _wait(server.resume_generation.remote())

    with pytest.raises(ray.exceptions.RayTaskError, match=r"candidates were lost, \d are left: 8 are needed"):
        asyncio.run(pause_in_the_middle())
    EngineState.wait_idle(server)
    assert len(manager.generate_sequences(batch(PROMPTS, step=51))) == PROMPTS * M, "the next rollout is served"


async def _wait(ref):
    return await ref


@pytest.mark.parametrize("agent", ["single_turn_agent", "tool_agent"])
def test_verls_agent_loops_run_unchanged_in_training_and_validation(manager, configure, server, agent):
    configure(early_stop="eager")
    train = batch(2, step=60)
    train.non_tensor_batch["agent_name"] = np.array([agent] * len(train), dtype=object)
    output = manager.generate_sequences(train)
    assert output.non_tensor_batch["uid"].tolist() == ["uid-0"] * M + ["uid-1"] * M
    assert manager.pop_rollout().metrics["darts/candidates/aborted"] > 0
    validate = batch(2, step=60, validate=True)
    validate.non_tensor_batch["agent_name"] = np.array([agent] * len(validate), dtype=object)
    EngineState.reset(server)
    answered = manager.generate_sequences(validate)
    tokens = sum(count for _, _, count in EngineState.token_log(server))
    assert len(answered) == len(validate)
    assert answered.batch["response_mask"].sum() == tokens, "no more candidates than rows, and none was stopped"
    assert manager.pop_rollout() is None
