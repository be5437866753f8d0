"""What DARTS relies on in verl 0.9.1: signatures, the text of what it replaces or imitates, and behaviour.

A failure here means that verl moved. Read the changed symbol, adapt the module named in the test, then the pin.
"""

import asyncio
import hashlib
import inspect
import textwrap

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, AgentLoopOutput, AgentLoopWorker
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.protocol import DataProto
from verl.trainer import main_ppo, main_ppo_v0
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename
from verl.utils.skip import SkipManager
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput

from darts.evidence.checkpoint import TRACKER


def digest(symbol) -> str:
    return hashlib.sha256(textwrap.dedent(inspect.getsource(symbol)).encode()).hexdigest()[:12]


SIGNATURES = {
    AgentLoopWorker.__init__: "self, config, llm_client, teacher_client, reward_loop_worker_handles",
    AgentLoopWorker.generate_sequences: "self, batch",
    AgentLoopWorker._run_agent_loop: "self, sampling_params, trajectory, agent_name, trace, kwargs",
    AgentLoopWorker._agent_loop_postprocess: "self, output, validate, kwargs",
    AgentLoopWorker._compute_score: "self, outputs, kwargs",
    AgentLoopWorker._postprocess: "self, inputs, input_non_tensor_batch, validate",
    AgentLoopManager.__init__: "self, config, llm_client, teacher_client, reward_loop_worker_handles",
    AgentLoopManager.generate_sequences: "self, prompts",
    AgentLoopManager._performance_metrics: "self, metrics, output",
    SeparateRayPPOTrainer._fit_generate: "self, batch",
    SeparateRayPPOTrainer._fit_prepare_step: "self",
    SeparateRayPPOTrainer._fit_update_weights: "self",
    SeparateRayPPOTrainer._fit_save_checkpoint: "self",
    SeparateRayPPOTrainer._fit_collect_metrics: "self, batch",
    SeparateRayPPOTrainer._fit_postprocess_step: "self",
    RayPPOTrainer._shutdown_dump_executor: "self",
    main_ppo.run_ppo: "config, task_runner_class",
    LLMServerClient.generate: (
        "self, request_id, prompt_ids, sampling_params, image_data, video_data, audio_data, mm_processor_kwargs, kwargs"
    ),
}


@pytest.mark.parametrize("symbol", SIGNATURES, ids=lambda symbol: symbol.__qualname__)
def test_signature(symbol):
    # Ray adds one to the methods of a class, in place, when it makes an actor class of it.
    parameters = [name for name in inspect.signature(symbol).parameters if name != "_ray_trace_ctx"]
    assert ", ".join(parameters) == SIGNATURES[symbol]


# What is replaced, or imitated step by step: the text itself is pinned.
TEXTS = {
    "darts.training.trainer: order of a colocated step": (RayPPOTrainer.fit, "b5678ef1a7c0"),
    "darts.training.trainer: workers and servers": (RayPPOTrainer.init_workers, "a1b0c087ba01"),
    "darts.training.trainer: the step that it runs": (SeparateRayPPOTrainer.fit_step, "38b55ab275e5"),
    "darts.training.trainer: the loop that it runs": (SeparateRayPPOTrainer.fit, "b6336bb79554"),
    "darts.training.trainer: _fit_update_weights": (SeparateRayPPOTrainer._fit_update_weights, "c06a73492507"),
    "darts.training.trainer: _fit_generate": (SeparateRayPPOTrainer._fit_generate, "0cd47478a913"),
    "darts.training.trainer: _fit_save_checkpoint": (SeparateRayPPOTrainer._fit_save_checkpoint, "993b881cb26d"),
    "darts.training.trainer: _stop_profiling": (SeparateRayPPOTrainer._fit_stop_profile, "2045c7fb955c"),
    "darts.rollout: _postprocess": (AgentLoopWorker._postprocess, "ea9a728fad78"),
    "darts.rollout: _agent_loop_postprocess": (AgentLoopWorker._agent_loop_postprocess, "2a943f406221"),
    "darts.rollout: pool rewards": (AgentLoopWorker._compute_score, "3d35bd85469e"),
    "recipe.darts.main_darts: DartsTaskRunner.run": (
        main_ppo_v0.TaskRunner.__ray_metadata__.modified_class.run,
        "d944634cb429",
    ),
    "recipe.darts.main_darts: main": (main_ppo.main.__wrapped__, "eb706c4f6622"),
    "darts.rollout: gather, then _postprocess": (AgentLoopWorker.generate_sequences, "aaf4c62352a5"),
    "darts.rollout: run, then _agent_loop_postprocess": (AgentLoopWorker._run_agent_loop, "afb90a4a1233"),
    "darts.rollout: manager's result": (AgentLoopManager.generate_sequences.__wrapped__.__wrapped__, "2ccbeaeed391"),
}


