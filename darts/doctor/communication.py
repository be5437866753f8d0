"""Do all GPUs of the cluster talk to each other? Ray first, then torch.distributed, as a run would use them.

Contract: one actor per (logical) GPU, on the node of its GPU, in the Ray cluster of RAY_ADDRESS, else in a local one.
Every wait has a limit, and names the ranks that did not answer: an actor has two threads, so that `where` says how far
it is while a collective waits for others.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from darts.doctor.facts import FAILED, MIB, NETWORK, OK, SETUP, Fact, judge_reduce, judge_same, machine_facts, versions
from verl_patches.device import is_cpu_only

REPEATS = 5
GRACE_S = 10


class RayNode(NamedTuple):
    """One node; `here` has an actor or a task run there."""

    address: str
    gpus: int
    here: NodeAffinitySchedulingStrategy


class NoAnswer(Exception):
    """Names the ranks that did not answer, or what they raised."""


class Rank:
    """One process of the group, in a Ray actor."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.entered = 0

    def address(self) -> tuple[str, int]:
        """Where the group can meet: this node, and a free port of it."""
        node = ray.util.get_node_ip_address()
        with socket.socket() as free_socket:
            free_socket.bind((node, 0))
            return node, free_socket.getsockname()[1]

    def where(self) -> int:
        """How many collectives it has entered; answers while one of them waits."""
        return self.entered

    def join(self, address: tuple[str, int], nodes: list[list[int]], backend: str, limit_s: float) -> None:
        """Makes the group of all ranks, and one for the ranks of each node."""
        self.entered += 1
        self.device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address[0]}:{address[1]}",
            world_size=sum(map(len, nodes)),
            rank=self.number,
            timeout=timedelta(seconds=limit_s),
            device_id=self.device if backend == "nccl" else None,
        )
        self.groups = {"node": dist.new_subgroups_by_enumeration(nodes)[0], "all": dist.group.WORLD}

    def reduce(self, scope_name: str, mib: int) -> tuple[float, float, float]:
        """Sums each rank's number plus one; returns what is expected, how far the result is off, and seconds."""
        self.entered += 1
        group = self.groups[scope_name]
        wait_for_device = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        summed_data = torch.full((mib * 2**18,), self.number + 1.0, device=self.device)
        dist.all_reduce(summed_data, group=group)
        expected = sum(rank + 1 for rank in dist.get_process_group_ranks(group))
        largest_error = (summed_data - expected).abs().max().item()
        summed_data.zero_()
        dist.barrier(group=group)  # a rank that is late is not a slow network
        wait_for_device()
        start_s = time.monotonic()
        for _ in range(REPEATS):
            dist.all_reduce(summed_data, group=group)
        wait_for_device()
        return expected, largest_error, (time.monotonic() - start_s) / REPEATS


def communication_facts(logical: int, limit_s: float, rank_class: type[Rank] = Rank) -> Iterator[Fact]:
    """Facts of the nodes, then of all-reduce.

    Args:
        logical: ranks on a machine without GPUs and without a cluster.
        limit_s: of every single wait.
        rank_class: what runs on each GPU.
    """
    backend = "gloo" if is_cpu_only() else "nccl"
    try:
        with _cluster(logical if backend == "gloo" else None, limit_s):
            nodes = []
            for node in ray.nodes():
                if node["Alive"]:
                    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    nodes.append(RayNode(node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)), here))
            yield from _node_facts(nodes, limit_s)
            yield from _reduce_facts(nodes, backend, limit_s, rank_class)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        fix = "is it the address of a head node (ray start --head) with the same Ray, RAY_AUTH_MODE and token?"
        yield Fact("Ray", FAILED, " ".join(str(error).split()), fix)


