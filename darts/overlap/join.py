"""Puts what was computed during generation into verl's batch, and has verl compute the rest.

Contract. Rows are joined by (uid, candidate), whatever their order. A row takes an overlapped result only if it has as
many values as the row's response has tokens, and prompt and response are, by checksum, what the actor was given; all
other rows are computed by verl's own call, in one batch. Outputs are those of verl 0.9.1's
`RayPPOTrainer._compute_old_log_prob` and `_compute_ref_log_prob`: float32 [rows, response length], zero after the end.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto

from darts.config import DartsConfig
from darts.messages import CANDIDATE, ActorCall, SequenceKey, checksum
from darts.overlap.session import GIB, ActorLimits, OverlapOutcome, OverlapSession
from darts.planning import Rollout


def sequence_keys(batch: DataProto) -> list[SequenceKey]:
    """The name of each row's sequence."""
    columns = batch.non_tensor_batch
    return [SequenceKey(uid, int(candidate)) for uid, candidate in zip(columns["uid"], columns[CANDIDATE], strict=True)]


def _uneven(batch: DataProto, rows: np.ndarray) -> np.ndarray:
    """The rows and, where they have M-RoPE positions and are all equally long, one that is not: of such a batch verl
    0.9.1 loses the positions (`left_right_2_no_padding` takes the layers for the ragged dimension, the engine the
    tokens)."""
    if len(rows) and batch.batch["position_ids"].dim() == 3:
        row_lengths = batch.batch["attention_mask"].sum(dim=1).numpy()
        other_rows = np.flatnonzero(row_lengths != row_lengths[rows[0]])
        if len(other_rows) and not np.isin(rows, other_rows).any():
            return np.append(rows, other_rows[0])
    return rows


def actor_limits(config: DictConfig, darts: DartsConfig, num_ranks: int, with_reference: bool) -> ActorLimits:
    """What verl's configuration says about the actor's forwards."""
    ours = config.actor_rollout_ref
    rollout, longest = ours.rollout, ours.rollout.prompt_length + ours.rollout.response_length
    asked_parts = [rollout, ours.ref] if with_reference else [rollout]
    fixed_rows = [part.log_prob_micro_batch_size_per_gpu for part in asked_parts if not part.log_prob_use_dynamic_bsz]
    fixed_rows = [size for size in fixed_rows if size is not None]
    dynamic_tokens = [part.log_prob_max_token_len_per_gpu for part in asked_parts if part.log_prob_use_dynamic_bsz]
    return ActorLimits(
        num_ranks=num_ranks,
        max_tokens=min([*dynamic_tokens, *(size * longest for size in fixed_rows)], default=longest),
        max_rows=min(fixed_rows, default=None if dynamic_tokens else 1),
        padded=not ours.model.use_remove_padding,
        sequence_parallel=max(
            ours.actor.ulysses_sequence_parallel_size, ours.actor.fsdp_config.get("ulysses_sequence_parallel_size", 1)
        ),
        longest=longest,
        temperature=rollout.temperature,
        with_reference=with_reference,
        sum_pi_squared=ours.actor.get("calculate_sum_pi_squared", False),
        timeout_s=darts.timeout_s,
    )


@dataclass(slots=True, eq=False)
class _Joined:
    """What is known of the step whose results were fetched."""

    outcome: OverlapOutcome
    keys: list[SequenceKey]
    lengths: list[int]
    usable: list[bool]
    exposed_s: float = 0.0


