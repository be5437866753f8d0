"""Adaptive budgets through the manager: real workers and balancer over Ray, servers of scripted lengths."""

import dataclasses
import json

import numpy as np
import pytest
import ray
from fakes import Turn, prompts

from darts.history import prompt_key
from darts.messages import CANDIDATE
from darts.planning import RolloutPlanner
from darts.rollout.manager import DartsAgentLoopManager
from darts.rollout.worker import candidate_seed
from darts.selection import select

GROUP_SIZE, HIGH, LIMIT = 4, 8, 32
SPREADS = np.array([0, 12, 1, 2, 12, 1])
QUESTIONS = [f"{number}+1=" for number in range(len(SPREADS))]


@pytest.fixture(scope="module")
def cluster(scripted, make_config):
    """Two servers, three workers, one manager with adaptive budgets of 6 in the mean."""
    config = make_config(
        "actor_rollout_ref.rollout.agent.num_workers=3",
        "darts.allocation.mode=adaptive",
        "darts.allocation.mean_candidates=6",
        "darts.streaming.chunk_tokens=4",
    )
    return scripted.manager(config), scripted.servers


def lengths_at(step: int, order: list[int]) -> list[list[int]]:
    """Every candidate's length by step and prompt: the same however often it is asked for."""
    return [
        np.clip(np.rint(np.random.default_rng([step, number]).normal(16, SPREADS[number], size=HIGH)), 2, LIMIT - 1)
        .astype(int)
        .tolist()
        for number in order
    ]


def run(cluster, step: int, order: list[int] | None = None, held: tuple[int, ...] = ()):
    """One rollout of the prompts in this order; returns the kept rows, the rollout, and what the servers were asked.

    The two longest of the prompts in `held` never end by themselves.
    """
    manager, servers = cluster
    order = list(range(len(QUESTIONS))) if order is None else order
    turns = {
        candidate_seed(0, step, place, candidate): [
            Turn(length, delay=length / 100, held=order[place] in held and candidate in np.argsort(row)[-2:])
        ]
        for place, row in enumerate(lengths_at(step, order))
        for candidate, length in enumerate(row)
    }
    ray.get([server.load.remote(turns) for server in servers] + [server.take_records.remote() for server in servers])
    output = manager.generate_sequences(prompts([QUESTIONS[number] for number in order], GROUP_SIZE, step=step))
    served = [record for records in ray.get([server.take_records.remote() for server in servers]) for record in records]
    return output, manager.pop_rollout(), served


@pytest.fixture
def fresh(cluster):
    """The cluster with a manager that has learnt nothing."""
    manager, _ = cluster
    manager.planner = RolloutPlanner(ema_weight=0.3, response_length=LIMIT)
    return cluster


def test_heavy_prompts_get_more_and_every_row_is_joined_in_order(fresh):
    _, first, _ = run(fresh, step=1)
    assert first.plan.budgets.tolist() == [6] * 6
    output, second, served = run(fresh, step=2, order=[3, 1, 0, 4, 5, 2])
    budgets = second.plan.budgets
    assert budgets.sum() == 36 == len(served)
    assert (budgets[[1, 3]] == HIGH).all(), "prompts 1 and 4 vary most"
    assert (budgets[[2]] == GROUP_SIZE).all(), "prompt 0 does not vary"
    assert second.plan.keys == [prompt_key([{"role": "user", "content": QUESTIONS[n]}]) for n in (3, 1, 0, 4, 5, 2)]
    # K shortest and L longest in the batch's order; the saturated are shortest-only
    expected = [
        (f"uid-{place}", candidate, row[candidate])
        for place, (row, budget) in enumerate(zip(lengths_at(2, [3, 1, 0, 4, 5, 2]), budgets, strict=True))
        for candidate in sorted(select(row[:budget], GROUP_SIZE, 0 if budget == HIGH else 1))
    ]
    rows = output.non_tensor_batch
    kept = output.batch["response_mask"].sum(dim=1).tolist()
    assert list(zip(rows["uid"], rows[CANDIDATE], kept, strict=True)) == expected
    pool = second.pool
    assert pool.prompt.tolist() == np.repeat(np.arange(6), budgets).tolist()
    assert pool.length.tolist() == [
        n for row, budget in zip(lengths_at(2, [3, 1, 0, 4, 5, 2]), budgets, strict=True) for n in row[:budget]
    ]
    assert second.metrics["darts/history/known_share"] == 1
    assert second.metrics["darts/group/saturated_share"] == pytest.approx((budgets == HIGH).mean())
    assert 0 < second.metrics["darts/rollout/own_s"] < second.metrics["darts/rollout/seconds"]