@contextmanager
def _cluster(num_gpus: int | None, limit_s: float) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a local one; `num_gpus` None: those that Ray finds."""
    ray_address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = ray_address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=limit_s).close()
        except OSError as error:
            raise OSError(f"RAY_ADDRESS={ray_address}: {error}") from error
    local_options = {"include_dashboard": False, "num_gpus": num_gpus, "num_cpus": 16 if num_gpus else None}
    joining = ray_address not in ("", "local")
    ray.init(ray_address or "local", log_to_driver=False, logging_level="ERROR", **({} if joining else local_options))
    try:
        yield
    finally:
        ray.shutdown()


def _node_facts(nodes: list[RayNode], limit_s: float) -> Iterator[Fact]:
    """Which nodes, with the same versions everywhere, and what is not ok there."""
    node_list = ", ".join(f"{node.address} {node.gpus}" for node in nodes)
    yield Fact("nodes", OK, f"{len(nodes)}, with GPUs: {node_list}")
    look_task = ray.remote(num_cpus=0, max_retries=0)(lambda: (versions(), list(machine_facts())))
    asked_refs = [look_task.options(scheduling_strategy=node.here).remote() for node in nodes]
    done_refs, _ = ray.wait(asked_refs, num_returns=len(asked_refs), timeout=limit_s)
    for node, reference in zip(nodes, asked_refs, strict=True):
        name = f"node {node.address}"
        if reference in done_refs:
            (answer, error), fix = _answer(reference), f"the same folder and environment on every node: {SETUP}"
        else:
            ray.cancel(reference, force=True)
            error = f"did not answer within {limit_s:g} s"
            fix = "look at Ray's logs there; the first process of a slow disk takes long: --limit-s 300"
        if error:
            yield Fact(name, FAILED, error, fix)
            continue
        found_versions, facts = answer
        yield judge_same(node.address, versions(), found_versions)
        if len(nodes) > 1:
            for fact in facts:
                if fact.status != OK:
                    yield Fact(name, fact.status, f"{fact.name} {fact.value}", fact.fix)


def _reduce_facts(nodes: list[RayNode], backend: str, limit_s: float, rank_class: type[Rank]) -> Iterator[Fact]:
    nodes = [node for node in nodes if node.gpus]
    total_gpus, free_gpus = sum(node.gpus for node in nodes), int(ray.available_resources().get("GPU", 0))
    if free_gpus < total_gpus or total_gpus == 0:
        fix = (
            "end what runs on the cluster, then repeat"
            if total_gpus
            else "start Ray where GPUs are (ray start --num-gpus=8)"
        )
        yield Fact("all-reduce", FAILED, f"{free_gpus} of {total_gpus} GPUs are free in Ray", fix)
        return
    if total_gpus == 1:
        yield Fact("all-reduce", OK, "one GPU: nothing to communicate with")
        return
    members, rank_nodes = [], []  # the ranks of each node; the node of each rank
    for node in nodes:
        members.append(list(range(len(rank_nodes), len(rank_nodes) + node.gpus)))
        rank_nodes += [node] * node.gpus
    rank_actor = ray.remote(num_cpus=0, num_gpus=1, max_concurrency=2, max_restarts=0)(rank_class)
    # Otherwise NCCL's watchdog would end a process that has waited too long, before it can say so.
    environment = {"env_vars": {"TORCH_NCCL_BLOCKING_WAIT": "1", "OMP_NUM_THREADS": "1"}}
    ranks = [
        rank_actor.options(scheduling_strategy=node.here, runtime_env=environment).remote(number)
        for number, node in enumerate(rank_nodes)
    ]
    rank_names = [f"rank {number} ({node.address})" for number, node in enumerate(rank_nodes)]
    try:
        address = _ask(ranks, rank_names, "the start of the processes", limit_s, "address")[0]
        _ask(ranks, rank_names, "joining the group", limit_s, "join", address, members, backend, limit_s)
        node_scope = [("node", "within nodes")] if len(nodes) > 1 and max(map(len, members)) > 1 else []
        for scope, scope_text in [*node_scope, ("all", "across nodes" if len(nodes) > 1 else "within the node")]:
            rank_results = _ask(ranks, rank_names, f"all-reduce {scope_text}", limit_s, "reduce", scope, MIB[backend])
            sizes = [len(ranks) for ranks in members for _ in ranks] if scope == "node" else [total_gpus] * total_gpus
            yield judge_reduce(scope_text, rank_names, rank_results, sizes, backend)
    except NoAnswer as error:
        yield Fact("all-reduce", FAILED, str(error), NETWORK)
    finally:
        for rank in ranks:
            ray.kill(rank)


def _ask(ranks: list[Any], rank_names: list[str], call_text: str, limit_s: float, method: str, *args: Any) -> list[Any]:
    """The answers of all ranks; raises `NoAnswer`."""
    asked = [getattr(rank, method).remote(*args) for rank in ranks]
    _, waiting = ray.wait(asked, num_returns=len(asked), timeout=limit_s + GRACE_S)  # torch's own limit comes first
    if waiting:
        silent_ranks = [asked.index(reference) for reference in waiting]
        raise NoAnswer(f"{call_text}: {_blame(ranks, rank_names, silent_ranks)} did not answer within {limit_s:g} s")
    rank_answers = [_answer(reference) for reference in asked]
    failed_ranks = [f"{name}: {error}" for name, (_, error) in zip(rank_names, rank_answers, strict=True) if error]
    if failed_ranks:
        raise NoAnswer(f"{call_text}: {'; '.join(failed_ranks[:3])}{' ...' if len(failed_ranks) > 3 else ''}")
    return [answer for answer, _ in rank_answers]


def _answer(reference: Any) -> tuple[Any, str]:
    """What a call returned, or the last line of what it raised."""
    try:
        return ray.get(reference), ""
    except Exception as error:
        error_lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, error_lines[-1] if error_lines else type(error).__name__


def _blame(ranks: list[Any], rank_names: list[str], silent_ranks: list[int]) -> str:
    """The ranks that keep the others waiting, among those that have not answered."""
    asked = {number: ranks[number].where.remote() for number in silent_ranks}
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=GRACE_S)
    entered = {number: (_answer(reference)[0] or 0) if reference in done else 0 for number, reference in asked.items()}
    ranks_behind = [number for number in silent_ranks if entered[number] < max(entered.values())] or silent_ranks
    return ", ".join(rank_names[number] for number in ranks_behind)
