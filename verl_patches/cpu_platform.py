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
from collections.abc import Callable
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


def _always(answer: Any) -> Callable[..., Any]:
    """A function that takes anything and answers so; None: there is nothing to do where there is no device."""
    return lambda *args, **kwargs: answer


def _cpu_device_module() -> ModuleType:
    """``torch.cpu`` completed by the members that verl 0.9.1 uses of ``torch.cuda``.

    ``torch.cpu`` itself stays as it is. ``is_available`` says False: verl asks it whether accelerator memory can be
    measured, seeded or snapshotted.
    """
    module = ModuleType("verl_patches.cpu_device", "torch.cpu with the memory and RNG members of torch.cuda")
    this_process = psutil.Process()

    def resident_bytes(device: Any = None) -> int:
        return this_process.memory_info().rss

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory_info = psutil.virtual_memory()
        return memory_info.available, memory_info.total

    of_torch = ("Event", "Stream", "current_stream", "device_count", "set_device", "stream", "synchronize")
    measures = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    needless = (
        "empty_cache", "ipc_collect", "set_per_process_memory_fraction", "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
    )  # fmt: skip
    vars(module).update(
        {name: getattr(torch.cpu, name) for name in of_torch}
        | dict.fromkeys(measures, resident_bytes)
        | dict.fromkeys(needless, _always(None)),
        is_available=_always(False),
        current_device=_always("cpu"),
        get_device_name=_always("cpu"),
        mem_get_info=mem_get_info,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda rng_state, device=None: torch.set_rng_state(rng_state),
    )
    return module


class CpuPlatform(PlatformBase):
    """verl's platform interface for CPU: gloo, no memory pool, logical GPUs as the Ray resource."""

    device_name = vendor_name = "cpu"
    device_module = _cpu_device_module()
    is_available = _always(True)
    current_device = _always("cpu")  # for `tensor.to`: an index would mean a GPU to torch
    device_count = _always(1)
    set_device = synchronize = set_allocator_settings = empty_cache = _always(None)
    profiler_start = profiler_stop = cudart = _always(None)
    nvtx_range = nullcontext
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _always("GPU")  # verl's `ResourcePoolManager` counts only GPU and NPU resources
    ray_noset_envvars = _always(())
    is_ipc_supported = _always(False)  # weights travel to vLLM through shared memory

    def rollout_env_vars(self) -> dict[str, str]:
        """What the servers inherit, unless the user has set it."""
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
