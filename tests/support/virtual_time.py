"""Time that passes only while everybody waits: sleeps end at once, in the order of their ends, on any machine."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest


class VirtualClock:
    """What `time.monotonic` and `time.time` say, in seconds after the beginning."""

    def __init__(self) -> None:
        self.now = 0.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer once nothing else is left to do.

    What would go to a thread is done in the loop, so that nothing runs unseen while the clock jumps.
    """

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        if self._scheduled and not self._ready:
            self._clock.now = max(self._clock.now, self._scheduled[0].when())
        super()._run_once()


def use_virtual_time(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """Makes `asyncio.run` and the clocks of this process virtual."""
    clock, start = VirtualClock(), time.time()
    monkeypatch.setattr(asyncio.events, "new_event_loop", lambda: VirtualLoop(clock))
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "time", lambda: start + clock.now)
    return clock
