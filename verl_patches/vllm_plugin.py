"""Entry point of the group ``vllm.general_plugins``: vLLM calls ``register()`` in every process of an engine.

Contract: the engine is marked as one of this run (``run_id``). Without an accelerator the vLLM CPU patches are applied,
elsewhere nothing of vLLM is imported. An error is raised into vLLM, which does not start then.
"""

from __future__ import annotations

from verl_patches.device import is_cpu_only
from verl_patches.patches import patch_cpu_linear
from verl_patches.weights.run_id import mark_engine


def register() -> None:
    """Apply what belongs into this vLLM process; safe to call again."""
    mark_engine()
    if is_cpu_only():
        patch_cpu_linear()
