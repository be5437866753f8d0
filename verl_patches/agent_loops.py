"""verl 0.9.1's agent loops, of which every candidate gets one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hydra
from verl.experimental.agent_loop import agent_loop

from verl_patches.patching import PatchTargetMoved


def patch_building() -> bool:
    """Build agent loops by their class, without Hydra's machinery for configurations.

    Symptom: 1.7 ms of the worker's event loop for each candidate, of which the loop's own constructor takes 0.1: the
    last of 256 candidates starts almost half a second late.
    Upstream: ``hydra.utils.instantiate`` in ``verl.experimental.agent_loop.agent_loop.AgentLoopWorker._run_agent_loop``
    (verl 0.9.1), which copies, merges and resolves all arguments as configurations. A loop that is registered with
    settings of its own is still built by it.
    Delete: when verl keeps the class.
    """
    if agent_loop.hydra is not hydra:
        return False
    if "hydra" not in agent_loop.AgentLoopWorker._run_agent_loop.__code__.co_names:
        raise PatchTargetMoved("AgentLoopWorker._run_agent_loop does not use hydra any more: delete this patch")
    agent_loop.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=build))
    return True


def build(config: Any, **arguments: Any) -> Any:
    """The object of a configuration; its class is called where that is all it names."""
    if isinstance(config, dict) and set(config) == {"_target_"}:
        return hydra.utils.get_class(config["_target_"])(**arguments)
    return hydra.utils.instantiate(config=config, **arguments)
