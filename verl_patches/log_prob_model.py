"""verl's FSDP engine, continuing sequences of which it has seen the beginning; and one model as the overlapped actor
uses it: complete sequences through verl's own path, growing ones through cached prefixes.

Contract:
1. `OverlapEngine` is `verl.workers.engine.fsdp.FSDPEngineWithLMHead` (verl 0.9.1); only a micro-batch that carries a
   `PrefixBatch` gets other inputs than upstream's, and its outputs are computed by upstream's code.
2. `LogProbModel` makes no difference between actor and reference but the adapter, the entropy and the names.
3. Every method runs collectives of the FSDP group: all ranks call it equally often, with rows or with company.
4. A model with a processor, or of which parts see or hear, never continues prefixes and has no cache. Its complete
   sequences go through verl's path with the positions and multimodal inputs that verl gives them.
5. `refusal` is the same on all ranks. It is None only if the model has given, in this process, the same log-probs for
   two sequences as a whole and in pieces: a model that nobody thought of is refused, not computed wrongly.

`register_engine()` puts the engine in the place of upstream's in this process, for language models on fsdp and fsdp2.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PretrainedConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker

from darts.messages import Extras
from verl_patches.prefix_cache import Geometry, Prefix, PrefixBatch
from verl_patches.row_extras import text_extras

BACKENDS = ("fsdp", "fsdp2")
_BATCH = "prefix_batch"  # the marker of a micro-batch that continues prefixes

CHECKED_PIECES = ((9, 1, 6, 8), (3, 10, 1, 2))
"""Tokens of the pieces of the two sequences that the check of a model runs."""

ANY_TOKENS = 1 << 40
"""More than a forward has. verl makes as few micro-batches as its limit of tokens allows, equally many on all ranks."""

FIXED_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}
"""Kinds of RoPE whose frequencies are those of the configuration. Others, as `dynamic` and `longrope`, choose them by
the longest sequence of each forward: keys that are cached would have other frequencies than those beside them."""


class OverlapEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine for language models; see invariant 1 of the module."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        prefix_batch: PrefixBatch | None = tu.get_non_tensor_data(data=micro_batch, key=_BATCH, default=None)
        if prefix_batch is None:
            return super().prepare_model_inputs(micro_batch)
        temperature = float(micro_batch["temperature"])
        model_inputs = {
            "input_ids": prefix_batch.input_ids,
            "attention_mask": prefix_batch.attention_mask,
            "position_ids": prefix_batch.position_ids,
            "past_key_values": prefix_batch.cache,
        }
        output_args = {
            "temperature_is_one": temperature == 1.0,
            "temperature": torch.full((len(prefix_batch.lengths),), temperature, device=prefix_batch.input_ids.device),
            "input_ids_rmpad_rolled": prefix_batch.labels,
        }
        return model_inputs, output_args

    def continue_prefixes(self, batch: PrefixBatch, **forward_settings: Any) -> dict[str, torch.Tensor]:
        """One forward of upstream's; returns its outputs by verl's names, each [sum of n_b]."""
        new_tokens = torch.nested.as_nested_tensor(  # jagged [rows, n_b]
            [row_ids[: int(num_tokens)] for row_ids, num_tokens in zip(batch.input_ids, batch.lengths, strict=True)],
            layout=torch.jagged,
        )
        micro_batch = TensorDict({"input_ids": new_tokens}, batch_size=[len(batch.lengths)])
        tu.assign_non_tensor(
            micro_batch, **{_BATCH: batch}, **forward_settings, use_remove_padding=False, use_fused_kernels=False
        )
        with torch.no_grad(), torch.profiler.record_function("continue_prefixes"):
            _, output = self.forward_step(micro_batch, loss_function=None, forward_only=True)
        return {output_name: output_values.values() for output_name, output_values in output["model_output"].items()}


def register_engine() -> None:
    """Makes verl build `OverlapEngine`s in this process; an engine that another plugin has put there is left as it is.

    verl looks for an engine of the vendor first, and registers its own for all vendors.
    """
    device_name = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor_name = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    for backend in BACKENDS:
        if EngineRegistry.get_engine_cls("language_model", backend) is FSDPEngineWithLMHead:
            EngineRegistry.register("language_model", backend, device_name, vendor_name)(OverlapEngine)
            found = EngineRegistry.get_engine_cls("language_model", backend)
            if found is not OverlapEngine:
                raise RuntimeError(f"verl builds {found.__name__} for {backend} although OverlapEngine is registered")


class LogProbModel:
    """The actor, or the reference, as it is asked for log-probs."""

    def __init__(self, worker: TrainingWorker, output_names: dict[str, str], *, adapter: bool = True) -> None:
        """`output_names`: results by verl's names of the model's outputs, as {"log_probs": "old_log_probs"}."""
        self.worker = worker
        self.engine: FSDPEngineWithLMHead = worker.engine
        self.names = output_names
        self.adapter = adapter
        self.geometry: Geometry | None = None
        self._refusal: str | None = None
        self._images_checked = False
        self._images_refusal: str | None = None

    @property
    def _text_config(self) -> PretrainedConfig:
        return plain_model(self.engine.module).config.get_text_config(decoder=True)

    @property
    def gathered_bytes(self) -> int:
        """An estimate of what FSDP gathers at once: the embeddings and two layers, or everything. 0 for the actor
        without its adapter."""
        if not self.adapter:
            return 0
        engine = self.engine
        world_size = torch.distributed.get_world_size()
        size = engine.engine_config.fsdp_size
        num_elements = sum(shard.numel() for shard in self._shards()) * (size if 0 < size < world_size else world_size)
        root_elements = min(num_elements, 2 * self._text_config.vocab_size * self._text_config.hidden_size)
        if engine.engine_config.reshard_after_forward:
            num_elements = root_elements + 2 * (num_elements - root_elements) // self._text_config.num_hidden_layers
        return num_elements * engine._autocast_dtype.itemsize

    @property
    def optimizer_bytes(self) -> int:
        """The state that the optimizer will make with its first step, on the device: two moments of each trained
        parameter, as Adam's. 0 once it is there, where it is offloaded, and for a reference."""
        engine = self.engine
        optimizer = getattr(engine, "optimizer", None)
        if optimizer is None or optimizer.state or engine.is_optimizer_offload_enabled:
            return 0
        return 2 * sum(shard.nbytes for shard in self._shards(trained=True))

    def _shards(self, trained: bool = False) -> list[torch.Tensor]:
        """This rank's parts of the parameters."""
        all_parameters = self.engine.module.parameters()
        return [
            getattr(parameter, "_local_tensor", parameter)
            for parameter in all_parameters
            if parameter.requires_grad or not trained
        ]

    def whole(
        self, token_rows: Sequence[np.ndarray], temperature: float, extras: Sequence[Extras] = ()
    ) -> np.ndarray | None:
        """Outputs for complete sequences through verl's own `infer_batch`, in one micro-batch.

        They are float32 [outputs, sum of tokens], where each token's are those of its successor; None on a rank whose
        outputs verl does not use. `extras` are of all sequences, as values and with equally many layers, or of none.
        """
        row_data = jagged_rows(token_rows, extras)
        tu.assign_non_tensor(
            row_data, **self._settings(temperature), compute_loss=False, use_dynamic_bsz=True,
            max_token_len_per_gpu=ANY_TOKENS, disable_auto_offload=True, no_lora_adapter=not self.adapter,
        )  # fmt: skip
        model_output = self.worker.infer_batch(row_data)
        if model_output is None:
            return None
        return self._gather({name: tu.get(model_output, name).values() for name in self.names}).cpu().numpy()

    def images_refusal(self, position_layers: int) -> str | None:
        """Why a rank cannot forward images while another has none; None: it can. Found out once, by all ranks together:
        a forward without images must enter all that FSDP gathers, or the collectives of the two ranks do not match.
        """
        if not self._images_checked and torch.distributed.get_world_size() > 1:
            self._images_checked = True
            forward_hooks, missed = [], set()
            for name, module in self.engine.module.named_modules():
                if isinstance(module, FullyShardedDataParallel | FSDPModule):
                    missed.add(name)
                    forward_hooks.append(module.register_forward_pre_hook(lambda *_, name=name: missed.discard(name)))
            self.whole([np.zeros(2, dtype=np.int64)], 1.0, [text_extras(2, position_layers)])
            for hook in forward_hooks:
                hook.remove()
            if missed:
                model_name = type(plain_model(self.engine.module)).__name__
                self._images_refusal = f"a forward of {model_name} without images leaves out {min(missed)}"
        return self._images_refusal

    def growing(self, prefix_batch: PrefixBatch, temperature: float) -> torch.Tensor:
        """Outputs for the new tokens of a batch, on the device; float32 [outputs, sum of n_b]."""
        adapter_context = nullcontext() if self.adapter else self.engine.disable_adapter()
        with self.engine.eval_mode(disable_auto_offload=True), adapter_context:
            return self._gather(self.engine.continue_prefixes(prefix_batch, **self._settings(temperature)))

    def batch(self, prefixes: Sequence[Prefix], inputs: list[np.ndarray], labels: list[np.ndarray]) -> PrefixBatch:
        """For `growing`."""
        return PrefixBatch(self.geometry, prefixes, inputs, labels, get_device_id())

    def refusal(self) -> str | None:
        """Why the model cannot continue prefixes; None: it can. Found out once, by all ranks together."""
        if self.geometry is None and self._refusal is None:
            self._refusal = self._unsupported() or self._check()
            if self._refusal is not None:
                self.geometry = None
        return self._refusal

    def _settings(self, temperature: float) -> dict[str, Any]:
        return {
            "temperature": temperature,
            "calculate_entropy": "entropy" in self.names,
            "calculate_sum_pi_squared": "sum_pi_squared" in self.names,
        }

    def _gather(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([outputs[output_name].float() for output_name in self.names])

    def _unsupported(self) -> str | None:
        """What is known without a forward."""
        engine = self.engine
        if not isinstance(engine, OverlapEngine):
            return f"the engine is {type(engine).__name__}, not OverlapEngine"
        if engine.ulysses_sequence_parallel_size > 1:
            return f"ulysses_sequence_parallel_size={engine.ulysses_sequence_parallel_size} splits sequences over ranks"
        if engine.model_config.use_fused_kernels:
            return "use_fused_kernels=True computes log-probs without logits"
        text_model = plain_model(engine.module)
        config = text_model.config
        is_multimodal = hasattr(config, "vision_config") or hasattr(config, "audio_config")
        if is_multimodal or engine.model_config.processor is not None:
            return f"{type(config).__name__} is multimodal"
        text_config = self._text_config
        if config.is_encoder_decoder or getattr(text_model, "_is_stateful", False):
            return f"{config.model_type} keeps a state that is no cache of keys and values"
        kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            return f"{config.model_type} has layers of the kind {', '.join(sorted(kinds))}"
        kinds = _rope_kinds(text_config) - FIXED_ROPE
        if kinds:
            return (
                f"{config.model_type} has RoPE of the kind {', '.join(sorted(kinds))}, whose frequencies may depend on "
                "the longest sequence of a forward"
            )
        if getattr(text_config, "num_kv_shared_layers", 0):
            return f"{config.model_type} has layers that share keys and values"
        if "past_key_values" not in inspect.signature(text_model.forward).parameters:
            return f"{type(text_model).__name__}.forward takes no past_key_values"
        return None

    def _check(self) -> str | None:
        """Runs two sequences as a whole, together and alone, and in pieces.

        The mean difference of the pieces must be within what rounding explains: that of the two ways to run them as a
        whole, and the precision of the numbers.
        """
        random_generator = np.random.default_rng(0)
        vocabulary_size = self._text_config.vocab_size
        token_rows = [random_generator.integers(0, vocabulary_size, sum(pieces) + 1) for pieces in CHECKED_PIECES]
        row_ends = np.cumsum([len(token_ids) for token_ids in token_rows])
        # Log-probs, one row after the other; the last token of a row has no successor.
        whole_together = np.delete(self.whole(token_rows, 1.0)[0], row_ends - 1)
        whole_alone = np.concatenate([self.whole([token_ids], 1.0)[0, :-1] for token_ids in token_rows])
        reason = None
        try:
            in_pieces = np.concatenate([piece_outputs[0] for piece_outputs in self._in_pieces(token_rows)])
        except Exception as error:  # all ranks run the same tokens and fail alike
            reason = f"continuing a prefix failed: {error!r}"
        else:
            rounding_noise = float(np.abs(whole_together - whole_alone).mean())
            difference = float(np.abs(in_pieces - (whole_together + whole_alone) / 2).mean())
            dtype_precision = torch.finfo(self.engine._autocast_dtype).eps
            allowed = 1e-4 + 4 * rounding_noise + dtype_precision * float(np.abs(whole_together).mean())
            if not difference <= allowed:
                reason = f"log-probs in pieces are off by {difference:.3g} nats on average, allowed are {allowed:.3g}"
        any_failed = largest_of_all_ranks(reason is not None)[0]
        return "another rank cannot" if any_failed and reason is None else reason

    def _in_pieces(self, token_rows: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [outputs, tokens - 1] of each sequence; learns the geometry on the way."""
        first_pieces = [tokens[: pieces[0]] for tokens, pieces in zip(token_rows, CHECKED_PIECES, strict=True)]
        batch = self.batch([Prefix() for _ in first_pieces], first_pieces, first_pieces)  # without a geometry yet
        self.growing(batch, 1.0)
        self.geometry = Geometry.of(batch.cache, self._text_config.num_hidden_layers, int(batch.lengths.max()))

        prefixes = [Prefix() for _ in token_rows]
        row_outputs: list[list[np.ndarray]] = [[] for _ in token_rows]
        for piece_lengths in zip(*CHECKED_PIECES, strict=True):
            pieces = [  # the inputs, and the token that follows
                tokens[prefix.tokens : prefix.tokens + num_tokens + 1]
                for tokens, prefix, num_tokens in zip(token_rows, prefixes, piece_lengths, strict=True)
            ]
            batch = self.batch(prefixes, [tokens[:-1] for tokens in pieces], [tokens[1:] for tokens in pieces])
            for result, values in zip(row_outputs, batch.split(self.growing(batch, 1.0).cpu().numpy()), strict=True):
                result.append(values)
            batch.keep(range(len(token_rows)))
        return [np.concatenate(result, axis=1) for result in row_outputs]


def largest_of_all_ranks(*rank_counts: int) -> list[int]:
    """The largest of each number over all ranks, also those that share sequences (Ulysses): each may refuse."""
    largest_counts = torch.tensor(rank_counts, dtype=torch.int64, device=get_device_name())
    torch.distributed.all_reduce(largest_counts, op=torch.distributed.ReduceOp.MAX)
    return largest_counts.tolist()


def jagged_rows(token_rows: Sequence[np.ndarray], extras: Sequence[Extras] = ()) -> TensorDict:
    """Rows as `verl.workers.utils.padding.left_right_2_no_padding` gives them; for the arguments see
    `LogProbModel.whole`."""
    row_lengths = torch.tensor([len(token_ids) for token_ids in token_rows])
    row_offsets = torch.nn.functional.pad(row_lengths.cumsum(0), (1, 0))
    token_ids = torch.from_numpy(np.concatenate(token_rows).astype(np.int64))
    row_positions = [
        row_extra.position_ids for row_extra in extras or [text_extras(len(token_ids)) for token_ids in token_rows]
    ]
    position_ids = torch.from_numpy(np.concatenate(row_positions, axis=1).astype(np.int64))  # [layers, sum of tokens]
    flat = {"values": position_ids[0]} if len(position_ids) == 1 else {"values": position_ids, "jagged_dim": 2}
    row_data = TensorDict(
        {
            "input_ids": torch.nested.nested_tensor_from_jagged(token_ids, row_offsets),
            "position_ids": torch.nested.nested_tensor_from_jagged(offsets=row_offsets, **flat),
            "loss_mask": torch.ones(len(token_rows), 1, dtype=torch.int64),  # verl sums it for losses, of which none
        },
        batch_size=[len(token_rows)],
    )
    if extras:
        tu.assign_non_tensor_stack(
            row_data, "multi_modal_inputs", [row_extra.multi_modal_inputs for row_extra in extras]
        )
    return row_data


def _rope_kinds(model_config: PretrainedConfig) -> set[str]:
    """All that a configuration names, for the model or for each kind of layers, in today's form or the older one."""
    rope_kinds = set()
    for setting_name in ("rope_parameters", "rope_scaling"):
        rope_settings = getattr(model_config, setting_name, None) or {}
        for part_settings in (rope_settings, *(value for value in rope_settings.values() if isinstance(value, dict))):
            rope_kinds |= {part_settings[kind_key] for kind_key in ("rope_type", "type") if part_settings.get(kind_key)}
    return rope_kinds


def plain_model(module: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside FSDP and an adapter."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module
