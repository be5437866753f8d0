"""Ranks of a real FSDP group in processes of their own, each with an `OverlappedActorWorker`, without Ray.

Every command runs on all ranks at once, as verl's worker group would run it. `full` is what the results are compared
with: verl's own `infer_batch` of the same engine, fed as `RayPPOTrainer._compute_old_log_prob` feeds it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import vision

from verl_patches.device import is_cpu_only

ANSWER_S = 900
VOCABULARY = 300

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    # cannot be continued from keys and values
    "hybrid": (
        "Qwen3NextConfig",
        {
            "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
            "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        },
    ),
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    """Writes a random model, unless it is there; its logits are of the size that a trained model's are."""
    import torch
    import transformers

    path = folder / name
    if not path.exists() and name in vision.MODELS:
        vision.make_model(name, path)
    elif not path.exists():
        kind, sizes = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**(_SIZES | sizes))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def _allow_cpu() -> None:
    """What torch's FSDP1 does not do without an accelerator, left out of verl's engine: sending rank 0's weights to
    the others at the start (each rank reads them instead), offloading those of a reference, and moving weights to the
    device that is asked for by number before a checkpoint."""
    from verl.workers.engine.fsdp import transformer_impl as target

    class Fsdp(target.FSDP):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings | {"sync_module_states": False, "cpu_offload": None})

    def load_fsdp_model_to_gpu(model, upstream=target.load_fsdp_model_to_gpu):
        if not isinstance(model, Fsdp):
            upstream(model)

    target.load_fsdp_model_to_gpu = load_fsdp_model_to_gpu
    target.FSDP = Fsdp
    target.get_init_weight_context_manager = lambda **settings: nullcontext


