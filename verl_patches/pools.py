"""Whether servers of their own fit on what the trainer's GPUs leave of a cluster.

Contract: arithmetic on numbers that Ray counts; what verl 0.9.1 reserves of a node stands here. Nothing waits.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from darts.messages import Node

CPUS_PER_SERVING_GPU = 2
"""CPUs that verl's `RolloutReplica` reserves with a GPU that only serves."""


class ClusterTooSmall(RuntimeError):
    """The cluster has fewer GPUs or CPUs than the run asks for, or has them on other nodes."""


def check_room_for_servers(config: DictConfig, free: Sequence[Node]) -> None:
    """Checks that the servers fit on what the training GPUs leave of each node; Ray chooses the nodes of both.

    Args:
        config: of a disaggregated run.
        free: what is not taken of each node, once those that train are.

    Raises:
        ClusterTooSmall: they do not.
    """
    rollout = config.actor_rollout_ref.rollout
    part = min(server_size(rollout), rollout.n_gpus_per_node)
    count, sizes = rollout.nnodes * rollout.n_gpus_per_node // part, "parallel sizes of a server x number of servers"
    require_parts([free_node.gpus for free_node in free], part, count, sizes, "are left on nodes")
    with_cpus = [min(free_node.gpus, free_node.cpus // CPUS_PER_SERVING_GPU) for free_node in free]
    require_parts(with_cpus, part, count, sizes, f"with {CPUS_PER_SERVING_GPU} CPUs each are left on nodes")


def require_parts(gpus_by_node: Sequence[float], part_size: int, num_parts: int, sizes: str, state: str) -> None:
    """Checks that the nodes have `num_parts` times `part_size` GPUs, each of one node."""
    if sum(int(node_gpus // part_size) for node_gpus in gpus_by_node) < num_parts:
        listed_gpus = ", ".join(f"{node_gpus:g}" for node_gpus in gpus_by_node)
        raise ClusterTooSmall(
            f"{num_parts} times {part_size} GPUs of one node are asked for ({sizes}), but {listed_gpus} GPUs {state}. "
            "Fix: choose sizes that fill whole nodes, or the same part of each."
        )


def server_size(rollout: DictConfig) -> int:
    """GPUs of one server."""
    return rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
