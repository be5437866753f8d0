"""`darts.placement`: what is composed, what is refused in one line, and what it relies on in verl 0.9.1."""

import asyncio
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import compositions
import pytest
import ray
from omegaconf import OmegaConf
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.single_controller.ray.base import ResourcePoolManager
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, Role
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.llm_server import LLMServerManager

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that configurations use)
from darts.checks.placement import Pools, check_cluster, choose_backend, pools
from darts.checks.run import check_run
from darts.config import ConfigError
from darts.messages import Node
from darts.testbed import assets_dir
from darts.training import launch
from darts.training.launch import DartsTaskRunner
from darts.training.trainer import RayDartsTrainer
from verl_patches import patches, placement
from verl_patches.dp_actor import OverlappedActorWorker
from verl_patches.patching import original
from verl_patches.pools import ClusterTooSmall, check_room_for_servers

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
ENGINE = f"{ROLLOUT}.checkpoint_engine"
MEGATRON = ["model_engine=megatron", "actor_rollout_ref.actor.use_dynamic_bsz=true"]
PATHS = ("actor_rollout_ref.model.path", "data.train_files", "data.val_files")
OURS = [
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    *(f"{key}={assets_dir('overthink')}" for key in PATHS),
]
SEPARATE = ["darts.placement=disaggregated", "actor_rollout_ref.rollout.nnodes=1"]


def with_cpus(gpus: list[float]) -> list[Node]:
    """Nodes with CPUs for all."""
    return [Node(number, 4 * number + 1) for number in gpus]


def composed(name: str, *overrides: str):
    config = compositions.composed(name, *overrides)
    choose_backend(config)
    return config


def gpus(*overrides: str):
    """A run of verl's own default size, 8 GPUs, and 8 more that serve."""
    return composed("darts_trainer", *OURS, *SEPARATE, *overrides)


@pytest.fixture
def has_nccl(monkeypatch):
    monkeypatch.setitem(CheckpointEngineRegistry._registry, "nccl", object)


@pytest.mark.parametrize("enable", [True, False])
def test_a_gpu_run_gets_nccl_and_two_pools(has_nccl, enable):
    config = gpus(f"darts.enable={enable}", "actor_rollout_ref.rollout.n_gpus_per_node=4")
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == "nccl"
    assert check_run(config).placement == "disaggregated"
    assert pools(config) == Pools(train=8, serve=4, separate=True)
    assert config.actor_rollout_ref.hybrid_engine, "RayPPOTrainer asserts it"


@pytest.mark.parametrize(("platform", "backend"), [("cpu", "gloo"), ("gpu", "nccl")])
def test_the_quickstart_needs_one_word(has_nccl, platform, backend):
    config = composed("quickstart", f"platform={platform}", "darts.placement=disaggregated")
    check_run(config)
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == backend
    assert pools(config) == Pools(train=1, serve=1, separate=True)
    if platform == "cpu":
        assert config.ray_kwargs.ray_init.num_gpus >= 4


def test_a_backend_that_is_named_stays_and_a_colocated_run_keeps_verls(monkeypatch):
    monkeypatch.setitem(CheckpointEngineRegistry._registry, "nixl", object)
    config = gpus(f"{ENGINE}.backend=nixl")
    check_run(config)
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == "nixl"
    assert composed("quickstart").actor_rollout_ref.rollout.checkpoint_engine.backend == "naive"
    check_run(gpus(f"{ENGINE}.backend=gloo"))
    check_run(gpus(f"{ENGINE}.backend=mine", f"{ENGINE}.custom_backend_module=my.backends"))


