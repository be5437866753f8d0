"""The rollout manager over Ray: real agent-loop workers and verl's load balancer, servers of scripted lengths."""

import asyncio
import dataclasses
import re
import threading
import time

import numpy as np
import pytest
import ray
import torch
from fakes import Turn, prompts
from scripted_cluster import ScriptedCluster, kill
from tensordict import TensorDict
from verl.utils.skip import SkipManager

from darts.allocation import allocate, rounded_total
from darts.messages import CANDIDATE
from darts.metrics import METRICS
from darts.rollout.worker import candidate_seed
from darts.selection import select

GROUP_SIZE = 4
NUM_WORKERS = 3


@pytest.fixture(scope="module")
def cluster(scripted, make_config):
    """Two servers, three workers, one manager."""
    config = make_config(
        f"actor_rollout_ref.rollout.agent.num_workers={NUM_WORKERS}", "darts.allocation.mean_candidates=5.5"
    )
    return scripted.manager(config), scripted.servers


@pytest.fixture(scope="module")
def mortal(local_ray, make_config):
    """A manager with one worker, and servers, that may die."""
    config = make_config("actor_rollout_ref.rollout.agent.num_workers=1", "darts.allocation.mean_candidates=5.5")
    cluster = ScriptedCluster(config, num_servers=1)
    return cluster.manager(config), cluster.servers


def served(servers) -> list[dict]:
    return [record for records in ray.get([server.take_records.remote() for server in servers]) for record in records]


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 7, 16])
def test_any_number_of_prompts_gives_m_rows_each_in_order(cluster, num_prompts):
    """Also fewer prompts than workers. The servers' default answer is 3 tokens for everyone: ties go by index."""
    manager, servers = cluster
    served(servers)
    batch = prompts([f"{number}+2=" for number in range(num_prompts)], GROUP_SIZE, step=num_prompts)
    output = manager.generate_sequences(batch)
    budgets = allocate(np.ones(num_prompts), rounded_total(num_prompts, 5.5), GROUP_SIZE, 2 * GROUP_SIZE)
    assert output.non_tensor_batch["uid"].tolist() == [
        f"uid-{n}" for n in range(num_prompts) for _ in range(GROUP_SIZE)
    ]
    expected = [c for budget in budgets for c in sorted(select([3] * budget, GROUP_SIZE, 1))]
    assert output.non_tensor_batch[CANDIDATE].tolist() == expected
    records = served(servers)
    assert len(records) == budgets.sum()
    assert sorted(record["priority"] for record in records) == list(range(budgets.sum()))
    assert len({record["seed"] for record in records}) == budgets.sum()
    metrics = manager.pop_rollout().metrics
    assert set(metrics) <= set(METRICS)
    assert metrics["darts/candidates/launched"] == budgets.sum()
    assert metrics["darts/candidates/kept"] == num_prompts * GROUP_SIZE
    assert manager.pop_rollout() is None
    # what verl's trainer does with the result; a wrong order would fail in it
    batch.batch = TensorDict({"dummy_tensor": torch.zeros(len(batch), 1)}, batch_size=len(batch))
    trained = batch.union(output)
    assert len(trained) == num_prompts * GROUP_SIZE
    assert "agent_loop/generate_sequences/max" in trained.meta_info["timing"]