class Rank:
    """What runs in the process of a rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.worker = None

    def build(
        self, path, strategy="fsdp2", dtype="fp32", lora_rank=0, with_reference=False, param_offload=False,
        attention="sdpa", overrides=(),
    ):  # fmt: skip
        """An actor, whose weights then move away from the reference's."""
        import torch
        from compositions import composed_by_verl

        from verl_patches.dp_actor import OverlappedActorWorker

        precision = f"{{param_dtype: {dtype}, reduce_dtype: fp32, buffer_dtype: fp32}}"
        engines = [
            f"++actor_rollout_ref.{role}.{setting}"
            for role in ("actor", "ref")
            for setting in (
                f"strategy={strategy}",
                "use_torch_compile=false",
                "fsdp_config.model_dtype=fp32",
                "fsdp_config.use_torch_compile=false",
                f"fsdp_config.mixed_precision={precision}",
            )
        ]
        config = composed_by_verl(
            f"actor_rollout_ref.model.path={path}",
            "+actor_rollout_ref.model.load_tokenizer=false",
            f"+actor_rollout_ref.model.override_config.attn_implementation={attention}",
            "actor_rollout_ref.model.use_remove_padding=false",
            "actor_rollout_ref.model.enable_gradient_checkpointing=false",
            f"actor_rollout_ref.model.lora_rank={lora_rank}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
            f"actor_rollout_ref.actor.fsdp_config.param_offload={param_offload}",
            *engines,
            *overrides,
        ).actor_rollout_ref
        self.worker = OverlappedActorWorker(config, role="actor")
        self.worker.role = "actor_ref" if with_reference else "actor"  # no rollout
        self.worker.init_model()
        generator = torch.Generator().manual_seed(1)
        for parameter in self.worker.actor.engine.module.parameters():
            if parameter.requires_grad and (lora_rank or with_reference):
                step = (0.01 if lora_rank else 0.1) * (1 + torch.rand(1, generator=generator).item())
                parameter.data.add_(step) if lora_rank else parameter.data.mul_(1 + step)
        return type(self.worker.actor.engine).__name__

    def call(self, method, *args):
        """An RPC of the worker."""
        return getattr(self.worker, method)(*args)

    def full(self, sequences, temperature, *, pad=0, micro_batch=1, reference=False, images=None):
        """As `RayPPOTrainer._compute_old_log_prob` and `_compute_ref_log_prob`, of (tokens, prompt tokens), with the
        layout that the trainer has after generation, and `pad` columns more. `images` of each sequence become what the
        agent loop's padding gives a vision model."""
        import torch
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

        prompt = max(prompt for _, prompt in sequences) + pad
        response = max(1, *(len(tokens) - prompt for tokens, prompt in sequences)) + pad
        ids = torch.zeros(len(sequences), prompt + response, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (tokens, start) in enumerate(sequences):
            where = slice(prompt - start, prompt - start + len(tokens))
            ids[row, where] = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
            mask[row, where] = 1
        data = TensorDict(
            {
                "prompts": ids[:, :prompt], "responses": ids[:, prompt:], "input_ids": ids, "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "response_mask": mask[:, prompt:],
            },
            batch_size=[len(sequences)],
        )  # fmt: skip
        if images is not None:
            # Of rows that are all equally long verl 0.9.1 loses the positions; tests/contract/test_vision_hooks.py.
            assert len({len(tokens) for tokens, _ in sequences}) > 1, "nothing to compare with"
            maker = vision.Maker(self.worker.actor.model_config.hf_config.model_type)
            inputs, positions = [], []
            for row, (tokens, start) in enumerate(sequences):
                output = maker.output(tokens, start, images[row])
                inputs.append(maker._compute_multi_modal_inputs(output, ids[row : row + 1]))
                positions.append(
                    maker._compute_position_ids(ids[row : row + 1], mask[row : row + 1], inputs[row])
                )  # [1, 4, prompt + response]
            data["position_ids"] = torch.cat(positions)
            tu.assign_non_tensor_stack(data, "multi_modal_inputs", inputs)
        data = left_right_2_no_padding(data)
        worker = self.worker.actor
        settings = {"calculate_entropy": not reference, "calculate_sum_pi_squared": not reference}
        if reference and self.worker.ref is None:
            settings["no_lora_adapter"] = True
        elif reference:
            worker = self.worker.ref
        tu.assign_non_tensor(
            data, **settings, temperature=temperature, compute_loss=False, use_dynamic_bsz=False,
            micro_batch_size_per_gpu=micro_batch,
        )  # fmt: skip
        output = worker.infer_batch(data)
        lengths = [len(tokens) - start for tokens, start in sequences]
        names = {"log_probs": "ref_log_prob"} if reference else {"log_probs": "old_log_probs", "entropy": "entropys"}
        if not reference:
            names["sum_pi_squared"] = "sum_pi_squared"
        padded = {ours: no_padding_2_padding(tu.get(output, name), data).float() for name, ours in names.items()}
        return [
            {name: values[row, :length].numpy() for name, values in padded.items()}
            for row, length in enumerate(lengths)
        ]

    def run(self, function, *args):
        """Any function of the test's, called with this rank."""
        return function(self, *args)


def _serve(connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    import torch
    import verl  # noqa: F401  (its plugins set the platform)

    torch.set_num_threads(1)
    if is_cpu_only():
        _allow_cpu()
    here = Rank(rank)
    while True:
        command = connection.recv()
        if command is None:
            return
        method, args, settings = command
        try:
            connection.send((getattr(here, method)(*args, **settings), None))
        except Exception as error:
            connection.send((None, (type(error).__name__, str(error), traceback.format_exc())))


class RankError(Exception):
    """What a rank raised."""


class Ranks:
    """The processes; each command goes to all of them."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        if is_cpu_only():  # once for all; a process that has asked for CUDA cannot be forked
            context.set_forkserver_preload(["hydra", "verl_patches.dp_actor", "transformers.models.auto"])
        self._ends, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def each(self, method, arguments, **settings):
        """One tuple of arguments for each rank; the answers."""
        for end, args in zip(self._ends, arguments, strict=True):
            end.send((method, args, settings))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(ANSWER_S):
                raise TimeoutError(f"rank {rank} has not answered {method} after {ANSWER_S} s")
            answers.append(end.recv())
        failed = [f"{kind}: {text}\n{trace}" for _, (kind, text, trace) in (a for a in answers if a[1])]
        if failed:
            raise RankError("\n".join(failed))
        return [answer for answer, _ in answers]

    def all(self, method, *args, **settings):
        """The same arguments for all ranks."""
        return self.each(method, [args] * self.size, **settings)

    def build(self, model: str, **settings) -> None:
        self.all("build", str(make_model(model, self.folder)), **settings)

    def stop(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(60)
            if process.is_alive():
                process.terminate()


@contextmanager
def ranks(size: int, folder: Path):
    group = Ranks(size, folder)
    try:
        yield group
    finally:
        group.stop()