@dataclass(eq=False)
class OverlappedLogProbs:
    """The trainer's view: verl's two calls, answered from what was computed during generation."""

    session: OverlapSession  # drives the actor
    limits: ActorLimits  # as the session's
    _joined: _Joined | None = None

    def old(self, batch: DataProto, compute: Callable[[DataProto], tuple[DataProto, float]]) -> tuple[DataProto, float]:
        """Answers for `RayPPOTrainer._compute_old_log_prob`, which is `compute`."""
        self._joined = None
        if not self.session.begun:  # a replayed rollout
            return compute(batch)
        started_at = time.monotonic()
        keys = sequence_keys(batch)
        outcome = self.session.finish(keys)
        token_ids, is_token = batch.batch["input_ids"].numpy(), batch.batch["attention_mask"].numpy().astype(bool)
        response_lengths = is_token[:, batch.batch["prompts"].shape[1] :].sum(axis=1).tolist()  # with those of tools

        def is_usable(row: int) -> bool:
            """Whether the row has an overlapped result of exactly its tokens."""
            row_values = outcome.values.get(keys[row])
            return (
                row_values is not None
                and all(len(token_values) == response_lengths[row] for token_values in row_values.values())
                and checksum(token_ids[row][is_token[row]]) == outcome.checksums[keys[row]]
            )

        usable_flags = [is_usable(row) for row in range(len(keys))]
        self._joined = _Joined(outcome, keys, response_lengths, usable_flags)
        mfu_parts = [outcome.mfu] if any(usable_flags) else []

        def missing(part: DataProto) -> DataProto:
            output, part_mfu = compute(part)
            mfu_parts.append(part_mfu)
            return output

        value_names = ["old_log_probs", "entropys"]
        if self.limits.sum_pi_squared:
            value_names.append("sum_pi_squared")
        output = self._join(batch, value_names, missing)
        if not self.limits.with_reference:
            outcome.release()
        self._joined.exposed_s = time.monotonic() - started_at
        return output, mfu_parts[0]

    def reference(self, batch: DataProto, compute: Callable[[DataProto], DataProto]) -> DataProto:
        """Answers for `RayPPOTrainer._compute_ref_log_prob`, which is `compute`."""
        if self._joined is None or self._joined.keys != sequence_keys(batch):
            return compute(batch)
        started_at = time.monotonic()
        output = self._join(batch, ["ref_log_prob"], compute)
        self._joined.outcome.release()
        self._joined.exposed_s += time.monotonic() - started_at
        return output

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of the step that was fetched last; empty if it had no overlapped results. Keys as in `METRICS`."""
        joined_step, pool = self._joined, rollout.pool
        if joined_step is None:
            return {}
        outcome = joined_step.outcome
        ended_at = {
            SequenceKey(rollout.uids[prompt], candidate): time_ended
            for prompt, candidate, time_ended in zip(
                pool.prompt.tolist(), pool.candidate.tolist(), pool.ended_at.tolist(), strict=True
            )
        }
        kept_keys, kept_tokens = set(joined_step.keys), max(sum(joined_step.lengths), 1)
        early_tokens = Counter()
        for key in kept_keys & outcome.values.keys():
            for computed_at, tokens in outcome.computed.get(key, []):
                early_tokens["rollout"] += tokens * (computed_at <= rollout.ended)
                early_tokens["response"] += tokens * (computed_at <= ended_at[key])
        hidden_s = sum(max(min(call.ended, rollout.ended) - call.began, 0.0) for call in outcome.calls)
        forwarded_tokens = sum(call.tokens for call in outcome.calls)
        wasted_parts = [parts for key, parts in outcome.computed.items() if key not in kept_keys]
        metrics = {
            "calls": len(outcome.calls),
            "hidden_s": hidden_s,
            "exposed_s": joined_step.exposed_s,
            "hidden_share": hidden_s / max(hidden_s + joined_step.exposed_s, 1e-9),
            "tokens_forwarded": forwarded_tokens,
            "tokens_twice": outcome.restarted_tokens,
            "tokens_wasted": sum(tokens for parts in wasted_parts for _, tokens in parts),
            "forwarded_per_kept": forwarded_tokens / kept_tokens,
            "before_end_share": early_tokens["response"] / kept_tokens,
            "in_rollout_share": early_tokens["rollout"] / kept_tokens,
            "late_rows": joined_step.usable.count(False),
            "cache_peak_gib": outcome.peak_cache_bytes / GIB,
        }
        return {f"darts/overlap/{name}": float(value) for name, value in metrics.items()}

    @property
    def calls(self) -> list[ActorCall]:
        """The actor's calls of that step."""
        return [] if self._joined is None else self._joined.outcome.calls

    def _join(self, batch: DataProto, names: list[str], compute: Callable[[DataProto], DataProto]) -> DataProto:
        """The values `names` of all rows, float32 [rows, response length]; `compute` is verl's, for what is missing."""
        joined_step, limits = self._joined, self.limits
        joined_values = {name: torch.zeros(batch.batch["responses"].shape, dtype=torch.float32) for name in names}
        for row, key in enumerate(joined_step.keys):
            if joined_step.usable[row]:
                for name in names:
                    values = torch.tensor(joined_step.outcome.values[key][name])  # a copy: what Ray gives is read-only
                    joined_values[name][row, : len(values)] = values
        missing_rows = _uneven(batch, np.flatnonzero(~np.asarray(joined_step.usable, dtype=bool)))
        if len(missing_rows):
            padded_part, num_added = pad_dataproto_to_divisor(batch.select_idxs(missing_rows), limits.num_ranks)
            padded_part.meta_info = padded_part.meta_info | {
                "global_token_num": padded_part.batch["attention_mask"].sum(dim=-1).tolist(),
                # A fixed number of rows would have to divide them; one of the longest always fits.
                "use_dynamic_bsz": True,
                "max_token_len_per_gpu": limits.max_tokens if limits.max_rows is None else limits.longest,
            }
            computed_values = unpad_dataproto(compute(padded_part), num_added)
            for name in names:
                joined_values[name][missing_rows] = computed_values.batch[name].float()
        return DataProto.from_single_dict(joined_values)