def test_validation_is_untouched(cluster):
    """Padded rows share uids: no grouping, no seed, one request per row."""
    manager, servers = cluster
    served(servers)
    batch = prompts(["1+1="] * NUM_WORKERS, 2, validate=True)
    batch.non_tensor_batch["uid"][:] = "same"
    output = manager.generate_sequences(batch)
    assert len(output) == len(batch)
    assert {record["seed"] for record in served(servers)} == {None}
    assert manager.pop_rollout() is None


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "groups"])
def test_a_limit_of_a_rollouts_own_cuts_its_responses_and_no_others(cluster, plain):
    """The servers' default answer is 3 tokens for everyone."""
    manager, servers = cluster
    rules = manager.rules
    try:
        manager.begin_round(dataclasses.replace(rules, enable=not plain))
        manager.limit_responses(2)
        questions = [f"{number}+1=" for number in range(NUM_WORKERS)]  # plain verl deals rows out in equal parts
        output = manager.generate_sequences(prompts(questions, GROUP_SIZE, step=90))
        assert output.batch["response_mask"].sum(dim=-1).tolist() == [2] * NUM_WORKERS * GROUP_SIZE
        pool = manager.pop_rollout().pool
        assert pool.truncated.all()
        assert manager.planner.response_length == 2
        validated = manager.generate_sequences(prompts(["1+1="] * NUM_WORKERS, 1, validate=True))
        assert validated.batch["response_mask"].sum(dim=-1).tolist() == [3] * NUM_WORKERS
    finally:
        manager.begin_round(rules)
        manager.limit_responses(None)
    output = manager.generate_sequences(prompts(["1+1="], GROUP_SIZE, step=91))
    assert output.batch["response_mask"].sum(dim=-1).tolist() == [3] * GROUP_SIZE
    assert not manager.pop_rollout().pool.truncated.any()
    served(servers)


def test_a_batch_that_is_not_interleaved_groups_is_refused(cluster):
    manager, _ = cluster
    batch = prompts(["1+1=", "2+2="], GROUP_SIZE)
    shuffled = batch.select_idxs(np.arange(len(batch))[::-1].copy().reshape(2, -1).T.ravel())
    with pytest.raises(RuntimeError, match=r"rollout.n=4 times in consecutive rows"):
        manager.generate_sequences(shuffled)


def test_lengths_decide_across_workers(cluster):
    """Random lengths and delays; expected by brute force from the script."""
    manager, servers = cluster
    rng = np.random.default_rng(1)
    budgets = allocate(np.ones(7), rounded_total(7, 5.5), GROUP_SIZE, 2 * GROUP_SIZE)
    groups = [
        [Turn(int(rng.integers(1, 33)), delay=float(rng.uniform(0, 0.2))) for _ in range(budget)] for budget in budgets
    ]
    turns = {
        candidate_seed(0, 50, prompt, candidate): [turn]
        for prompt, group in enumerate(groups)
        for candidate, turn in enumerate(group)
    }
    ray.get([server.load.remote(turns) for server in servers])
    output = manager.generate_sequences(prompts([f"{number}+3=" for number in range(7)], GROUP_SIZE, step=50))
    expected = [
        (f"uid-{number}", candidate, group[candidate].length)
        for number, group in enumerate(groups)
        for candidate in sorted(select([turn.length for turn in group], GROUP_SIZE, 1))
    ]
    rows = output.non_tensor_batch
    lengths = output.batch["response_mask"].sum(dim=1).tolist()
    assert list(zip(rows["uid"], rows[CANDIDATE], lengths, strict=True)) == expected
    assert output.batch["rm_scores"].sum(dim=1).tolist() == lengths


def test_it_can_be_awaited_as_verls_asynchronous_trainers_do(cluster):
    manager, _ = cluster

    async def await_it():
        return await manager.generate_sequences(prompts(["1+1="], GROUP_SIZE))

    assert len(asyncio.run(await_it())) == GROUP_SIZE


def test_a_dumped_rollout_is_replayed_into_a_batch_with_other_uids(cluster, make_config, tmp_path):
    """verl's `skip.rollout`: the second call generates nothing and joins the new batch."""
    manager, servers = cluster
    SkipManager.init(
        make_config("skip.rollout.enable=true", f"skip.rollout.dump_dir={tmp_path}", "skip.rollout.steps=[3]")
    )
    try:
        SkipManager.set_step(3)
        first = manager.generate_sequences(prompts(["1+1=", "2+2="], GROUP_SIZE))
        manager.pop_rollout()
        served(servers)
        batch = prompts(["1+1=", "2+2="], GROUP_SIZE)
        batch.non_tensor_batch["uid"] = np.array([f"new-{uid}" for uid in batch.non_tensor_batch["uid"]], dtype=object)
        again = manager.generate_sequences(batch)
        assert served(servers) == []
        assert manager.pop_rollout() is None
        assert torch.equal(again.batch["responses"], first.batch["responses"])
        batch.batch = TensorDict({"dummy_tensor": torch.zeros(len(batch), 1)}, batch_size=len(batch))
        assert len(batch.union(again)) == 2 * GROUP_SIZE
    finally:
        SkipManager.skip_instances = {}


