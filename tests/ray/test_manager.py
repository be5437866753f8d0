"""The rollout manager over Ray: real agent-loop workers and verl's load balancer, servers of scripted lengths."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import ray
import torch
from fakes import CountingReward, Script, ScriptedServer, Turn, balancer, prompts
from tensordict import TensorDict
from verl.workers.rollout.llm_server import LLMServerClient

from darts.allocation import uniform_budgets
from darts.metrics import METRICS
from darts.rollout import CANDIDATE, DartsAgentLoopManager, candidate_seed
from darts.selection import select

GROUP_SIZE = 4
NUM_WORKERS = 3


@pytest.fixture(scope="module")
def cluster(local_ray, make_config):
    """Two servers, three workers, one manager."""
    config = make_config(
        f"actor_rollout_ref.rollout.agent.num_workers={NUM_WORKERS}", "darts.allocation.mean_candidates=5.5"
    )
    script = Script(end_token=_end_token(config))
    servers = [ray.remote(ScriptedServer).options(max_concurrency=1000).remote(script) for _ in range(2)]
    client = LLMServerClient(config, balancer({str(number): server for number, server in enumerate(servers)}))
    reward = ray.remote(CountingReward).remote()
    manager = DartsAgentLoopManager.create(config=config, llm_client=client, reward_loop_worker_handles=[reward])
    return manager, servers


def _end_token(config) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path).eos_token_id


def served(servers) -> list[dict]:
    return [record for records in ray.get([server.take_records.remote() for server in servers]) for record in records]


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 7, 16])
def test_any_number_of_prompts_gives_m_rows_each_in_order(cluster, num_prompts):
    """Also fewer prompts than workers. The servers' default answer is 3 tokens for everyone: ties go by index."""
    manager, servers = cluster
    served(servers)
    batch = prompts([f"{number}+2=" for number in range(num_prompts)], GROUP_SIZE, step=num_prompts)
    output = manager.generate_sequences(batch)
    budgets = uniform_budgets(num_prompts, 5.5, GROUP_SIZE, 2 * GROUP_SIZE)
    assert output.non_tensor_batch["uid"].tolist() == [
        f"uid-{n}" for n in range(num_prompts) for _ in range(GROUP_SIZE)
    ]
    expected = [c for budget in budgets for c in sorted(select([3] * budget, GROUP_SIZE, 1))]
    assert output.non_tensor_batch[CANDIDATE].tolist() == expected
    records = served(servers)
    assert len(records) == budgets.sum()
    assert sorted(record["priority"] for record in records) == list(range(budgets.sum()))
    assert len({record["seed"] for record in records}) == budgets.sum()
    metrics = manager.pop_metrics()
    assert set(metrics) <= set(METRICS)
    assert metrics["darts/candidates/launched"] == budgets.sum()
    assert metrics["darts/candidates/kept"] == num_prompts * GROUP_SIZE
    assert manager.pop_metrics() == {}
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
    assert manager.pop_metrics() == {}


def test_a_batch_that_is_not_interleaved_groups_is_refused(cluster):
    manager, _ = cluster
    batch = prompts(["1+1=", "2+2="], GROUP_SIZE)
    shuffled = batch.select_idxs(np.arange(len(batch))[::-1].copy().reshape(2, -1).T.ravel())
    with pytest.raises(RuntimeError, match=r"rollout.n=4 times in consecutive rows"):
        manager.generate_sequences(shuffled)


def test_a_rollout_that_outlasts_its_limit_fails_with_the_uids_and_stops(cluster, monkeypatch):
    manager, servers = cluster
    hurried = dataclasses.replace(manager.darts, timeout_s=3, progress_s=1)
    monkeypatch.setattr(manager, "darts", hurried)
    ray.get([server.load.remote({}, Turn(3, delay=120)) for server in servers])
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"darts.timeout_s=3.*2 prompts are not complete, uids uid-0, uid-1"):
        manager.generate_sequences(prompts(["1+1=", "2+2="], GROUP_SIZE))
    assert time.monotonic() - start < 30
    assert asyncio.run(_progress(manager)) == (0, 0, []), "the workers have let go of the batch"
    ray.get([server.load.remote({}, Turn(3)) for server in servers])


async def _progress(manager) -> tuple[int, int, list[str]]:
    deadline = time.monotonic() + 20
    while True:
        answer = await manager._progress(manager.agent_loop_workers)
        if answer[1] == 0 or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(0.5)


def test_a_server_that_dies_fails_the_rollout_within_a_minute_with_uid_and_cause(cluster, make_config):
    """Last in this file: it kills a server in the middle of a rollout."""
    manager, servers = cluster
    seeds = [candidate_seed(0, 99, 0, candidate) for candidate in range(2 * GROUP_SIZE)]
    ray.get([server.load.remote({seed: [Turn(3, delay=90)] for seed in seeds}) for server in servers])

    async def kill_then_wait() -> None:
        rollout = asyncio.ensure_future(manager._generate_groups(prompts(["1+1="], GROUP_SIZE, step=99)))
        await asyncio.sleep(3)
        for server in servers:
            ray.kill(server)
        await rollout

    start = time.monotonic()
    with pytest.raises(ray.exceptions.RayTaskError, match=r"prompt uid=uid-0 .*ActorDied"):
        asyncio.run(kill_then_wait())
    assert time.monotonic() - start < 60