def test_heavy_prompts_are_spread_over_workers_and_engines(fresh, monkeypatch):
    run(fresh, step=1)
    manager, _ = fresh
    plan = manager.planner.plan([prompt_key([{"role": "user", "content": text}]) for text in QUESTIONS], manager.rules)
    worker_of = {int(prompt): worker for worker, part in enumerate(plan.parts(3)) for prompt in part}
    assert worker_of[1] != worker_of[4]
    for routing in ("balanced", "group"):
        monkeypatch.setattr(manager, "rules", dataclasses.replace(manager.rules, routing=routing))
        _, rollout, served = run(fresh, step=3)
        order = rollout.plan.launch_order
        ends = np.cumsum(rollout.plan.budgets[order])
        asked = [(order[np.searchsorted(ends, record["priority"], "right")], record["server"]) for record in served]
        servers_of = [{server for number, server in asked if number == prompt} for prompt in range(len(QUESTIONS))]
        if routing == "balanced":
            assert len(servers_of[1]) == len(servers_of[4]) == 2, "each over both engines"
        else:
            assert all(len(servers) == 1 for servers in servers_of), "each where its first candidate went"
            assert len(set.union(*servers_of)) == 2, "which verl's balancer chose by load"


def test_a_planner_that_resumes_gives_the_budgets_of_the_uninterrupted_run(fresh):
    """Scripted lengths: every step after the resumed one too. Orders and prompts differ from step to step."""
    manager, _ = fresh
    orders = [np.random.default_rng(step).permutation(6)[:5].tolist() for step in range(8)]
    budgets, saved = [], None
    for step, order in enumerate(orders):
        if step == 4:
            saved = json.dumps(manager.planner.state_dict())
        budgets.append(run(fresh, step, order)[1].plan.budgets.tolist())
    assert len({tuple(row) for row in budgets[4:]}) > 1
    assert all(max(row) > min(row) for row in budgets[4:])
    manager.planner = RolloutPlanner(ema_weight=0.3, response_length=LIMIT)
    manager.planner.load_state_dict(json.loads(saved))
    again = [run(fresh, step, order)[1].plan.budgets.tolist() for step, order in enumerate(orders) if step >= 4]
    assert again == budgets[4:]


def test_early_stop_feeds_the_history_with_censored_lengths(fresh, monkeypatch):
    """What is aborted counts at the length it had, and the estimate is above that of what was seen."""
    manager, _ = fresh
    monkeypatch.setattr(manager, "rules", dataclasses.replace(manager.rules, early_stop="eager"))
    run(fresh, step=1)
    _, rollout, _ = run(fresh, step=2, held=(1, 4))
    assert np.flatnonzero(rollout.plan.budgets == HIGH).tolist() == [1, 4], "the saturated"
    for prompt in (1, 4):
        rows = rollout.pool.prompt == prompt
        assert rollout.pool.aborted[rows].any()
        assert rollout.observed_std[prompt] > rollout.pool.length[rows].std()


def test_the_planner_is_told_the_engines_limits(fresh, make_config):
    manager, _ = fresh
    config = make_config("actor_rollout_ref.rollout.max_num_seqs=77")
    planner = DartsAgentLoopManager(config, manager.llm_client).planner
    assert planner.max_running == 77


def test_prompts_without_a_stable_form_are_told_apart_by_their_text(fresh, capsys):
    manager, _ = fresh
    odd = [[{"role": "user", "content": [{"type": "text", "text": text}, {"video": object()}]}] for text in "aab"]
    keys = [manager._key(prompt) for prompt in odd]
    assert keys[0] == keys[1] != keys[2]
    assert capsys.readouterr().out.count("told apart by their text alone") == 1


def test_an_empty_batch_is_refused(fresh):
    manager, _ = fresh
    empty = prompts(["1+1="], GROUP_SIZE).select_idxs(np.zeros(0, dtype=np.int64))
    with pytest.raises(RuntimeError, match="empty batch"):
        manager.generate_sequences(empty)
