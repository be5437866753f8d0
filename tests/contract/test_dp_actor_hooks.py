"""What the overlapped actor relies on in verl 0.9.1 and transformers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from verl.single_controller.base import decorator
from verl.single_controller.base.worker_group import WorkerGroup
from verl.utils import tensordict_utils as tu
from verl.workers import engine_workers
from verl.workers.engine import BaseEngine, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import EngineEvalModeCtx, FSDPEngine, FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_patches import dp_actor
from verl_patches.dp_actor import OverlappedActorWorker
from verl_patches.log_prob_model import OverlapEngine, register_engine
from verl_patches.prefix_cache import Prefix, PrefixBatch


def parameters(function) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (FSDPEngineWithLMHead.prepare_model_inputs, ("self", "micro_batch")),
        (
            FSDPEngineWithLMHead.prepare_model_outputs,
            ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
        ),
        (FSDPEngineWithLMHead.forward_step, ("self", "micro_batch", "loss_function", "forward_only")),
        (FSDPEngine.eval_mode, ("self", "kwargs")),
        (FSDPEngine.disable_adapter, ("self",)),
        (FSDPEngine.to, ("self", "device", "model", "optimizer", "grad")),
        (BaseEngine.infer_batch, ("self", "data", "loss_function")),
        (TrainingWorker.infer_batch, ("self", "data")),
        (ActorRolloutRefWorker.init_model, ("self",)),
        (decorator.dispatch_nd_compute, ("dp_rank_mapping", "dp_size", "worker_group", "args", "kwargs")),
        (EngineRegistry.get_engine_cls, ("model_type", "backend")),
        (DynamicLayer.update, ("self", "key_states", "value_states", "args", "kwargs")),
        (DynamicLayer.get_mask_sizes, ("self", "query_length")),
        (DynamicLayer.get_seq_length, ("self",)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_parameters(function, expected):
    # Ray adds one to the methods of classes that it has made actors of.
    assert tuple(name for name in parameters(function) if name != "_ray_trace_ctx") == expected


def test_forward_step_asks_for_no_cache_and_goes_through_the_two_hooks():
    """transformers leaves a cache that is given alone, and fills it, when `use_cache` is False."""
    source = inspect.getsource(FSDPEngineWithLMHead.forward_step)
    assert "use_cache=False" in source
    assert "self.prepare_model_inputs(micro_batch=micro_batch)" in source
    assert "micro_batch=micro_batch, logits_processor_func=loss_function" in source
    for name in ("disable_auto_offload", "no_lora_adapter", "use_dynamic_bsz", "max_token_len_per_gpu"):
        assert name in inspect.getsource(TrainingWorker.infer_batch)
    assert "disable_auto_offload" in inspect.getsource(EngineEvalModeCtx.__mro__[1].__init__)


def test_padded_outputs_read_what_the_engine_is_given():
    source = inspect.getsource(FSDPEngineWithLMHead.prepare_model_outputs)
    for name in ('output_args["temperature"]', 'output_args["input_ids_rmpad_rolled"]', '"temperature_is_one"'):
        assert name in source
    for name in ('model_output["log_probs"]', 'model_output["entropy"]', 'model_output["sum_pi_squared"]'):
        assert name in source


def test_marker_survives_the_way_to_the_device():
    """`forward_step` moves the micro-batch first; the batch of prefixes in it stays the same object."""
    marker = object()
    micro_batch = TensorDict({"input_ids": torch.zeros(2, 1)}, batch_size=[2])
    tu.assign_non_tensor(micro_batch, marker=marker)
    assert tu.get_non_tensor_data(data=micro_batch.to("cpu"), key="marker", default=None) is marker


def test_packing_is_upstreams_for_whole_rows_and_not_for_continued_ones():
    """`use_remove_padding=True` needs flash attention to run; here the inputs are composed only."""
    engine = object.__new__(OverlapEngine)
    engine.pad_to_length = engine.use_ulysses_sp = False
    tokens = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    whole = TensorDict({"input_ids": tokens, "position_ids": tokens}, batch_size=[2])
    tu.assign_non_tensor(whole, temperature=0.7, use_remove_padding=True)
    inputs, outputs = engine.prepare_model_inputs(whole)
    assert inputs["input_ids"].shape == (1, 8)
    assert "past_key_values" not in inputs
    assert outputs["temperature_rmpad"].shape == (8,)

    batch = PrefixBatch(None, [Prefix(), Prefix()], [np.arange(3), np.arange(5)], [np.arange(3), np.arange(5)], "cpu")
    tu.assign_non_tensor(whole, prefix_batch=batch)
    inputs, outputs = engine.prepare_model_inputs(whole)
    assert inputs["input_ids"].shape == (2, 5)
    assert inputs["past_key_values"] is batch.cache
    assert outputs["temperature"].tolist() == pytest.approx([0.7, 0.7])


def test_plain_cache_is_made_of_plain_layers():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert type(cache.layers[0]) is DynamicLayer
    assert cache.layer_class_to_replicate is DynamicLayer
    assert cache.get_mask_sizes(5, 0) == (8, 0)


def test_worker_builds_engines_from_the_registry():
    assert "EngineRegistry.new(" in inspect.getsource(TrainingWorker.__init__)
    assert ActorRolloutRefWorker.actor_worker_cls is ActorRolloutRefWorker.ref_worker_cls is TrainingWorker
    assert engine_workers.TrainingWorker is TrainingWorker


def test_register_engine_replaces_the_language_model_only(monkeypatch):
    engines = {kind: {name: dict(keys) for name, keys in of.items()} for kind, of in EngineRegistry._engines.items()}
    monkeypatch.setattr(EngineRegistry, "_engines", engines)
    critic = EngineRegistry.get_engine_cls("value_model", "fsdp2")
    for _ in range(2):
        register_engine()
        for backend in ("fsdp", "fsdp2"):
            assert EngineRegistry.get_engine_cls("language_model", backend) is OverlapEngine
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is critic
    assert not issubclass(critic, OverlapEngine)


def test_register_engine_leaves_another_plugins_engine(monkeypatch):
    class Theirs(FSDPEngineWithLMHead):
        pass

    engines = {"language_model": {name: {"cuda": Theirs, "npu": Theirs} for name in ("fsdp", "fsdp2")}}
    monkeypatch.setattr(EngineRegistry, "_engines", engines)
    register_engine()
    assert EngineRegistry.get_engine_cls("language_model", "fsdp") is Theirs


class Group(WorkerGroup):
    """Four workers, of which two each share their sequences (Ulysses)."""

    def __init__(self):
        self._dispatch_info, self._collect_info = {}, {}

    world_size = 4

    def _query_dispatch_info(self, mesh):
        assert mesh == "actor"
        return [0, 0, 1, 1]

    def _query_collect_info(self, mesh):
        return [True, False, True, False]


def test_each_rank_gets_its_own_argument(monkeypatch):
    monkeypatch.setattr("verl.utils.ray_utils.parallel_put", lambda values, max_workers: values)
    group = Group()
    assert dp_actor._for_each_rank(group, ["a", "b"]) == ((["a", "a", "b", "b"],), {})
    assert dp_actor._for_each_rank(group, 7, [[1], [2]]) == (([7, 7, 7, 7], [[1], [1], [2], [2]]), {})
    assert dp_actor._of_each_rank(group, ["w", "x", "y", "z"]) == ["w", "y", "x", "z"], "the collected come first"
    group._dispatch_info["actor"], group._collect_info["actor"] = [1, 0, 1, 0], [False, False, True, True]
    assert dp_actor._of_each_rank(group, ["w", "x", "y", "z"]) == ["z", "y", "x", "w"], "in data-parallel order"
    with pytest.raises(ValueError, match="3 arguments came for 2 data-parallel ranks"):
        dp_actor._for_each_rank(group, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("overlap_open", decorator.Dispatch.ONE_TO_ALL),
        ("overlap_extend", dp_actor.EACH_RANK),
        ("overlap_collect", dp_actor.EACH_RANK),
        ("overlap_clear", decorator.Dispatch.ONE_TO_ALL),
    ],
)
def test_rpcs_do_not_block_the_caller(name, mode):
    attributes = getattr(getattr(OverlappedActorWorker, name), decorator.MAGIC_ATTR)
    assert attributes["dispatch_mode"] == mode
    assert attributes["blocking"] is False