BAD = [
    ([f"{ENGINE}.backend=nccl", "darts.placement=colocated"], "'nccl': carries weights to servers with GPUs of"),
    (["trainer.device=cpu", f"{ENGINE}.backend=nccl"], "backend='nccl': needs GPUs, but trainer.device=cpu"),
    ([f"{ENGINE}.backend=gloo", f"{ENGINE}.custom_backend_module=null"], "module=None: gloo is a backend"),
    ([f"{ENGINE}.backend=ncl"], "backend='ncl': cannot be used here: verl has no such checkpoint engine"),
    ([f"{ROLLOUT}.nnodes=0"], "actor_rollout_ref.rollout.nnodes=0"),
    ([f"{ROLLOUT}.n_gpus_per_node=0"], "actor_rollout_ref.rollout.n_gpus_per_node=0"),
    (["trainer.nnodes=0"], "trainer.nnodes=0"),
    # 3 do not divide 8; 6 leave 2 of each node, though they divide 24; 16 take two nodes of three.
    ([f"{ROLLOUT}.tensor_model_parallel_size=3"], "a server takes 3 GPUs (tensor 3 x data 1 x pipeline 1"),
    (
        [f"{ROLLOUT}.tensor_model_parallel_size=6", f"{ROLLOUT}.nnodes=3"],
        "do not fill the 3 x 8 GPUs that serve",
    ),
    (
        [f"{ROLLOUT}.tensor_model_parallel_size=8", f"{ROLLOUT}.nnodes=3",
         f"{ROLLOUT}.data_parallel_size=2"],
        "a server takes 16 GPUs",
    ),
    ([f"{ROLLOUT}.tensor_model_parallel_size=3", "darts.placement=colocated"], "do not fill the 8 GPUs"),
    ([f"{ROLLOUT}.n_gpus_per_node=4", "darts.placement=colocated"], "n_gpus_per_node=4: with darts.placement"),
    (["trainer.n_gpus_per_node=0", "darts.placement=colocated"], "trainer.n_gpus_per_node=0: trainer.nnodes x"),
    (["data.train_batch_size=1000"], "ppo_mini_batch_size=256: must divide data.train_batch_size=1000"),
    (["data.train_batch_size=128", f"{ACTOR}.use_dynamic_bsz=true"], "ppo_mini_batch_size=256: must divide"),
    ([*MEGATRON, f"{ACTOR}.megatron.tensor_model_parallel_size=3"], "tensor_model_parallel_size=3: a replica takes 3"),
    ([*MEGATRON, f"{ACTOR}.megatron.expert_model_parallel_size=16"], "expert_model_parallel_size=16: a replica takes"),
    ([f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=3"], "size=3: must divide the 8 GPUs that"),
    ([f"{ACTOR}.ulysses_sequence_parallel_size=16"], "actor.ulysses_sequence_parallel_size=16"),
    (["data.train_batch_size=1023", "trainer.nnodes=2"], "data.train_batch_size=1023"),
    (
        [f"{ACTOR}.ppo_mini_batch_size=1", "trainer.nnodes=2"],
        "ppo_mini_batch_size=1: times actor_rollout_ref.rollout.n=8 are 8 responses, which must split evenly",
    ),
    (
        [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=48"],
        "log_prob_micro_batch_size_per_gpu=48: must divide the 1024 responses of a training rank",
    ),
    ([f"{ACTOR}.ppo_micro_batch_size_per_gpu=512"], "must divide the 256 responses of a training rank"),
    (["actor_rollout_ref.model.lora_rank=8"], "lora.merge=False: with darts.placement=disaggregated verl 0.9.1 sends"),
    ([f"{ROLLOUT}.disaggregation.enabled=true"], "disaggregation.enabled=True: pairs of prefill"),
]  # fmt: skip


@pytest.mark.usefixtures("has_nccl")
@pytest.mark.parametrize("enable", [True, False])
@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[message for _, message in BAD])
def test_sizes_and_backends_that_cannot_work_are_one_line(overrides, message, enable):
    with pytest.raises(ConfigError) as error:
        check_run(gpus(f"darts.enable={enable}", *overrides))
    assert message in str(error.value)
    assert " Fix: " in str(error.value)
    assert "\n" not in str(error.value)


GOOD = [
    [f"{ROLLOUT}.tensor_model_parallel_size=4", f"{ROLLOUT}.nnodes=3"],
    [f"{ROLLOUT}.tensor_model_parallel_size=8", f"{ROLLOUT}.pipeline_model_parallel_size=2",
     f"{ROLLOUT}.nnodes=4"],
    ["actor_rollout_ref.model.lora_rank=8", "+actor_rollout_ref.model.lora.merge=true"],
    [f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=4"],
    [f"{ACTOR}.use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=48"],
    [f"{ROLLOUT}.n_gpus_per_node=2", "trainer.nnodes=4"],
]  # fmt: skip


@pytest.mark.usefixtures("has_nccl")
@pytest.mark.parametrize("overrides", GOOD, ids=lambda overrides: overrides[0])
def test_sizes_that_fit_are_taken(overrides):
    check_run(gpus(*(o.replace("+", "++") for o in overrides)))


def test_nccl_without_cupy_is_named_before_anything_starts(monkeypatch):
    monkeypatch.delitem(CheckpointEngineRegistry._registry, "nccl", raising=False)
    missing = {"nccl_checkpoint_engine": ModuleNotFoundError("No module named 'cupy'")}
    monkeypatch.setattr(CheckpointEngineRegistry, "_import_errors", missing)
    with pytest.raises(
        ConfigError,
        match=r"backend='nccl': cannot be used here: No module named 'cupy'. Fix: run scripts/setup.sh",
    ):
        check_run(gpus())


def test_a_cluster_without_room_for_both_pools_is_named_with_the_numbers():
    config = composed("quickstart", *SEPARATE, "trainer.n_gpus_per_node=6", f"{ROLLOUT}.n_gpus_per_node=2")
    check_cluster(config, others=0, nodes=with_cpus([8.0]))
    with pytest.raises(ClusterTooSmall, match=r"has 7 GPUs on 1 nodes, but 6 train, 2 serve .*, 8 together\. Fix: "):
        check_cluster(config, others=0, nodes=with_cpus([7.0]))
    with pytest.raises(ClusterTooSmall, match=r"2 serve .*, 1 are for reward and teacher models, 9 together"):
        check_cluster(config, others=1, nodes=with_cpus([8.0]))
    with pytest.raises(ClusterTooSmall, match=r"1 times 6 GPUs of one node .*, but 4, 4 GPUs are on nodes\. Fix: "):
        check_cluster(config, others=0, nodes=with_cpus([4.0, 4.0]))


def test_a_colocated_run_with_fewer_nodes_than_asked_is_named_with_the_numbers():
    config = composed("quickstart", "trainer.nnodes=2", "trainer.n_gpus_per_node=8", "data.train_batch_size=16")
    check_cluster(config, others=0, nodes=with_cpus([8.0, 8.0]))
    with pytest.raises(
        ClusterTooSmall,
        match=r"nnodes=2 x n_gpus_per_node=8: the cluster has 8 GPUs on 1 nodes, but 16 train, 16 together\. Fix: ",
    ):
        check_cluster(config, others=0, nodes=with_cpus([8.0]))
    with pytest.raises(ClusterTooSmall, match=r"2 times 8 GPUs of one node .*, but 4, 4, 4, 4 GPUs are on nodes"):
        check_cluster(config, others=0, nodes=with_cpus([4.0] * 4))


def test_a_cluster_without_the_cpus_that_verl_reserves_is_named_with_the_numbers():
    """verl waits for its placement groups for ever."""
    config = composed("quickstart", "trainer.n_gpus_per_node=2")
    check_cluster(config, others=0, nodes=[Node(2.0, 6.0)])
    with pytest.raises(ClusterTooSmall, match=r"per_node=2: verl .* 6 together, .*: the nodes have 5 CPUs\. Fix"):
        check_cluster(config, others=0, nodes=[Node(2.0, 5.0)])
    with pytest.raises(ClusterTooSmall, match=r"the nodes have 5, 5 CPUs"):
        check_cluster(config, others=0, nodes=[Node(2.0, 5.0), Node(0.0, 5.0)])
    with pytest.raises(ClusterTooSmall, match=r"the nodes have 8, 64 CPUs"):
        check_cluster(config, others=2, nodes=[Node(4.0, 8.0), Node(0.0, 64.0)])
    separate = composed("quickstart", *SEPARATE, "trainer.n_gpus_per_node=2", f"{ROLLOUT}.n_gpus_per_node=2")
    check_cluster(separate, others=0, nodes=[Node(4.0, 10.0)])
    with pytest.raises(ClusterTooSmall, match="10 together"):
        check_cluster(separate, others=0, nodes=[Node(4.0, 9.0)])
    check_room_for_servers(separate, free=[Node(2.0, 4.0)])
    with pytest.raises(ClusterTooSmall, match=r"2 times 1 GPUs .*, but 1 GPUs with 2 CPUs each are left on nodes"):
        check_room_for_servers(separate, free=[Node(2.0, 3.0)])


def test_rewards_in_processes_of_their_own_need_cpus_for_them_all():
    """verl's workers would wait for them for ever."""
    remote = "reward.reward_manager.name=remote"
    config = composed("quickstart", "reward.num_workers=4", remote, "trainer.n_gpus_per_node=2")
    check_cluster(config, others=0, nodes=[Node(2.0, 22.0)])
    with pytest.raises(ClusterTooSmall, match=r"square of reward.num_workers=4 .* 22 together, .* have 21 CPUs"):
        check_cluster(config, others=0, nodes=[Node(2.0, 21.0)])


def test_servers_that_do_not_fit_beside_the_training_gpus_are_named():
    """Two nodes of 8: 4 of each train, so no server of 8 has a node, though 8 GPUs are left."""
    halves = ["trainer.nnodes=2", "trainer.n_gpus_per_node=4", "data.train_batch_size=128"]
    config = gpus(*halves, f"{ROLLOUT}.n_gpus_per_node=8", f"{ROLLOUT}.tensor_model_parallel_size=8")
    check_cluster(config, others=0, nodes=with_cpus([8.0, 8.0]))
    check_room_for_servers(config, free=with_cpus([0.0, 8.0]))
    with pytest.raises(ClusterTooSmall, match=r"1 times 8 GPUs of one node .*, but 4, 4 GPUs are left on nodes\. Fix"):
        check_room_for_servers(config, free=with_cpus([4.0, 4.0]))
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 2
    check_room_for_servers(config, free=with_cpus([4.0, 4.0]))
    with pytest.raises(ClusterTooSmall, match=r"4 times 2 GPUs of one node"):
        check_room_for_servers(config, free=with_cpus([3.0, 5.0]))


def test_the_command_refuses_what_verl_refuses_in_one_line_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart", "hydra.run.dir=.",
         "actor_rollout_ref.rollout.temperature=0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("[darts]")]
    assert len(lines) == 1
    assert "validation gen temperature should be greater than 0 when enabling do_sample" in lines[0]


# --- in verl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize(
    ("where", "mode", "worker"),
    [
        ("disaggregated", "off", placement.PlacedActorWorker),
        ("disaggregated", "auto", OverlappedActorWorker),
        ("colocated", "auto", ActorRolloutRefWorker),
        ("colocated", "sequence", OverlappedActorWorker),
    ],
)
def test_actor_workers_are_what_placement_and_overlap_need(where, mode, worker, reference):
    config = composed(
        "quickstart",
        f"darts.placement={where}",
        f"darts.overlap.mode={mode}",
        f"actor_rollout_ref.actor.use_kl_loss={reference}",
    )
    runner = DartsTaskRunner()
    assert runner.add_actor_rollout_worker(config)[0] is worker
    (role, actor), *rest = runner.role_worker_mapping.items()
    assert not rest
    assert role == (Role.ActorRolloutRef if reference else Role.ActorRollout)
    assert actor.__ray_metadata__.modified_class.__mro__[1] is worker
    assert runner.mapping == {role: "global_pool"}


@pytest.mark.parametrize(
    ("role", "backend", "left"),
    [
        ("actor_rollout", "gloo", "actor"),
        ("actor_rollout_ref", "nccl", "actor_ref"),
        ("ref", "nccl", "ref"),
        ("actor_rollout_ref", "naive", "actor_rollout_ref"),
    ],
)
def test_an_actor_beside_standalone_servers_holds_no_rollout(monkeypatch, role, backend, left):
    env = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    for name, value in (env | {"WG_BACKEND": "ray", "RAY_LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    config = composed("quickstart").actor_rollout_ref
    config.rollout.checkpoint_engine.backend = backend
    worker = placement.PlacedActorWorker(config, role)
    assert worker.role == left
    assert worker._is_rollout == ("rollout" in left)
    assert worker._is_actor == ("actor" in left)
    assert worker._is_ref == ("ref" in left)


class Replica:
    """Notes how it is started."""

    def __init__(self, replica_rank, config, model_config, gpus_per_node):
        self.replica_rank, self.gpus_per_node = replica_rank, gpus_per_node
        self._server_handle = self._server_address = str(replica_rank)

    async def init_hybrid(self, worker_group):
        self.started = ("hybrid", worker_group)

    async def init_standalone(self):
        self.started = ("standalone", None)


@pytest.fixture
def patched(monkeypatch):
    """The patch, for the time of a test."""
    monkeypatch.setattr(LLMServerManager, "__init__", original(LLMServerManager.__init__))
    monkeypatch.setattr(LLMServerManager, "rollout_replica_class", Replica, raising=False)
    left = {"a": {"GPU": 4, "CPU": 8}, "b": {"GPU": 5, "CPU": 10}}
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: left)
    assert patches.patch_llm_server_manager()
    assert not patches.patch_llm_server_manager(), "a second time changes nothing"


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("where", ["disaggregated", "colocated", None])
def test_servers_stand_alone_where_the_run_is_disaggregated_and_nowhere_else(where):
    config = composed(
        "quickstart", "darts.placement=disaggregated", "actor_rollout_ref.rollout.nnodes=2",
        "actor_rollout_ref.rollout.n_gpus_per_node=4", "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    )  # fmt: skip
    config.darts.placement = where
    if where is None:
        config = OmegaConf.create({key: value for key, value in config.items() if key != "darts"})
    actors = SimpleNamespace(world_size=6)
    manager = LLMServerManager(config=config, worker_group=actors, rollout_resource_pool="pool")
    asyncio.run(manager._initialize_llm_servers())
    started = [replica.started for replica in manager.get_replicas()]
    assert started == ([("standalone", None)] * 4 if where == "disaggregated" else [("hybrid", actors)] * 3)
    assert {replica.gpus_per_node for replica in manager.get_replicas()} == {4}


@pytest.mark.usefixtures("patched")
def test_servers_without_room_are_refused_before_anything_waits_for_them():
    config = composed(
        "quickstart", *SEPARATE, f"{ROLLOUT}.n_gpus_per_node=6", f"{ROLLOUT}.tensor_model_parallel_size=6"
    )
    with pytest.raises(ClusterTooSmall, match=r"1 times 6 GPUs of one node .*, but 4, 5 GPUs are left on nodes"):
        LLMServerManager(config=config, worker_group=SimpleNamespace(world_size=6))


def test_what_verl_does_around_it():
    """The call that the patch answers, and the order of an update."""
    source = inspect.getsource(RayPPOTrainer.init_workers)
    assert "worker_group=self.actor_rollout_wg, rollout_resource_pool=actor_rollout_resource_pool" in source
    assert tuple(inspect.signature(original(LLMServerManager.__init__)).parameters) == (
        "self", "config", "worker_group", "rollout_resource_pool", "start_rank", "load_balancer_cls",
    )  # fmt: skip
    assert 'if "rollout" in self.role:' in inspect.getsource(ActorRolloutRefWorker.init_model)
    source = inspect.getsource(CheckpointEngineManager.update_weights.__wrapped__)
    steps = ["abort_replicas", "release_kv_cache_replicas", "build_process_group", "rollout.update_weights", "finalize",
             "resume_kv_cache_replicas", "resume_generation_replicas"]  # fmt: skip
    assert [source.index(step) for step in steps] == sorted(source.index(step) for step in steps)
    assert "ray._private.state.available_resources_per_node()" in inspect.getsource(ResourcePoolManager)
    source = inspect.getsource(CheckpointEngineWorker.__init__)
    assert source.index("import_external_libs") < source.index("CheckpointEngineRegistry.new")


def test_standalone_servers_neither_sleep_nor_wake_but_give_up_their_cache_for_an_update():
    """So `sleep_replicas` after a rollout keeps them up, and `free_cache_engine` means the cache during an update."""
    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    async def all_of(free: bool) -> list[str]:
        calls = []

        def engine_method(name):
            async def method(**kwargs):
                calls.append(f"{name} {kwargs.get('tags', kwargs.get('level', ''))}".strip())

            return method

        names = ("sleep", "wake_up", "reset_prefix_cache")
        server = vLLMHttpServer.__new__(vLLMHttpServer)
        server.node_rank, server.rollout_mode = 0, RolloutMode.STANDALONE
        server.config = SimpleNamespace(free_cache_engine=free)
        server.model_config = SimpleNamespace(lora_rank=0, lora={})
        server.engine = SimpleNamespace(**{name: engine_method(name) for name in names})
        await server.sleep()
        await server.wake_up()
        assert calls == []
        await server.release_kv_cache()
        await server.resume_kv_cache()
        return calls

    assert asyncio.run(all_of(True)) == ["sleep 2", "wake_up ['weights']", "wake_up ['kv_cache']", "reset_prefix_cache"]
    assert asyncio.run(all_of(False)) == []


@pytest.fixture
def trainer(monkeypatch):
    """A trainer without its constructor, and verl's `init_workers` recorded."""
    self = RayDartsTrainer.__new__(RayDartsTrainer)
    self.config = composed("quickstart", "darts.placement=disaggregated", "darts.enable=false")
    self.darts = check_run(self.config)
    self.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
    self.calls = []
    monkeypatch.setattr(RayPPOTrainer, "init_workers", lambda self: self.calls.append("init_workers"))
    return self


@pytest.mark.usefixtures("patched")
def test_the_trainer_starts_pools_apart_where_asked(trainer, capsys):
    trainer.init_workers()
    assert trainer.calls == ["init_workers"]
    assert "plain verl; disaggregated: 1 GPUs train, 1 serve" in capsys.readouterr().out


@pytest.mark.parametrize("nodes", [[1.0], [2.0], [1.0, 1.0], []])
def test_the_task_runner_looks_at_the_cluster_before_it_loads_anything(monkeypatch, nodes):
    found = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": gpus}} for gpus in nodes]
    found += [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(launch.ray, "nodes", lambda: found)
    loaded = []
    monkeypatch.setattr(launch, "omega_conf_to_dataclass", lambda model: loaded.append(model) or 1 / 0)
    config = composed("quickstart", "darts.placement=disaggregated", "darts.enable=false")
    expected = ZeroDivisionError if sum(nodes) == 2 else ClusterTooSmall
    with pytest.raises(expected):
        DartsTaskRunner().run(config)
    assert bool(loaded) == (sum(nodes) == 2)


def test_the_error_of_a_small_cluster_survives_the_way_from_the_trainers_process():
    error = ClusterTooSmall("too small")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
