"""`CheckpointEngineManager`, as the trainer calls it, between actor ranks and the workers of standalone servers."""

import time
from functools import cache
from types import SimpleNamespace

import pytest
import ray
import two_pools
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.config import omega_conf_to_dataclass
from weight_transfer import described, weights_of

MODULES = {
    "one": "verl_patches.weights.gloo",
    "mortal": "verl_patches.weights.gloo",
    "vLLM": "verl_patches.weight_sync",
}
"""Of each server; the last imports vLLM besides."""
CALLS = ("abort_all_requests", "release_kv_cache", "resume_kv_cache", "resume_generation")


@pytest.fixture(scope="module")
def start(local_ray, make_config):
    """Starts workers of a kind, once: each process takes seconds to import verl."""

    @cache
    def group(kind: str) -> RayWorkerGroup:
        if kind == "trainers":
            cls_with_init = RayClassWithInitArgs(cls=ray.remote(two_pools.Trainer))
        else:
            cls_with_init = RayClassWithInitArgs(cls=ray.remote(two_pools.Server), rollout_config=rollout(kind))
        pool = RayResourcePool([2 if kind == "trainers" else 1], use_gpu=False, max_colocate_count=1)
        group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls_with_init, use_gpu=False)
        groups.append(group)
        return group

    def rollout(server: str):
        config = make_config(
            "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
            f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module={MODULES[server]}",
            "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
        )
        return omega_conf_to_dataclass(config.actor_rollout_ref.rollout)

    groups = []
    yield group, rollout
    for group in groups:
        for worker in group.workers:
            ray.kill(worker)
        for placement_group in group.resource_pool.get_placement_groups():
            ray.util.remove_placement_group(placement_group)


@pytest.fixture
def update(start):
    """Two trainers and one server that do as they are told; a call is an update."""
    group, rollout = start

    def begin(sending: str, taking: str, server: str = "one"):
        actors, servers = group("trainers"), group(server)
        ray.get([worker.__ray_call__.remote(two_pools.Trainer.begin, sending) for worker in actors.workers])
        ray.get([worker.__ray_call__.remote(two_pools.Server.begin, taking) for worker in servers.workers])
        calls = []

        def server_call(name):
            async def call(**kwargs):
                calls.append(name)

            return call

        replica = SimpleNamespace(workers=servers.workers, **{name: server_call(name) for name in CALLS})
        manager = CheckpointEngineManager(rollout(server).checkpoint_engine, actor_wg=actors, replicas=[replica])
        return SimpleNamespace(manager=manager, trainers=actors.workers, server=servers.workers[0], calls=calls)

    return begin


def test_updates_arrive_bit_for_bit_with_their_version_while_the_server_is_stopped(update):
    pools = update(sending="works", taking="works")
    for step in (7, 8):
        assert pools.manager.update_weights(step) == {}
    taken = ray.get(pools.server.__ray_call__.remote(lambda self: self.server_adapter.taken))
    assert taken == [(step, described(weights_of(seed, two_pools.SIZES))) for seed, step in ((1, 7), (2, 8))]
    assert pools.calls == list(CALLS) * 2


def test_an_exception_of_vllm_ends_the_update_though_nobody_takes_what_is_sent(update):
    """The chain of a standalone server: its engine, verl's adapter beside it, the manager in the trainer."""
    vllm = ray.remote(two_pools.FailingVllm).options(name="vllm_server_0_0").remote()
    pools = update(sending="blocks", taking="vLLM fails", server="vLLM")
    fails(pools, cause="no attribute 'weight_loader'")
    ray.kill(vllm)
    ray.kill(pools.server)  # as with the run, which ends
    wait_until_left(pools.trainers[0])


@pytest.mark.parametrize(
    ("sending", "taking", "cause", "server"),
    [
        pytest.param("blocks", "fails", "vLLM knows no w0", "one", id="the server fails", marks=pytest.mark.slow),
        pytest.param("blocks", "dies", "gone|died|crash|unavailable", "mortal", id="the server's worker dies"),
        pytest.param("dies", "works", "gone|died|crash|unavailable", "one", id="the trainer dies"),
    ],
)
def test_a_side_that_ends_ends_the_update_with_the_cause_and_leaves_nobody_waiting(
    update, sending, taking, cause, server
):
    pools = update(sending, taking, server)
    fails(pools, cause)
    wait_until_left(pools.server if sending == "dies" else pools.trainers[0])


def fails(pools, cause: str) -> None:
    """Long before the limit for silence, or this would have another cause."""
    with pytest.raises(Exception, match=cause):
        pools.manager.update_weights(1)


def wait_until_left(worker) -> None:
    """An update that is over and failed has left its group."""
    deadline = time.monotonic() + 300
    while ray.get(worker.__ray_call__.remote(lambda self: self.checkpoint_engine.prepare())).group is not None:
        assert time.monotonic() < deadline, "the other side still waits"
        time.sleep(0.1)
