"""The overlapped actor: log-probs and entropies of responses that are still being generated.

Contract. `OverlappedActorWorker` is `verl.workers.engine_workers.ActorRolloutRefWorker` (verl 0.9.1) with four RPCs
more, which act on records of `darts.messages`. From `overlap_open` to `overlap_clear` the weights must not change.

1. The results are those of a full forward of verl's engine over the complete sequence. When k tokens of a sequence are
   known, the tokens 1 .. k-1 have log-probs; the last known one is forwarded with the first that follows it.
2. A sequence lives on one data-parallel rank, named by its key. Rows must arrive in order and gapless. What does not
   fit what the rank knows, is out of order or of another step raises on all ranks at once, and changes nothing.
3. All ranks run each forward of a call, or none does; before it they agree on which there are. The whole rows of a call
   are one micro-batch on each rank, however many: who calls bounds them. A rank without rows runs a company of two
   tokens, which has no key and leaves no trace.
4. A dropped or restarted sequence has no prefix any more before the call's rows take room, a finished one when the call
   returns. `cache_bytes` is exact; so is the peak, the padded batch of a forward included. Prefixes merge their chunks
   when the batch is gone, which needs less than the batch did.
5. Whole rows go through verl's own `infer_batch`, with the extras that they bring: rows with images beside rows and
   ranks without. Of a model that verl cannot run so (no dummy image for text) they are left out, said once, and verl
   computes them after generation.
6. Nothing survives `overlap_open` but what the check has found out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from verl.single_controller.base.decorator import Dispatch, dispatch_nd_compute, register
from verl.single_controller.base.worker_group import WorkerGroup
from verl.utils.device import get_device_name, get_torch_device
from verl.workers.engine_workers import TrainingWorker

from darts.messages import Extras, RankAbility, RankCall, RankReport, RankResults, Row, SequenceKey, StepSettings
from verl_patches.log_prob_model import LogProbModel, largest_of_all_ranks, register_engine
from verl_patches.patches import patch_forward_without_images
from verl_patches.placement import PlacedActorWorker
from verl_patches.prefix_cache import Prefix
from verl_patches.row_extras import completed, fetch_extras, layers_of

MESH = "actor"
COMPANY = np.zeros(2, dtype=np.int64)
"""Tokens of a rank that has no rows."""
NAMES = {"log_probs": "old_log_probs", "entropy": "entropys"}
"""The actor's results, by verl's names of the model's outputs."""


@dataclass(slots=True)
class _Sequence:
    """What a rank knows of a sequence."""

    prompt_tokens: int
    prefixes: list[Prefix]  # of the actor and, where asked for, of the reference
    known: int = 0  # tokens that came
    tail: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # known, not forwarded: 0 or 1 token
    finished: bool = False
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)  # of response tokens, float32, in pieces

    @property
    def forwarded(self) -> int:
        return self.known - len(self.tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """New tokens of a sequence for a forward, and the tokens that follow each of them."""

    sequence: _Sequence
    inputs: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]
    begin: int  # of the labels, which of them is the response's first
    last: bool