@pytest.mark.parametrize("who", TEXTS)
def test_text_of_what_is_replaced_or_imitated(who):
    symbol, pinned = TEXTS[who]
    assert digest(symbol) == pinned, f"{who}: {symbol.__qualname__} of verl changed"


def test_the_separate_trainer_is_a_ray_ppo_trainer_with_the_steps_in_order():
    assert issubclass(SeparateRayPPOTrainer, RayPPOTrainer)
    source = inspect.getsource(SeparateRayPPOTrainer.fit_step)
    order = ["_fit_generate", "_fit_update_actor", "_fit_update_weights", "_fit_validate", "_fit_save_checkpoint"]
    positions = [source.index(f"self.{name}(") for name in order]
    assert positions == sorted(positions)


def test_the_vllm_backend_is_known_by_the_name_that_is_checked():
    assert RolloutReplicaRegistry.get("vllm").__name__ == "vLLMReplica"


def test_an_agent_loop_and_its_postprocess_get_the_same_keyword_arguments_in_one_task():
    """`_run_agent_loop` hands on what it got, so a candidate can be known by contextvar in both."""
    source = inspect.getsource(AgentLoopWorker._run_agent_loop)
    assert "await agent_loop.run(sampling_params, **kwargs)" in source
    assert 'await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)' in source


def test_a_score_that_is_there_is_not_computed_again():
    """`darts.reward.pool` scores before the decision; verl's own postprocess must then leave it."""

    class Worker(AgentLoopWorker):
        def __init__(self):
            self.reward_loop_worker_handles = ["would fail if it were called"]

    output = AgentLoopOutput(prompt_ids=[1], response_ids=[2], response_mask=[1], metrics={}, reward_score=0.5)
    asyncio.run(Worker()._compute_score([output], kwargs={}))
    assert output.reward_score == 0.5


def test_union_fails_if_rows_of_the_rollout_are_in_another_order():
    """The join by uid that verl itself asserts, because the rollout returns `uid`."""

    def rows(order):
        return DataProto(
            batch=TensorDict({"x": torch.zeros(2)}, batch_size=2),
            non_tensor_batch={"uid": np.array(order, dtype=object)},
        )

    rows(["a", "b"]).union(rows(["a", "b"]))
    with pytest.raises(AssertionError, match="uid"):
        rows(["a", "b"]).union(rows(["b", "a"]))


def test_the_single_turn_loop_passes_sampling_params_and_priority_on():
    source = inspect.getsource(SingleTurnAgentLoop.run)
    assert "sampling_params=sampling_params" in source
    assert "priority=priority" in source


def test_the_server_respects_a_seed_of_the_request():
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    source = inspect.getsource(vLLMHttpServer.generate)
    assert 'sampling_params.setdefault("seed"' in source
    assert "SamplingParams(max_tokens=max_tokens, **sampling_params)" in source
    assert "self.config.prompt_length + self.config.response_length - len(prompt_ids)" in source


def test_token_output_has_the_fields_that_agent_loops_read():
    assert {"token_ids", "log_probs", "stop_reason", "num_preempted", "extra_fields"} <= set(TokenOutput.model_fields)


def test_rollout_skip_wraps_a_manager_method_of_one_batch():
    """Dump and replay works for the DARTS manager because it carries the same decorator."""
    from darts.rollout.manager import DartsAgentLoopManager

    assert DartsAgentLoopManager._generate_groups.__wrapped__.__name__ == "_generate_groups"
    assert SkipManager._should_bypass_for_validation((None, DataProto(meta_info={"validate": True})), {})


def test_spec_decode_metrics_take_missing_columns():
    assert ray_trainer.compute_spec_decode_metrics(None, None, None) == {}


def test_the_file_that_names_the_last_checkpoint():
    """`darts.evidence.checkpoint.finished_at` and `darts.report.summary` read it."""
    assert get_checkpoint_tracker_filename("out") == f"out/{TRACKER}"
