"""Which GPUs train and which serve: what `darts.placement` asks of the rest of a run's configuration.

Contract: `choose_backend` fills in the one key that follows from the placement; `check_placement` raises one
`ConfigError` (key, value, rule, fix) for sizes that cannot work, before Ray starts; `check_cluster` raises one
`ClusterTooSmall` once Ray knows its nodes, and `check_room_for_servers` once those that train are taken, before
anything waits for them. Sizes are verl's own keys: trainer.nnodes x trainer.n_gpus_per_node GPUs train,
actor_rollout_ref.rollout.nnodes x .n_gpus_per_node serve where disaggregated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from darts.checks import MODEL, ROLLOUT
from darts.config import ConfigError
from darts.messages import Node
from verl_patches.pools import CPUS_PER_SERVING_GPU, ClusterTooSmall, require_parts, server_size

COLOCATED_BACKEND = "naive"
OUR_BACKEND_MODULE = "verl_patches.weight_sync"
BACKEND = f"{ROLLOUT}.checkpoint_engine.backend"
GPU_BACKENDS = ("nccl", "nixl", "kimi_ckpt_engine", "mooncake", "delta_sharded")
SEPARATE = "with darts.placement=disaggregated"
CPUS_PER_GPU = 3  # that verl reserves with a GPU that trains: `max_colocate_count` of `ResourcePoolManager`


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Numbers of GPUs, e.g. `Pools(train=6, serve=2, separate=True)`; where colocated, `serve` of the same GPUs."""

    train: int
    serve: int
    separate: bool

    def __str__(self) -> str:
        if not self.separate:
            return f"{self.train} GPUs train and serve in turn (colocated)"
        return f"disaggregated: {self.train} GPUs train, {self.serve} serve"


def is_disaggregated(config: DictConfig) -> bool:
    """Whether servers have GPUs of their own."""
    return config.darts.get("placement") == "disaggregated"


