"""How long a weight update may stand still, for every transport here; and verl's own transport, which had no limit.

Contract. While `WatchedSocket` waits for vLLM to take a bucket of weights, it raises the exception of the receiving
engine, or the death of its server, within ``POLL_S``; what cannot be seen so (an engine process that was killed leaves
its call open) ends after ``TIMEOUT_S`` without an answer, as ``TimeoutError``.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import Any

import ray
import zmq

POLL_S = 1.0
"""Seconds between two looks at whether the other side still lives."""

TIMEOUT_S = float(os.environ.get("VERL_PATCHES_WEIGHT_TIMEOUT_S", "600"))
"""Seconds without any progress after which a weight update fails."""

receiver: ContextVar[ray.ObjectRef | None] = ContextVar("weight_receiver", default=None)
"""The call in which vLLM receives the weights that this task sends; None on ranks without a server."""


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

    def _wait_for(self, poll_event: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._socket.poll(POLL_S * 1000, poll_event):
            if self._receiver is not None and ray.wait([self._receiver], timeout=0)[0]:
                ray.get(self._receiver)  # raises if the call has failed
            if time.monotonic() > deadline:
                what_failed = "acknowledge" if poll_event == zmq.POLLIN else "come for"
                raise TimeoutError(
                    f"vLLM did not {what_failed} a bucket of weights within {self._timeout_s:g} s "
                    f"(VERL_PATCHES_WEIGHT_TIMEOUT_S): its engine process is dead or stuck, see its log"
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)
