"""How many GPUs train and serve, and whether the cluster has them."""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from darts.messages import Node
from verl_patches.pools import CPUS_PER_SERVING_GPU, ClusterTooSmall, require_parts

CPUS_PER_GPU = 3
"""CPUs that verl reserves with a GPU that trains: `max_colocate_count` of `ResourcePoolManager`."""


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


def check_cluster(config: DictConfig, others: int, nodes: Sequence[Node]) -> None:
    """Raises `ClusterTooSmall` without the GPUs and CPUs that verl reserves, before anything waits for them for ever.

    Args:
        config: of the run.
        others: GPUs of further pools (reward model, teacher).
        nodes: what each node has, as Ray counts it.
    """
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
