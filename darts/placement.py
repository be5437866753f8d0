"""Which GPUs train and which serve: what `darts.placement` asks of the rest of a run's configuration.

Contract: `choose_backend` fills in the one key that follows from the placement; `check_placement` raises one
`ConfigError` (key, value, rule, fix) for sizes that cannot work, before Ray starts; `check_cluster` raises one
`ClusterTooSmall` once Ray knows its nodes, and `check_room_for_servers` once those that train are taken, before
anything waits for them. Sizes are verl's own keys: trainer.nnodes x trainer.n_gpus_per_node GPUs train,
actor_rollout_ref.rollout.nnodes x .n_gpus_per_node serve where disaggregated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig

from darts.config import ConfigError

COLOCATED_BACKEND = "naive"
OUR_BACKEND_MODULE = "verl_patches.weight_sync"
BACKEND = "actor_rollout_ref.rollout.checkpoint_engine.backend"
GPU_BACKENDS = ("nccl", "nixl", "kimi_ckpt_engine", "mooncake", "delta_sharded")
CPUS_PER_GPU, CPUS_PER_SERVING_GPU = 3, 2
"""Of verl's placement groups: `max_colocate_count` of `ResourcePoolManager`, and as `RolloutReplica` sets it."""
SEPARATE = "with darts.placement=disaggregated"


class ClusterTooSmall(RuntimeError):
    """The cluster has fewer GPUs or CPUs than the run asks for, or has them on other nodes."""


class Node(NamedTuple):
    """What a node has, or has left."""

    gpus: float
    cpus: float


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
    train = trainer.nnodes * trainer.n_gpus_per_node
    if not is_disaggregated(config):
        return Pools(train=train, serve=train, separate=False)
    return Pools(train=train, serve=rollout.nnodes * rollout.n_gpus_per_node, separate=True)


def choose_backend(config: DictConfig) -> None:
    """Sets the checkpoint engine of a disaggregated run that names none: nccl, or gloo on a CPU."""
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    if is_disaggregated(config) and engine.backend == COLOCATED_BACKEND:
        engine.backend = "gloo" if config.trainer.device == "cpu" else "nccl"


def check_placement(config: DictConfig) -> None:
    """Checks that both pools can be what the configuration says, and that weights get from one to the other.

    Raises:
        ConfigError: see the module's contract.
    """
    _check_backend(config)
    _check_sizes(config)
    if is_disaggregated(config):
        _check_separate(config)
    _check_servers(config)


def check_cluster(config: DictConfig, others: int, nodes: Sequence[Node]) -> None:
    """Checks that the cluster has the GPUs and CPUs that verl reserves, before anything waits for them for ever.

    Args:
        config: of the run.
        others: GPUs of further pools (reward model, teacher).
        nodes: what each node has, as Ray counts it.

    Raises:
        ClusterTooSmall: it has not.
    """
    have, trainer = pools(config), config.trainer
    serve = have.serve if have.separate else 0
    wanted, gpus = have.train + serve + others, [node.gpus for node in nodes]
    sizes = f"trainer.nnodes={trainer.nnodes} x n_gpus_per_node={trainer.n_gpus_per_node}"
    if sum(gpus) < wanted:
        more = f", {serve} serve (actor_rollout_ref.rollout.nnodes x n_gpus_per_node)" if serve else ""
        more += f", {others} are for reward and teacher models" if others else ""
        raise ClusterTooSmall(
            f"{sizes}: the cluster has {sum(gpus):g} GPUs on {sum(map(bool, gpus))} nodes, but {have.train} "
            f"train{more}, {wanted} together. Fix: set RAY_ADDRESS to your cluster's, start Ray on more nodes, or ask "
            "for fewer GPUs; without a GPU add +platform=cpu (GPUs are logical there: ray_kwargs.ray_init.num_gpus)."
        )
    _require_parts(gpus, trainer.n_gpus_per_node, trainer.nnodes, sizes, "are on nodes")
    _check_processors(config, CPUS_PER_GPU * (have.train + others) + CPUS_PER_SERVING_GPU * serve, nodes, sizes)


