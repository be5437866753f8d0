"""verl's checkpoint engine `gloo`: weights from the trainer to servers of their own, over TCP and without a GPU.

Contract.
1. Importing this module registers `gloo` with `verl.checkpoint_engine.CheckpointEngineRegistry` (verl 0.9.1), whose
   own backends need a GPU and cupy. `verl_patches.weight_sync` imports it, in every process that moves weights.
2. Actor rank 0 sends to all workers of the servers; other actor ranks only walk the weights, which is collective.
   What arrives is what was sent: names, order, shapes, dtypes and bytes, whatever the bucket's size. Tensors without
   elements are not sent (verl's `split_weight_chunks` leaves them out).
3. The process group is of its own: torch's default group is not touched. It is kept between updates, and made anew when
   its members change or an update has failed.
4. No wait is without limit. A side that fails tells the others, which raise the cause within `POLL_S`; a process that
   is gone is seen by its closed connection; what is silent ends after `timeout_s`.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import (
    CheckpointEngine,
    CheckpointEngineRegistry,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)
from verl.workers.rollout.utils import ensure_async_iterator

from verl_patches.weights.watch import POLL_S, TIMEOUT_S

SENDER = 0
OUTSIDE = -1
ALIGNMENT = 16
"""Bytes; a tensor is a view into its bucket, which must start at a multiple of its element's size."""

FAILED = "failed"


class WeightTransferError(RuntimeError):
    """A weight update that cannot be completed; the message has the cause, also where another process failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a worker is and has before an update, e.g. `Member(address="10.0.0.1", port=4321, group=("3f2a", 0, 3))`;
    address and port are those of the sender's store, the group has its name, the worker's rank, and the size."""

    address: str | None
    port: int | None
    group: tuple[str, int, int] | None


