"""verl 0.9.1 on a machine without an accelerator.

Contract:
1. ``activate()`` registers the platform ``cpu`` and applies the patches of such a machine. It runs where
   ``is_cpu_only()`` holds and nowhere else, and before the first ``get_platform()`` of the process (it raises if it
   came too late).
2. Environment variables are defaults: what the user has set stays.
3. A logical GPU is a Ray resource, no device: start Ray with ``num_gpus`` (``ray_kwargs.ray_init.num_gpus``).
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, platform_manager

from verl_patches.patches import patch_offload_policy, patch_process_group_backend

# Set in every process that imports verl, if absent, and inherited by what it starts.
PROCESS_ENV = {
    "VERL_PLATFORM": "cpu",
    # verl's own switch: look engines up as on CUDA. Its FSDP engines take the device from the platform, but are
    # registered for cuda and npu only.
    "VERL_ENGINE_DEVICE": "cuda",
}
# Handed to the vLLM server actors and inherited by their engine processes, if absent.
ROLLOUT_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes gpu_memory_utilization of the whole memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer runs on the same cores
    # lets engine_kwargs.vllm.distributed_executor_backend=uni stand: one process, and one import of vLLM, less
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What there is to do for a device, where there is none."""


def _cpu_device_module() -> ModuleType:
    """``torch.cpu`` completed by the members that verl 0.9.1 uses of ``torch.cuda``.

    ``torch.cpu`` itself stays as it is. ``is_available`` says False: verl asks it whether accelerator memory can be
    measured, seeded or snapshotted.
    """
    module = ModuleType("verl_patches.cpu_device", "torch.cpu with the memory and RNG members of torch.cuda")
    for name in ("Event", "Stream", "current_stream", "device_count", "set_device", "stream", "synchronize"):
        setattr(module, name, getattr(torch.cpu, name))
    this_process = psutil.Process()

    def resident_bytes(device: Any = None) -> int:
        return this_process.memory_info().rss

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory_info = psutil.virtual_memory()
        return memory_info.available, memory_info.total

    module.is_available = lambda: False
    module.current_device = lambda: "cpu"
    module.get_device_name = lambda device=None: "cpu"
    module.mem_get_info = mem_get_info
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, resident_bytes)
    for name in (
        "empty_cache", "ipc_collect", "set_per_process_memory_fraction", "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
    ):  # fmt: skip
        setattr(module, name, _nothing)
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda rng_state, device=None: torch.set_rng_state(rng_state)
    return module


class CpuPlatform(PlatformBase):
    """verl's platform interface for CPU: gloo, no memory pool, logical GPUs as the Ray resource."""

    _module = _cpu_device_module()
    device_name = vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        """A device for ``tensor.to``: an index would mean a GPU to torch."""
        return "cpu"

    def device_count(self) -> int:
        return 1

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing
    nvtx_range = nullcontext
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """``GPU``: verl's ``ResourcePoolManager`` counts only GPU and NPU resources."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        """False: weights travel to vLLM through shared memory."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {name: os.environ.get(name, default) for name, default in ROLLOUT_ENV.items()}


def register_platform() -> None:
    """Register ``CpuPlatform`` as verl's platform ``cpu``.

    Symptom: verl falls back to ``nvidia`` and fails in ``torch.cuda``.
    Upstream: ``verl.plugin.platform.PlatformRegistry`` (verl 0.9.1) has nvidia, huawei and amd only.
    Delete: when verl ships a CPU platform.
    """
    current_platform = platform_manager._current_platform
    if current_platform is not None and not isinstance(current_platform, CpuPlatform):
        raise RuntimeError(
            f"verl has settled on {type(current_platform).__name__} before the CPU platform was registered; "
            f"set VERL_PLATFORM=cpu in the environment, or import verl before anything that calls get_platform()"
        )
    PlatformRegistry.register(platform="cpu")(CpuPlatform)


def activate() -> tuple[str, ...]:
    """Register and patch; return the names of what is in force."""
    for name, default_value in PROCESS_ENV.items():
        os.environ.setdefault(name, default_value)
    register_platform()
    patch_process_group_backend()
    patch_offload_policy()
    return ("cpu platform", "process group backend", "offload policy")