def test_progress_counts_up_and_a_finished_worker_counts_as_finished(cluster, monkeypatch, capsys):
    """One of six prompts does not end before two lines have said that it alone is left."""
    manager, servers = cluster
    monkeypatch.setattr(manager, "rules", dataclasses.replace(manager.rules, progress_s=0.2))
    slow = {candidate_seed(0, 60, 0, candidate): [Turn(3, held=True)] for candidate in range(8)}
    ray.get([server.load.remote(slow) for server in servers])
    lines, over = [], threading.Event()

    def watch() -> None:
        while sum(line[2] == "1" for line in lines) < 2 and not over.wait(0.05):
            said = capsys.readouterr().out
            lines.extend(re.findall(r"rollout: (\d+)/(\d+) candidates finished, (\d+) prompts wait", said))
        ray.get([server.release.remote() for server in servers])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        manager.generate_sequences(prompts([f"{number}+4=" for number in range(6)], GROUP_SIZE, step=60))
    finally:
        over.set()
        watcher.join()
    assert {int(total) for _, total, _ in lines} == {33}
    finished = [int(count) for count, *_ in lines]
    assert finished == sorted(finished)
    assert 20 < finished[-1] < 33
    assert int(lines[-1][2]) == 1


def test_a_rollout_that_outlasts_its_limit_fails_with_the_uids_and_stops(cluster, monkeypatch):
    manager, servers = cluster
    monkeypatch.setattr(manager, "rules", dataclasses.replace(manager.rules, timeout_s=1, progress_s=0.5))
    ray.get([server.load.remote({}, Turn(3, held=True)) for server in servers])
    with pytest.raises(TimeoutError, match=r"darts.timeout_s=1.*2 prompts are not complete, uids uid-0, uid-1"):
        manager.generate_sequences(prompts(["1+1=", "2+2="], GROUP_SIZE))
    assert_idle(manager, servers)
    ray.get([server.load.remote({}, Turn(3)) for server in servers])


def test_a_failure_in_one_worker_stops_the_others(cluster):
    manager, servers = cluster
    turns = {candidate_seed(0, 70, number, 1): [Turn(3, held=True)] for number in range(1, 6)}
    turns[candidate_seed(0, 70, 0, 1)] = [Turn(3, error="CUDA says no")]
    ray.get([server.load.remote(turns) for server in servers])
    with pytest.raises(
        ray.exceptions.RayTaskError, match=r"candidate 1 of prompt uid=uid-0 .* failed: RuntimeError: CUDA says no"
    ):
        manager.generate_sequences(prompts([f"{number}+5=" for number in range(6)], GROUP_SIZE, step=70))
    assert_idle(manager, servers)


def assert_idle(manager, servers) -> None:
    """Every worker lets go of its prompts, and every server of its requests."""
    deadline = time.monotonic() + 300
    while any(ray.get([worker.progress.remote() for worker in manager.agent_loop_workers])) or any(
        ray.get([server.count_running.remote() for server in servers])
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_dies_fails_the_rollout_with_uid_and_cause(mortal):
    """Its requests would never have ended."""
    manager, (server,) = mortal
    ray.get(server.load.remote({}, Turn(3, held=True)))

    async def kill_then_wait() -> None:
        rollout = asyncio.ensure_future(manager._generate_groups(prompts(["1+1="], GROUP_SIZE, step=99)))
        while not await server.count_running.remote():
            await asyncio.sleep(0.05)
        ray.kill(server)
        await rollout

    with pytest.raises(ray.exceptions.RayTaskError, match=r"prompt uid=uid-0 .*Actor(Died|Unavailable)"):
        asyncio.run(kill_then_wait())


def test_a_worker_that_dies_fails_the_rollout_with_its_uids(mortal):
    """After the server died, so the very last."""
    manager, _ = mortal
    kill(manager.agent_loop_workers[0])
    with pytest.raises(RuntimeError, match="an agent-loop worker died with prompts uid=uid-0"):
        manager.generate_sequences(prompts(["1+1="], GROUP_SIZE))