@dataclass(slots=True, kw_only=True)
class Group:
    """A process group with the store in which a side that fails says so."""

    name: str
    rank: int
    world_size: int
    store: dist.Store | None = field(default=None, repr=False)  # None outside of the group
    gloo: dist.ProcessGroupGloo | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S

    async def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sender's tensor in everybody's; the event loop goes on meanwhile."""
        if tensor.numel() == 0:
            return tensor
        broadcast_work = self.gloo.broadcast(tensor, SENDER)
        start_time = last_look = time.monotonic()
        while not broadcast_work.is_completed():
            await asyncio.sleep(0.0005)
            current_time = time.monotonic()
            if current_time > last_look + POLL_S:
                last_look = current_time
                self._raise_cause()
            if current_time > start_time + self.timeout_s:
                raise TimeoutError(
                    f"nothing of the weights moved for {self.timeout_s:g} s (VERL_PATCHES_WEIGHT_TIMEOUT_S): a process "
                    "of the update is stuck, or a single weight takes longer to gather."
                )
        try:
            broadcast_work.wait()
        except RuntimeError as error:
            self._raise_cause()
            raise WeightTransferError(f"a process of the weight update is gone: {error}") from error
        return tensor

    def _raise_cause(self) -> None:
        """Raises what another member says about its failure."""
        try:
            failure_cause = self.store.get(FAILED).decode() if self.store.check([FAILED]) else None
        except RuntimeError as error:
            raise WeightTransferError("actor rank 0, which sends the weights, is gone") from error
        if failure_cause is not None:
            raise WeightTransferError(f"the weight update failed in another process: {failure_cause}")


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Weights over gloo; see the module's contract.

    Args:
        bucket_size: bytes that are sent at once; a process holds one such buffer during an update.
        is_master: this is actor rank 0.
        timeout_s: limit of a wait; the default is `VERL_PATCHES_WEIGHT_TIMEOUT_S`, else 600.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        self.bucket_size = bucket_size
        self.timeout_s = timeout_s
        self._limit = timedelta(seconds=timeout_s)
        self._group: Group | None = None
        self._failed_groups: list[Group] = []  # their threads may still wait: letting go of them would block
        self._store: dist.TCPStore | None = None
        if is_master:
            self._store = dist.TCPStore(own_address(), 0, is_master=True, wait_for_workers=False, timeout=self._limit)

    def prepare(self) -> Member:
        """This worker, for `build_topology`."""
        group = self._group
        return Member(
            address=own_address() if self._store else None,
            port=self._store.port if self._store else None,
            group=(group.name, group.rank, group.world_size) if group else None,
        )

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Member]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Arguments of `init_process_group`: the group that all members are in already, or a new one."""
        assert len(metadata) == actor_wg_world_size + rollout_world_size, f"{len(metadata)=} {rollout_world_size=}"
        sender, world_size = metadata[0], 1 + rollout_world_size
        actor_ranks, server_ranks = [SENDER] + [OUTSIDE] * (actor_wg_world_size - 1), list(range(1, world_size))
        name = sender.group[0] if sender.group else None
        if [member.group for member in metadata] != [(name, rank, world_size) for rank in actor_ranks + server_ranks]:
            name = uuid4().hex
        shared_arguments = {"world_size": world_size, "group": name, "address": sender.address, "port": sender.port}

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks} | {key: [value] * len(ranks) for key, value in shared_arguments.items()}

        return arguments(actor_ranks), arguments(server_ranks)

    def init_process_group(self, rank: int, world_size: int, group: str, address: str, port: int) -> None:
        """Joins the group, unless this worker is in it already."""
        if self._group is not None and self._group.name == group:
            return
        self._group = None
        if rank == OUTSIDE:
            self._group = Group(name=group, rank=rank, world_size=world_size)
            return
        store = dist.PrefixStore(
            group,
            self._store or dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=self._limit),
        )
        gloo_options = dist.ProcessGroupGloo._Options()
        gloo_options._timeout = self._limit
        gloo_options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address())]
        process_group = dist.ProcessGroupGloo(store, rank, world_size, gloo_options)
        self._group = Group(
            name=group, rank=rank, world_size=world_size, store=store, gloo=process_group, timeout_s=self.timeout_s
        )

    def finalize(self) -> None:
        """Nothing: buffers live as long as an update, the group until its members change."""

    async def send_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any] | None:
        """Sends the weights, bucket by bucket; on ranks outside of the group, only walks them."""
        if self._group.rank == OUTSIDE:
            async for _ in ensure_async_iterator(weights):
                pass
            return
        with self._failing_together() as group:
            bucket = torch.empty(self.bucket_size, dtype=torch.uint8)
            bucket_metas, filled_bytes = [], 0
            with_bytes = ((name, weight.detach().contiguous()) async for name, weight in ensure_async_iterator(weights))
            async for tensor_meta, chunk_bytes in split_weight_chunks(with_bytes, self.bucket_size):
                offset = -(-filled_bytes // ALIGNMENT) * ALIGNMENT
                if offset + tensor_meta.chunk_size > self.bucket_size:
                    await self._send_bucket(group, bucket_metas, bucket[:filled_bytes], is_last=False)
                    bucket_metas, offset = [], 0
                tensor_meta.offset, filled_bytes = offset, offset + tensor_meta.chunk_size
                bucket[offset:filled_bytes].copy_(chunk_bytes)
                bucket_metas.append(tensor_meta)
            await self._send_bucket(group, bucket_metas, bucket[:filled_bytes], is_last=True)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yields the weights as they were sent, on the CPU."""
        with self._failing_together() as group:
            async for name, weight in merge_weight_chunks(self._receive_chunks(group), self.bucket_size):
                yield name, weight

    async def _send_bucket(
        self, group: Group, bucket_metas: list[TensorMeta], bucket_content: torch.Tensor, is_last: bool
    ) -> None:
        meta_bytes = torch.frombuffer(bytearray(pickle.dumps((bucket_metas, is_last))), dtype=torch.uint8)
        for bucket_part in (torch.tensor([meta_bytes.numel(), bucket_content.numel()]), meta_bytes, bucket_content):
            await group.broadcast(bucket_part)

    async def _receive_chunks(self, group: Group) -> AsyncIterator[tuple[TensorMeta, torch.Tensor]]:
        is_last = False
        while not is_last:
            part_sizes = await group.broadcast(torch.empty(2, dtype=torch.int64))
            meta_bytes, bucket_content = [torch.empty(size, dtype=torch.uint8) for size in part_sizes.tolist()]
            bucket_metas, is_last = pickle.loads((await group.broadcast(meta_bytes)).numpy().tobytes())
            await group.broadcast(bucket_content)
            for tensor_meta in bucket_metas:
                yield tensor_meta, bucket_content[tensor_meta.offset : tensor_meta.offset + tensor_meta.chunk_size]

    @contextmanager
    def _failing_together(self) -> Iterator[Group]:
        """Gives the group of an update. What ends it early here ends it everywhere; the group is not used again.

        A new update may have begun by then, with a group of its own: the other side may see a failure first.
        """
        group = self._group
        try:
            yield group
        except BaseException as error:  # a receiver whose consumer fails is closed: GeneratorExit
            if self._group is group:
                self._group = None
            self._failed_groups.append(group)
            failed_member = "the sender" if group.rank == SENDER else f"receiver {group.rank}"
            failure_reason = "what takes the weights stopped" if isinstance(error, GeneratorExit) else repr(error)
            try:
                if not group.store.check([FAILED]):
                    group.store.set(FAILED, f"{failed_member}: {failure_reason}")
            except RuntimeError:  # the store's process is gone, and with it who would listen
                pass
            raise


def own_address() -> str:
    """The address under which Ray knows this machine."""
    return ray.util.get_node_ip_address().strip("[]")
