"""`CheckpointEngineManager`, as the trainer calls it, between actor ranks and the workers of standalone servers."""

import time
from types import SimpleNamespace

import pytest
import ray
import two_pools
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.config import omega_conf_to_dataclass
from weight_transfer import described, weights_of

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

MODULE = "verl_patches.weights.gloo"  # verl_patches.weight_sync imports vLLM besides
CALLS = ("abort_all_requests", "release_kv_cache", "resume_kv_cache", "resume_generation")


@pytest.fixture
def update(make_config):
    """Starts both pools; a call is an update."""
    groups = []

    def start(trainers: int, sending: str, taking: str, module: str = MODULE):
        config = make_config(
            "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
            f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module={module}",
            "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
        )
        rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
        for cls, size, arguments in (
            (two_pools.Trainer, trainers, {"mode": sending}),
            (two_pools.Server, 1, {"rollout_config": rollout, "mode": taking}),
        ):
            pool = RayResourcePool([size], use_gpu=False, max_colocate_count=1)
            cls_with_init = RayClassWithInitArgs(cls=ray.remote(cls), **arguments)
            groups.append(RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls_with_init, use_gpu=False))
        calls = []

        def server_call(name):
            async def call(**kwargs):
                calls.append(name)

            return call

        replica = SimpleNamespace(workers=groups[-1].workers, **{name: server_call(name) for name in CALLS})
        manager = CheckpointEngineManager(rollout.checkpoint_engine, actor_wg=groups[-2], replicas=[replica])
        return SimpleNamespace(manager=manager, trainers=groups[-2].workers, server=groups[-1].workers[0], calls=calls)

    yield start
    for group in groups:
        for worker in group.workers:
            ray.kill(worker)
        for placement_group in group.resource_pool.get_placement_groups():
            ray.util.remove_placement_group(placement_group)


def test_updates_arrive_bit_for_bit_with_their_version_while_the_server_is_stopped(update):
    pools = update(trainers=2, sending="works", taking="works")
    for step in (7, 8):
        assert pools.manager.update_weights(step) == {}
    taken = ray.get(pools.server.__ray_call__.remote(lambda self: self.server_adapter.taken), timeout=30)
    assert taken == [(step, described(weights_of(seed, two_pools.SIZES))) for seed, step in ((1, 7), (2, 8))]
    assert pools.calls == list(CALLS) * 2


@pytest.mark.parametrize(
    ("sending", "taking", "cause", "left"),
    [
        pytest.param("blocks", "fails", "vLLM knows no w0", "trainers", id="the server fails", marks=pytest.mark.slow),
        pytest.param("blocks", "dies", "gone|died|crash", "trainers", id="the server's worker dies"),
        pytest.param("dies", "works", "gone|died|crash", "server", id="the trainer dies"),
    ],
)
def test_a_side_that_ends_ends_the_update_with_the_cause_and_leaves_nobody_waiting(
    update, sending, taking, cause, left
):
    pools = update(trainers=1, sending=sending, taking=taking)
    fails_soon(pools, cause)
    survivor = pools.server if left == "server" else pools.trainers[0]
    deadline = time.monotonic() + 20
    while in_group(survivor):
        assert time.monotonic() < deadline, "the other side still waits"
        time.sleep(0.5)


def test_an_exception_of_vllm_ends_the_update_though_nobody_takes_what_is_sent(update):
    """The chain of a standalone server: its engine, verl's adapter beside it, the manager in the trainer."""
    vllm = ray.remote(two_pools.FailingVllm).options(name="vllm_server_0_0").remote()
    pools = update(trainers=1, sending="blocks", taking="vLLM fails", module="verl_patches.weight_sync")
    fails_soon(pools, cause="no attribute 'weight_loader'")
    ray.kill(vllm)


def fails_soon(pools, cause: str) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=cause):
        pools.manager.update_weights(1)
    assert time.monotonic() - start < 30


def in_group(worker) -> bool:
    """An update that is over and failed has left its group."""
    member = ray.get(worker.__ray_call__.remote(lambda self: self.checkpoint_engine.prepare()), timeout=20)
    return member.group is not None
