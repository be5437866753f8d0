"""A weight update that fails in vLLM ends the run instead of hanging it. For GPU and CPU alike.

Contract:
1. Importing this module applies the patches in this process, and registers the checkpoint engine ``gloo``. verl does so
   in every process that moves weights (actor workers, the workers beside servers of their own, the trainer) where
   ``actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_patches.weights.sync``; not sooner, since
   the patched modules import vLLM.
2. While the process beside vLLM waits for it to take a bucket of weights, an exception of the receiving engine or the
   death of its server is raised there within ``POLL_S``: in the actor worker where trainer and servers share GPUs, else
   in the server's own worker, from which it reaches the trainer.
3. What cannot be seen so (an engine process that was killed leaves its call open) ends after ``TIMEOUT_S`` without an
   answer, as ``TimeoutError``.
4. The sockets are this run's own on the machine (``run_id``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import ray
import zmq
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

import verl_patches.weights.gloo  # noqa: F401  (registers it)
from verl_patches.patching import replace
from verl_patches.weights.limits import POLL_S, TIMEOUT_S
from verl_patches.weights.run_id import of_this_run

# The call in which vLLM receives the weights that this task sends; None on ranks without a server.
_receiver: ContextVar[ray.ObjectRef | None] = ContextVar("weight_receiver", default=None)


class WatchedSocket:
    """A REQ socket that gives up when the peer cannot answer any more, or never came; the rest is the socket's."""

    def __init__(self, socket: zmq.Socket, receiver: ray.ObjectRef | None, timeout_s: float = TIMEOUT_S) -> None:
        self._socket = socket
        self._receiver = receiver
        self._timeout_s = timeout_s
        socket.setsockopt(zmq.LINGER, 0)  # close() must not wait for a peer that is gone

    def send_pyobj(self, *args: Any, **kwargs: Any) -> Any:
        """Sends once the peer is there: one that fails before it connects would never be waited for in `recv`."""
        self._wait_for(zmq.POLLOUT)
        return self._socket.send_pyobj(*args, **kwargs)

    def recv(self, *args: Any, **kwargs: Any) -> bytes:
        self._wait_for(zmq.POLLIN)
        return self._socket.recv(*args, **kwargs)

    def _wait_for(self, event: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._socket.poll(POLL_S * 1000, event):
            self._raise_failure_of_receiver()
            if time.monotonic() > deadline:
                what = "acknowledge" if event == zmq.POLLIN else "come for"
                raise TimeoutError(
                    f"vLLM did not {what} a bucket of weights within {self._timeout_s:g} s "
                    f"(VERL_PATCHES_WEIGHT_TIMEOUT_S): its engine process is dead or stuck, see its log"
                )

    def _raise_failure_of_receiver(self) -> None:
        if self._receiver is not None and ray.wait([self._receiver], timeout=0)[0]:
            ray.get(self._receiver)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def patch_server_adapter() -> bool:
    """Remember the call in which vLLM receives weights.

    Symptom: see ``patch_weight_sender``, which needs it.
    Upstream: ``verl.workers.rollout.vllm_rollout.vllm_rollout.ServerAdapter._execute_method`` (verl 0.9.1).
    Delete: with ``patch_weight_sender``.
    """
    parameters = ("self", "method", "non_block", "timeout", "args", "kwargs")
    return replace(ServerAdapter, "_execute_method", parameters, _remembering_receiver)


def _remembering_receiver(upstream: Callable[..., Any]) -> Callable[..., Any]:
    async def _execute_method(self: ServerAdapter, method: str, non_block: bool = False, **kwargs: Any) -> Any:
        result = await upstream(self, method, non_block=non_block, **kwargs)
        if method == "update_weights_from_ipc":
            _receiver.set(result if non_block else None)
        return result

    return _execute_method


def patch_weight_sender() -> bool:
    """Watch the receiver while waiting for its answer, and bind a socket of this run (``run_id``).

    Symptom: an exception of vLLM in ``update_weights_from_ipc`` leaves the sending worker in a ``recv`` (or, before
    vLLM has connected, in a ``send``) without time limit, the driver in ``update_weights``, and the run hanging for
    ever with the error in the log of the engine only.
    Upstream: ``verl.workers.rollout.vllm_rollout.bucketed_weight_transfer.BucketedWeightSender`` (verl 0.9.1): a
    blocking REQ socket inside ``async_send_weights``; the call's result is awaited after it.
    Delete: when verl waits for the answer and the call together.
    """
    return replace(BucketedWeightSender, "_init_socket", ("self",), _with_watched_socket)


def _with_watched_socket(upstream: Callable[..., None]) -> Callable[..., None]:
    def _init_socket(self: BucketedWeightSender) -> None:
        self.zmq_handle = of_this_run(self.zmq_handle)
        upstream(self)
        self.socket = WatchedSocket(self.socket, _receiver.get())

    return _init_socket


patch_server_adapter()
patch_weight_sender()