class RankSession:
    """One rank's sequences of one step."""

    def __init__(self, actor_worker: TrainingWorker, ref: TrainingWorker | None, lora: bool) -> None:
        """`ref`: the reference in the same process; without one, `lora` says that the actor without adapter is it."""
        self._actor_worker = actor_worker
        self._actor = LogProbModel(actor_worker, NAMES)
        self._ref: LogProbModel | None = None
        if ref is not None or lora:
            self._ref = LogProbModel(ref or actor_worker, {"log_probs": "ref_log_prob"}, adapter=ref is not None)
        self._images_refused = False
        self._forget(None)

    def open(self, step_settings: StepSettings) -> RankAbility:
        """See `OverlappedActorWorker.overlap_open`."""
        if step_settings.mode not in ("sequence", "token"):
            raise ValueError(f"mode={step_settings.mode!r} is neither 'sequence' nor 'token'")
        if step_settings.with_reference and self._ref is None:
            raise ValueError("with_reference=True needs a reference in the actor's process: a fused one, or LoRA")
        self._forget(step_settings)
        self._actor.names = NAMES | ({"sum_pi_squared": "sum_pi_squared"} if step_settings.sum_pi_squared else {})
        self._models = [self._actor, *([self._ref] if step_settings.with_reference else [])]
        self._each_engine(get_device_name())
        bytes_per_token = 0
        if step_settings.mode == "token":
            self._refusal = next(filter(None, (model.refusal() for model in self._models)), None)
            if self._refusal is None:
                bytes_per_token = sum(model.geometry.bytes_per_token for model in self._models)
        torch_device = get_torch_device()
        free_bytes, device_bytes = torch_device.mem_get_info()
        return RankAbility(
            refusal=self._refusal,
            bytes_per_token=bytes_per_token,
            device_bytes=device_bytes,
            free_bytes=free_bytes + torch_device.memory_reserved() - torch_device.memory_allocated(),
            gathered_bytes=max(model.gathered_bytes for model in self._models),
            optimizer_bytes=self._actor.optimizer_bytes,
        )

    def extend(self, call: RankCall) -> RankReport:
        """See `OverlappedActorWorker.overlap_extend`."""
        start_time = time.time()
        # 1. One exchange tells each rank what company it owes the others, and whether the call is refused.
        refusal, extras = self._check(call), []
        if refusal is None:
            refusal, extras = fetch_extras(call.whole)
        num_unseen = sum(len(row.token_ids) > (row.start == 0) for row in call.growing)  # with something to forward
        any_refused, any_whole, any_unseen, position_layers = largest_of_all_ranks(
            refusal is not None, len(call.whole), num_unseen, layers_of(extras)
        )
        if any_refused:
            raise RuntimeError(refusal or "another rank has refused this call")

        # 2. What is dropped or begins anew makes room, then the rows are admitted.
        self._number += 1
        for sequence_key in (*call.drop, *(row.key for row in (*call.whole, *call.growing) if not row.start)):
            self._drop(sequence_key)
        whole_rows, extras = self._usable(call.whole, extras, position_layers)
        whole_works = [self._admit(row) for row in whole_rows]
        growing_works = [self._admit(row) for row in call.growing]
        num_tokens = sum(len(row.token_ids) for row in whole_rows) + sum(len(work.inputs) for work in growing_works)

        # 3. The forwards, in which all ranks take part.
        if any_whole:
            sequences = [row.token_ids for row in whole_rows] or [COMPANY]
            self._forward_whole(whole_works, sequences, completed(sequences, extras, position_layers))
        if any_unseen:
            self._forward_growing([work for work in growing_works if len(work.inputs)])
        for work in [*whole_works, *growing_works]:
            if work.last:
                work.sequence.finished = True
                work.sequence.prefixes = []
        self._peak_bytes = max(self._peak_bytes, self.cache_bytes)
        return RankReport(
            began=start_time, ended=time.time(), tokens=num_tokens, cache_bytes=self.cache_bytes,
            peak_cache_bytes=self._peak_bytes,
        )  # fmt: skip

    def collect(self, step: int, keys: list[SequenceKey]) -> RankResults:
        """See `OverlappedActorWorker.overlap_collect`."""
        self._check_step(step)
        output_names = [name for model in self._models for name in model.names.values()]
        no_values = [np.empty(0, dtype=np.float32)]
        values = {}
        for key in keys:
            sequence = self._sequences.get(key)
            if sequence is not None and sequence.finished:
                values[key] = {name: np.concatenate(no_values + sequence.values.get(name, [])) for name in output_names}
        return RankResults(values=values, mfu=self._mfu())

    def clear(self, step: int) -> None:
        """See `OverlappedActorWorker.overlap_clear`."""
        if self._settings is None:
            return
        self._check_step(step)
        self._each_engine("cpu")
        self._forget(None)
        get_torch_device().empty_cache()

    @property
    def cache_bytes(self) -> int:
        """The bytes of all prefixes."""
        return sum(prefix.nbytes for known_sequence in self._sequences.values() for prefix in known_sequence.prefixes)

    def _forget(self, step_settings: StepSettings | None) -> None:
        self._settings = step_settings
        self._models: list[LogProbModel] = []
        self._refusal: str | None = None
        self._sequences: dict[SequenceKey, _Sequence] = {}
        self._number = 0  # of the next call
        self._peak_bytes = 0
        self._busy_s = 0.0  # of the actor's forwards
        self._dropped_lengths: list[int] = []  # forwarded tokens of dropped sequences
        self._image_patches: list[int] = []  # of each image that was forwarded

    def _each_engine(self, target_device: str) -> None:
        """Moves parameters where verl would move them for each forward."""
        for engine in {id(model.engine): model.engine for model in self._models}.values():
            if engine.is_param_offload_enabled:
                engine.to(target_device, model=True, optimizer=False, grad=False)

    def _other_step(self, step: int) -> str | None:
        """Why a call of this step is refused; None: it is not."""
        open_step = None if self._settings is None else self._settings.step
        return None if step == open_step else f"a call of step {step} came, the actor is open for step {open_step}"

    def _check_step(self, step: int) -> None:
        if (refusal := self._other_step(step)) is not None:
            raise RuntimeError(refusal)

    def _check(self, rank_call: RankCall) -> str | None:
        """Why the call is refused; nothing is changed by then. None: it is not."""
        if (refusal := self._other_step(rank_call.step)) is not None:
            return refusal
        if rank_call.number != self._number:
            return f"call {rank_call.number} of step {rank_call.step} came, call {self._number} is next"
        if rank_call.growing and (self._settings.mode != "token" or self._refusal is not None):
            refusal_reason = self._refusal or f"the step's mode is {self._settings.mode}"
            return f"growing sequences came, but {refusal_reason}"
        all_rows = rank_call.whole + rank_call.growing
        if len({row.key for row in all_rows}) != len(all_rows):
            return f"a sequence has two rows in one call: {sorted(row.key for row in all_rows)}"
        for row in rank_call.whole:
            if row.start or not row.last:
                return f"{row.key} is a whole row with start={row.start}, last={row.last}"
        dropped_keys = set(rank_call.drop)
        for row in all_rows:
            known = None if row.key in dropped_keys else self._sequences.get(row.key)
            if row.start and (known is None or known.finished or known.known != row.start):
                state = "unknown" if known is None else "finished" if known.finished else f"at {known.known} tokens"
                return f"{row.key} continues at token {row.start}, but here it is {state}"
            if row.start and known.prompt_tokens != row.prompt_tokens:
                return f"{row.key} has prompts of {known.prompt_tokens} and {row.prompt_tokens} tokens"
            if row.prompt_tokens < 1 or (not row.start and row.prompt_tokens > len(row.token_ids)):
                return f"{row.key} begins with {len(row.token_ids)} tokens, prompt {row.prompt_tokens}"
        return None

    def _drop(self, sequence_key: SequenceKey) -> None:
        sequence = self._sequences.pop(sequence_key, None)
        if sequence is not None and sequence.forwarded:
            self._dropped_lengths.append(sequence.forwarded)

    def _admit(self, row: Row) -> _Work:
        """Takes a row's tokens."""
        if not row.start:
            prefixes = [Prefix() for _ in self._models]
            self._sequences[row.key] = _Sequence(prompt_tokens=row.prompt_tokens, prefixes=prefixes)
        sequence = self._sequences[row.key]
        begin = max(0, sequence.prompt_tokens - sequence.forwarded - 1)
        token_ids = np.concatenate((sequence.tail, row.token_ids)).astype(np.int64)
        sequence.known += len(row.token_ids)
        sequence.tail = token_ids[-1:]
        return _Work(sequence=sequence, inputs=token_ids[:-1], labels=token_ids[1:], begin=begin, last=row.last)

    def _usable(
        self, rows: list[Row], extras: list[Extras | None], position_layers: int
    ) -> tuple[list[Row], list[Extras | None]]:
        """The rows that the models can forward, and their extras. Runs collectives, unless `position_layers` is 0."""
        refusal_reasons = [model.images_refusal(position_layers) for model in self._models] if position_layers else []
        reason = next(filter(None, refusal_reasons), None)
        if reason is None:
            return rows, extras
        if not self._images_refused and torch.distributed.get_rank() == 0:
            warnings.warn(f"overlap: responses with images are computed after generation, since {reason}", stacklevel=2)
        self._images_refused = True
        text_only = [at for at, row_extra in enumerate(extras) if row_extra is None or not row_extra.multi_modal_inputs]
        return [rows[at] for at in text_only], [extras[at] for at in text_only]

    def _forward_whole(self, whole: list[_Work], sequences: list[np.ndarray], extras: list[Extras]) -> None:
        """One forward of each model; sequences without works are company. Extras are of all sequences or of none."""
        for row_extra in extras:
            if (image_lengths := row_extra.multi_modal_inputs.get("images_seqlens")) is not None:
                self._image_patches += image_lengths.tolist()
        for model in self._models:
            with self._timed(model):
                model_output = model.whole(sequences, self._settings.temperature, extras)
            if model_output is None:
                continue
            end = 0
            for row_work in whole:
                start, end = end, end + row_work.sequence.known
                self._store(model, row_work, model_output[:, start : end - 1])

    def _forward_growing(self, works: list[_Work]) -> None:
        """One forward of each model; without works it is company."""
        for model_number, model in enumerate(self._models):
            prefixes = [row_work.sequence.prefixes[model_number] for row_work in works]
            inputs, labels = [row_work.inputs for row_work in works], [row_work.labels for row_work in works]
            with self._timed(model):
                prefix_batch = model.batch(prefixes or [Prefix()], inputs or [COMPANY], labels or [COMPANY])
                model_output = model.growing(prefix_batch, self._settings.temperature).cpu().numpy()
            prefix_batch.keep([row_index for row_index, row_work in enumerate(works) if not row_work.last])
            self._peak_bytes = max(self._peak_bytes, self.cache_bytes + prefix_batch.nbytes)
            for row_work, values in zip(works, prefix_batch.split(model_output), strict=bool(works)):
                self._store(model, row_work, values)
            prefix_batch.release()
            for prefix in prefixes:
                prefix.compact()

    def _store(self, model: LogProbModel, row_work: _Work, model_output: np.ndarray) -> None:
        """Keeps the response's part of float32 [outputs, tokens]."""
        for name, values in zip(model.names.values(), model_output, strict=True):
            row_work.sequence.values.setdefault(name, []).append(values[row_work.begin :].copy())

    @contextmanager
    def _timed(self, model: LogProbModel) -> Iterator[None]:
        start_time = time.perf_counter()
        yield
        if model is self._actor:
            self._busy_s += time.perf_counter() - start_time

    def _mfu(self) -> float:
        """The MFU of the actor's forwards on this rank. Attention's part is right for pieces too: squares telescope."""
        flops_counter = self._actor_worker.flops_counter
        lengths = self._dropped_lengths + [
            sequence.forwarded for sequence in self._sequences.values() if sequence.forwarded
        ]
        if flops_counter is None or not lengths or not self._busy_s:
            return 0.0
        estimated, promised = flops_counter.estimate_flops(lengths, self._busy_s, images_seqlens=self._image_patches)
        return float(estimated / promised / 3.0 / self._actor.engine.ulysses_sequence_parallel_size)