def pools(config: DictConfig) -> Pools:
    """The sizes that the configuration asks for."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    training_gpus = trainer.nnodes * trainer.n_gpus_per_node
    if not is_disaggregated(config):
        return Pools(train=training_gpus, serve=training_gpus, separate=False)
    return Pools(train=training_gpus, serve=rollout.nnodes * rollout.n_gpus_per_node, separate=True)


def choose_backend(config: DictConfig) -> None:
    """Sets the checkpoint engine of a disaggregated run that names none: nccl, or gloo on a CPU."""
    checkpoint_engine = config.actor_rollout_ref.rollout.checkpoint_engine
    if is_disaggregated(config) and checkpoint_engine.backend == COLOCATED_BACKEND:
        checkpoint_engine.backend = "gloo" if config.trainer.device == "cpu" else "nccl"


def check_placement(config: DictConfig) -> None:
    """Refuses pools that cannot be what the configuration says, and weights that cannot get from one to the other."""
    _check_backend(config)
    serving_pool = {ROLLOUT: "serve"} if is_disaggregated(config) else {}
    for pool_key, pool_use in (serving_pool | {"trainer": "train"}).items():
        for key in (f"{pool_key}.nnodes", f"{pool_key}.n_gpus_per_node"):
            if (pool_size := OmegaConf.select(config, key)) < 1:
                rule = f"{pool_key}.nnodes x n_gpus_per_node GPUs {pool_use}: at least 1 x 1."
                raise ConfigError(key, pool_size, rule, f"set {key}=1 or more.")
    if is_disaggregated(config):
        _check_separate(config)
    _check_servers(config)


def _check_backend(config: DictConfig) -> None:
    checkpoint_engine = config.actor_rollout_ref.rollout.checkpoint_engine
    backend, backend_module = checkpoint_engine.backend, checkpoint_engine.custom_backend_module
    if not is_disaggregated(config):
        if backend != COLOCATED_BACKEND:
            rule = "carries weights to servers with GPUs of their own, but darts.placement=colocated."
            fix = f"set darts.placement=disaggregated, or {BACKEND}={COLOCATED_BACKEND}."
            raise ConfigError(BACKEND, backend, rule, fix)
        return
    on_cpu = config.trainer.device == "cpu"
    if backend == COLOCATED_BACKEND:
        rule = f"cannot reach servers in other processes, {SEPARATE}."
        fix = f"set {BACKEND}={'gloo' if on_cpu else 'nccl'}, as darts.checks.placement.choose_backend does."
        raise ConfigError(BACKEND, backend, rule, fix)
    if on_cpu and backend in GPU_BACKENDS:
        rule = "needs GPUs, but trainer.device=cpu."
        raise ConfigError(BACKEND, backend, rule, f"set {BACKEND}=gloo, or leave it at naive.")
    if backend == "gloo" and not backend_module:
        rule = "gloo is a backend of this plugin, which verl's workers import by this key."
        fix = f"set it to {OUR_BACKEND_MODULE}, as configs/darts_base.yaml does."
        raise ConfigError(f"{ROLLOUT}.checkpoint_engine.custom_backend_module", backend_module, rule, fix)
    if backend_module not in (None, OUR_BACKEND_MODULE):
        return  # it may register what it likes
    from verl_patches.placement import why_unavailable  # imports verl's workers

    backend_refusal = why_unavailable(backend)
    if backend_refusal is not None:
        cupy_fix = "run scripts/setup.sh (its extra gpu has cupy), or " if "cupy" in backend_refusal else ""
        fix = f"{cupy_fix}set {BACKEND}=gloo (slower: over TCP and the CPU)."
        raise ConfigError(BACKEND, backend, f"cannot be used here: {backend_refusal}.", fix)


def has_adapter(model: DictConfig) -> bool:
    """Whether the block `model:` trains an adapter (LoRA), without which the actor is the reference."""
    lora = model.get("lora") or {}
    return model.get("lora_rank", 0) > 0 or lora.get("rank", 0) > 0 or model.get("lora_adapter_path") is not None


def _check_separate(config: DictConfig) -> None:
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    if rollout.get("disaggregation", {}).get("enabled", False):
        rule = f"pairs of prefill and decoding servers are not supported {SEPARATE}."
        key = f"{ROLLOUT}.disaggregation.enabled"
        raise ConfigError(key, True, rule, f"set {key}=False.")
    adapter_merges = (model.get("lora") or {}).get("merge", False)
    if has_adapter(model) and not adapter_merges:
        rule = f"{SEPARATE} verl 0.9.1 sends the base weights alone: servers would never get what the adapter learns."
        fix = f"set {MODEL}.lora.merge=True, or darts.placement=colocated."
        raise ConfigError(f"{MODEL}.lora.merge", adapter_merges, rule, fix)


def _check_servers(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.get("disaggregation", {}).get("enabled", False):
        return  # servers of several sizes
    tensor, data, pipeline = (rollout[f"{name}_parallel_size"] for name in ("tensor_model", "data", "pipeline_model"))
    server, asked_pools, per_node = server_size(rollout), pools(config), rollout.n_gpus_per_node
    if asked_pools.separate:
        servers_fit = per_node % server == 0 or (server % per_node == 0 and rollout.nnodes % (server // per_node) == 0)
        pool_text = (
            f"the {rollout.nnodes} x {per_node} GPUs that serve ({ROLLOUT}.nnodes x n_gpus_per_node) evenly, whole "
            "nodes or whole parts of one"
        )
    elif per_node != config.trainer.n_gpus_per_node:
        rule = (
            "with darts.placement=colocated the servers are on the training GPUs, of which each node has "
            f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}."
        )
        fix = "leave it out, or set darts.placement=disaggregated."
        raise ConfigError(f"{ROLLOUT}.n_gpus_per_node", per_node, rule, fix)
    else:
        servers_fit = asked_pools.train % server == 0
        pool_text = f"the {asked_pools.train} GPUs (trainer.nnodes x n_gpus_per_node)"
    if not servers_fit:
        rule = (
            f"a server takes {server} GPUs (tensor {tensor} x data {data} x pipeline {pipeline} parallel), and such "
            f"servers do not fill {pool_text}."
        )
        fix = "choose parallel sizes whose product divides the number of GPUs."
        raise ConfigError(f"{ROLLOUT}.tensor_model_parallel_size", tensor, rule, fix)


def check_cluster(config: DictConfig, others: int, nodes: Sequence[Node]) -> None:
    """Raises `ClusterTooSmall` without the GPUs and CPUs that verl reserves, before anything waits for them for ever.
    `others`: GPUs of further pools (reward model, teacher); `nodes`: what each node has, as Ray counts it."""
    asked_pools, trainer = pools(config), config.trainer
    serve = asked_pools.serve if asked_pools.separate else 0
    wanted, gpus = asked_pools.train + serve + others, [node.gpus for node in nodes]
    sizes = f"trainer.nnodes={trainer.nnodes} x n_gpus_per_node={trainer.n_gpus_per_node}"
    if sum(gpus) < wanted:
        more = f", {serve} serve (actor_rollout_ref.rollout.nnodes x n_gpus_per_node)" if serve else ""
        more += f", {others} are for reward and teacher models" if others else ""
        raise ClusterTooSmall(
            f"{sizes}: the cluster has {sum(gpus):g} GPUs on {sum(map(bool, gpus))} nodes, but {asked_pools.train} "
            f"train{more}, {wanted} together. Fix: set RAY_ADDRESS to your cluster's, start Ray on more nodes, or ask "
            "for fewer GPUs; without a GPU add +platform=cpu (GPUs are logical there: ray_kwargs.ray_init.num_gpus)."
        )
    require_parts(gpus, trainer.n_gpus_per_node, trainer.nnodes, sizes, "are on nodes")
    _check_processors(config, CPUS_PER_GPU * (asked_pools.train + others) + CPUS_PER_SERVING_GPU * serve, nodes, sizes)


def _check_processors(config: DictConfig, pooled: int, nodes: Sequence[Node], sizes: str) -> None:
    """verl reserves `pooled` CPUs with its GPUs, and its `remote` reward manager takes many."""
    trainer, reward = config.trainer, config.reward
    with_cpus = [min(node.gpus, node.cpus // CPUS_PER_GPU) for node in nodes]
    scored = reward.num_workers**2 if reward.reward_manager.name == "remote" else 0
    wanted_cpus, known_cpus = pooled + scored, sum(node.cpus for node in nodes)
    nodes_fit = sum(int(usable_gpus // trainer.n_gpus_per_node) for usable_gpus in with_cpus) >= trainer.nnodes
    if nodes_fit and known_cpus >= wanted_cpus and sum(node.cpus for node in nodes if node.gpus) >= pooled:
        return
    more = f", the square of reward.num_workers={reward.num_workers} (reward_manager.name=remote)" if scored else ""
    raise ClusterTooSmall(
        f"{sizes}: verl reserves {CPUS_PER_GPU} CPUs with a GPU that trains, {CPUS_PER_SERVING_GPU} with one that only "
        f"serves{more}, {wanted_cpus} together, and would wait for them for ever: the nodes have "
        f"{', '.join(f'{node.cpus:g}' for node in nodes)} CPUs. Fix: a larger allocation, or say what Ray shall count: "
        "ray start --num-cpus, else ray_kwargs.ray_init.num_cpus."
    )
