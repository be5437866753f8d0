"""Lets a real engine hold its requests back until all are there. The coroutines run in the server actor."""

from typing import Any


async def hold(server: Any) -> None:
    """Requests are accepted, and wait."""
    await server.engine.pause_generation(mode="keep", clear_cache=False)


async def release(server: Any) -> None:
    """All that wait start in one step."""
    await server.engine.resume_generation()