def _for_each_rank(worker_group: WorkerGroup, *args: Any) -> tuple[tuple, dict[str, Any]]:
    """Dispatches lists that are split by data-parallel rank already, through verl; the rest goes to all ranks."""
    rank_of, _ = _mesh_of(worker_group)
    num_ranks = max(rank_of) + 1
    rank_values = [value if isinstance(value, list) else [value] * num_ranks for value in args]
    for value in rank_values:
        if len(value) != num_ranks:
            raise ValueError(f"{len(value)} arguments came for {num_ranks} data-parallel ranks, one each is needed")
    return dispatch_nd_compute(rank_of, num_ranks, worker_group, *rank_values)


def _of_each_rank(worker_group: WorkerGroup, output: list[Any]) -> list[Any]:
    """Those that verl would collect, in data-parallel order, and then those of all other ranks, which may fail too."""
    rank_of, is_collected = _mesh_of(worker_group)
    return [output[at] for at in sorted(range(len(output)), key=lambda at: (not is_collected[at], rank_of[at]))]


def _mesh_of(group: WorkerGroup) -> tuple[list[int], list[bool]]:
    """The data-parallel rank of each worker, and whether verl collects from it; asked once."""
    for known, ask in (
        (group._dispatch_info, group._query_dispatch_info),
        (group._collect_info, group._query_collect_info),
    ):
        if MESH not in known:
            known[MESH] = ask(MESH)
    return group._dispatch_info[MESH], group._collect_info[MESH]


