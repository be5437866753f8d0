"""Warm start: supervised training of the tiny model on demonstrations, drawn as it goes.

Demonstrations are packed into rows of one fixed length. Within a row each attends to itself only
and counts its positions from 0, so packing changes nothing but the speed. Nor does attention by
segments (`BY_SEGMENTS`), which computes nothing that a mask would hide: for rows of many tokens.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Qwen2ForCausalLM, Qwen2Tokenizer

from darts.testbed import Limits
from darts.testbed.model import prompt_tokens
from darts.testbed.task import Mix, Problem, demonstrate, draw_problem

_IGNORED = -100
BY_SEGMENTS = "darts_by_segments"
"""Name of the attention, for the model's `set_attn_implementation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast to train. The number of steps is fixed, so that a seed decides all."""

    steps: int = 2000  # of the optimizer
    rows: int = 8  # per step, each of prompt limit + response limit tokens (`long`: 1 of `ROW_TOKENS`)
    peak_rate: float = 2e-3  # learning rate after `warmup` steps; then it falls to 0 along a half cosine
    warmup: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        progress = torch.tensor((step - self.warmup) / max(1, self.steps - self.warmup))
        return float(self.peak_rate * 0.5 * (1 + torch.cos(torch.pi * progress)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One batch; all tensors are (rows, length), and the padding of a row is segment -1."""

    tokens: Tensor
    labels: Tensor  # the token to predict at each place; `_IGNORED` in prompts and padding
    positions: Tensor
    segments: Tensor


def examples(
    tokenizer: Qwen2Tokenizer, mix: Mix, limits: Limits, seed: int, excluded: frozenset[Problem]
) -> Iterator[tuple[list[int], int]]:
    """Yields (tokens, number of prompt tokens) without end, never of an `excluded` problem.

    A demonstration beyond the response limit is cut there and gets no end-of-sequence token, so
    that the chance of one more re-check does not fall near the limit.
    """
    rng = random.Random(f"demonstrations-{seed}")
    while True:
        problem = draw_problem(rng, rng.choice(mix.classes), mix.first)
        response = demonstrate(rng, problem, mix)
        if problem in excluded:
            continue
        prompt = prompt_tokens(tokenizer, problem.question)
        answer = [*tokenizer.encode(response[: limits.response]), tokenizer.eos_token_id]
        yield prompt + answer[: limits.response], len(prompt)


def packed(stream: Iterator[tuple[list[int], int]], rows: int, length: int, pad: int) -> Iterator[Packed]:
    """Packs examples into batches of `rows` rows; an example that does not fit opens the next row."""
    example, batch_shape = next(stream), (rows, length)
    while True:
        tokens = torch.full(batch_shape, pad)
        labels = torch.full(batch_shape, _IGNORED)
        positions = torch.zeros(batch_shape, dtype=torch.long)
        segments = torch.full(batch_shape, -1)
        for row in range(rows):
            start_place, segment = 0, 0
            while start_place + len(example[0]) <= length:
                token_ids, prompt = torch.tensor(example[0]), example[1]
                end_place = start_place + len(token_ids)
                tokens[row, start_place:end_place] = token_ids
                labels[row, start_place + prompt - 1 : end_place - 1] = token_ids[prompt:]
                positions[row, start_place:end_place] = torch.arange(len(token_ids))
                segments[row, start_place:end_place] = segment
                start_place, segment, example = end_place, segment + 1, next(stream)
        yield Packed(tokens=tokens, labels=labels, positions=positions, segments=segments)


def segment_bounds(segments: Tensor) -> list[tuple[int, int, int]]:
    """The row, the first place and the end of each segment; they follow one another, and padding is at the end."""
    bounds = []
    for row, row_segments in enumerate(segments):
        segment_lengths = row_segments[row_segments >= 0].bincount()
        segment_ends = segment_lengths.cumsum(0)
        starts = (segment_ends - segment_lengths).tolist()
        bounds += [(row, start, end) for start, end in zip(starts, segment_ends.tolist(), strict=True)]
    return bounds


def _attend_by_segments(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    bounds: list[tuple[int, int, int]],
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, in the form of transformers' `AttentionInterface`; padding gets zeros."""
    attended = torch.zeros_like(query)  # (rows, heads, length, dimension)
    for row, start, end in bounds:
        parts = (tensor[row : row + 1, :, start:end] for tensor in (query, key, value))
        attended[row, :, start:end] = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling)[0]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_SEGMENTS, _attend_by_segments)


def loss_of(model: Qwen2ForCausalLM, batch: Packed) -> Tensor:
    """Mean cross-entropy in nats over the response tokens of `batch`."""
    length = batch.tokens.shape[1]
    if model.config._attn_implementation == BY_SEGMENTS:
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        attention = {"attention_mask": no_mask, "bounds": segment_bounds(batch.segments)}
    else:
        same_segment = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
        attention = {"attention_mask": same_segment & torch.ones(length, length, dtype=torch.bool).tril()}
    logits = model(batch.tokens, position_ids=batch.positions, use_cache=False, **attention).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=_IGNORED)


def train(
    model: Qwen2ForCausalLM, batches: Iterator[Packed], schedule: Schedule, report: Callable[[str], None] = print
) -> None:
    """Trains `model` in place and reports loss, speed and remaining time every 100 steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    model.train()
    start_s, step_losses, num_tokens = time.monotonic(), [], 0
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = next(batches)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
        optimizer.step()
        step_losses.append(loss.item())
        num_tokens += int((batch.segments >= 0).sum())
        if (step + 1) % 100 == 0 or step + 1 == schedule.steps:
            passed_s = time.monotonic() - start_s
            left_s = passed_s / (step + 1) * (schedule.steps - step - 1)
            recent_loss = sum(step_losses[-100:]) / len(step_losses[-100:])
            report(
                f"step {step + 1}/{schedule.steps}  loss {recent_loss:.4f}  {num_tokens / passed_s:,.0f} tokens/s"
                f"  {passed_s / 60:.1f} min passed, {left_s / 60:.1f} min left"
            )
    model.eval()