def _check_processors(config: DictConfig, pooled: int, nodes: Sequence[Node], sizes: str) -> None:
    """verl reserves `pooled` CPUs with its GPUs, and its `remote` reward manager takes many."""
    trainer, reward = config.trainer, config.reward
    with_cpus = [min(node.gpus, node.cpus // CPUS_PER_GPU) for node in nodes]
    scored = reward.num_workers**2 if reward.reward_manager.name == "remote" else 0
    wanted, cpus = pooled + scored, sum(node.cpus for node in nodes)
    fits = sum(int(gpus // trainer.n_gpus_per_node) for gpus in with_cpus) >= trainer.nnodes
    if fits and cpus >= wanted and sum(node.cpus for node in nodes if node.gpus) >= pooled:
        return
    more = f", the square of reward.num_workers={reward.num_workers} (reward_manager.name=remote)" if scored else ""
    raise ClusterTooSmall(
        f"{sizes}: verl reserves {CPUS_PER_GPU} CPUs with a GPU that trains, {CPUS_PER_SERVING_GPU} with one that only "
        f"serves{more}, {wanted} together, and would wait for them for ever: the nodes have "
        f"{', '.join(f'{node.cpus:g}' for node in nodes)} CPUs. Fix: a larger allocation, or say what Ray shall count: "
        "ray start --num-cpus, else ray_kwargs.ray_init.num_cpus."
    )


def check_room_for_servers(config: DictConfig, free: Sequence[Node]) -> None:
    """Checks that the servers fit on what the training GPUs leave of each node; Ray chooses the nodes of both.

    Args:
        config: of a disaggregated run.
        free: what is not taken of each node, once those that train are.

    Raises:
        ClusterTooSmall: they do not.
    """
    rollout = config.actor_rollout_ref.rollout
    part = min(_server_size(rollout), rollout.n_gpus_per_node)
    count, sizes = pools(config).serve // part, "parallel sizes of a server x number of servers"
    _require_parts([node.gpus for node in free], part, count, sizes, "are left on nodes")
    with_cpus = [min(node.gpus, node.cpus // CPUS_PER_SERVING_GPU) for node in free]
    _require_parts(with_cpus, part, count, sizes, f"with {CPUS_PER_SERVING_GPU} CPUs each are left on nodes")


def _require_parts(nodes: Sequence[float], size: int, count: int, sizes: str, state: str) -> None:
    """`count` times `size` GPUs of one node each."""
    if sum(int(gpus // size) for gpus in nodes) < count:
        listed = ", ".join(f"{gpus:g}" for gpus in nodes)
        raise ClusterTooSmall(
            f"{count} times {size} GPUs of one node are asked for ({sizes}), but {listed} GPUs {state}. "
            "Fix: choose sizes that fill whole nodes, or the same part of each."
        )


def _server_size(rollout: DictConfig) -> int:
    """GPUs of one server."""
    return rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size


def _check_backend(config: DictConfig) -> None:
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    backend, module = engine.backend, engine.custom_backend_module
    if not is_disaggregated(config):
        if backend != COLOCATED_BACKEND:
            raise ConfigError(
                BACKEND,
                backend,
                "carries weights to servers with GPUs of their own, but darts.placement=colocated.",
                f"set darts.placement=disaggregated, or {BACKEND}={COLOCATED_BACKEND}.",
            )
        return
    on_cpu = config.trainer.device == "cpu"
    fallback = "gloo" if on_cpu else "nccl"
    if backend == COLOCATED_BACKEND:
        raise ConfigError(
            BACKEND,
            backend,
            f"cannot reach servers in other processes, {SEPARATE}.",
            f"set {BACKEND}={fallback}, as darts.placement.choose_backend does.",
        )
    if on_cpu and backend in GPU_BACKENDS:
        raise ConfigError(
            BACKEND, backend, "needs GPUs, but trainer.device=cpu.", f"set {BACKEND}=gloo, or leave it at naive."
        )
    if backend == "gloo" and not module:
        raise ConfigError(
            f"{BACKEND.removesuffix('.backend')}.custom_backend_module",
            module,
            "gloo is a backend of this plugin, which verl's workers import by this key.",
            f"set it to {OUR_BACKEND_MODULE}, as configs/darts_base.yaml does.",
        )
    if module not in (None, OUR_BACKEND_MODULE):
        return  # it may register what it likes
    from verl_patches.placement import why_unavailable  # imports verl's workers

    reason = why_unavailable(backend)
    if reason is not None:
        cupy = "run scripts/setup.sh (its extra gpu has cupy), or " if "cupy" in reason else ""
        raise ConfigError(
            BACKEND,
            backend,
            f"cannot be used here: {reason}.",
            f"{cupy}set {BACKEND}=gloo (slower: over TCP and the CPU).",
        )


def _check_sizes(config: DictConfig) -> None:
    for pool, does in (("actor_rollout_ref.rollout", "serve"), ("trainer", "train")):
        section: Any = config.trainer if pool == "trainer" else config.actor_rollout_ref.rollout
        for name in ("nnodes", "n_gpus_per_node"):
            if section[name] < 1 and (pool == "trainer" or is_disaggregated(config)):
                raise ConfigError(
                    f"{pool}.{name}",
                    section[name],
                    f"{pool}.nnodes x n_gpus_per_node GPUs {does}: at least 1 x 1.",
                    f"set {pool}.{name}=1 or more.",
                )


def has_adapter(model: DictConfig) -> bool:
    """Whether the block `model:` trains an adapter (LoRA), without which the actor is the reference."""
    lora = model.get("lora") or {}
    return model.get("lora_rank", 0) > 0 or lora.get("rank", 0) > 0 or model.get("lora_adapter_path") is not None


def _check_separate(config: DictConfig) -> None:
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    if rollout.get("disaggregation", {}).get("enabled", False):
        raise ConfigError(
            "actor_rollout_ref.rollout.disaggregation.enabled",
            True,
            f"pairs of prefill and decoding servers are not supported {SEPARATE}.",
            "set actor_rollout_ref.rollout.disaggregation.enabled=False.",
        )
    lora = model.get("lora") or {}
    if has_adapter(model) and not lora.get("merge", False):
        raise ConfigError(
            "actor_rollout_ref.model.lora.merge",
            lora.get("merge", False),
            f"{SEPARATE} verl 0.9.1 sends the base weights alone: servers would never get what the adapter learns.",
            "set actor_rollout_ref.model.lora.merge=True, or darts.placement=colocated.",
        )


def _check_servers(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.get("disaggregation", {}).get("enabled", False):
        return  # servers of several sizes
    tensor, data, pipeline = (rollout[f"{name}_parallel_size"] for name in ("tensor_model", "data", "pipeline_model"))
    server, have = _server_size(rollout), pools(config)
    if not have.separate and rollout.n_gpus_per_node != config.trainer.n_gpus_per_node:
        raise ConfigError(
            "actor_rollout_ref.rollout.n_gpus_per_node",
            rollout.n_gpus_per_node,
            "with darts.placement=colocated the servers are on the training GPUs, of which each node has "
            f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}.",
            "leave it out, or set darts.placement=disaggregated.",
        )
    if have.separate:
        nodes, per_node = rollout.nnodes, rollout.n_gpus_per_node
        fits = per_node % server == 0 or (server % per_node == 0 and nodes % (server // per_node) == 0)
        where = f"the {nodes} x {per_node} GPUs that serve (actor_rollout_ref.rollout.nnodes x n_gpus_per_node)"
    else:
        fits = have.train % server == 0
        where = f"the {have.train} GPUs (trainer.nnodes x n_gpus_per_node)"
    if not fits:
        raise ConfigError(
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
            tensor,
            f"a server takes {server} GPUs (tensor {tensor} x data {data} x pipeline {pipeline} parallel), and such "
            f"servers do not fill {where}{' evenly, whole nodes or whole parts of one' if have.separate else ''}.",
            "choose parallel sizes whose product divides the number of GPUs.",
        )