EACH_RANK = {"dispatch_fn": _for_each_rank, "collect_fn": _of_each_rank}


class OverlappedActorWorker(PlacedActorWorker):
    """verl's worker with the overlapped actor; see the module's contract."""

    _overlap: RankSession | None = None  # from the first `overlap_open` on

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Builds upstream's engines, those that can continue prefixes, and lets them run without images."""
        register_engine()
        super().init_model()
        patch_forward_without_images()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def overlap_open(self, settings: StepSettings) -> RankAbility:
        """Begins a step and forgets every other."""
        if self._overlap is None:
            self._overlap = RankSession(self.actor, self.ref, lora=self.actor.engine._is_lora)
        return self._overlap.open(settings)

    @register(dispatch_mode=EACH_RANK, blocking=False)
    def overlap_extend(self, call: RankCall) -> RankReport:
        """Drops, begins, continues and ends sequences. Callers give one call for each data-parallel rank.

        Raises:
            RuntimeError: the call is not the next one of the step, or a row does not fit what the rank knows.
        """
        return self._opened().extend(call)

    @register(dispatch_mode=EACH_RANK, blocking=False)
    def overlap_collect(self, step: int, keys: list[SequenceKey]) -> RankResults:
        """Results of finished sequences. Callers give one list of keys for each data-parallel rank."""
        return self._opened().collect(step, keys)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def overlap_clear(self, step: int) -> None:
        """Ends the step and frees everything; without an open step it does nothing."""
        if self._overlap is not None:
            self._overlap.clear(step)

    def _opened(self) -> RankSession:
        if self._overlap is None:
            raise RuntimeError("a call came before overlap_open")
        return self._overlap
