"""Measures training steps with log-probs computed during generation against steps without, on one trainer and server.

    python -m darts.bench overlap --out outputs/overlap.json

Contract. One disaggregated run, in which every batch is a step of each arm on the same weights (learning rate 0), with
the same prompts, lengths and seeds, in an order that is drawn: `off` (verl's phase after generation), `sequence` and
`token` (`darts.overlap.mode`), and `bypass` (verl's `algorithm.rollout_correction.bypass_mode`, which has no phase).

1. On a CPU the actor has one core and the server another. Trainer and agent-loop worker share these two cores.
2. Two workloads, of responses whose lengths are drawn before the run: `heavy tail` (log-normal, the longest cut at
   `--limit`) and `equal lengths` (all as long as the limit), in chunks of `--chunk-tokens`. The model is untrained: its
   tokens mean nothing, and cost what those of a trained one would. M of `--candidates` are kept, dual-end.
3. Micro-batches of verl's own forwards hold one response, since it pads them without flash-attention: no arm is slow
   for its padding.
4. Each arm makes one step that counts nowhere before the first batch. All others count.

The exit code is 1 if a check fails. What the run printed is in `--runs`.
"""

import argparse
import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from darts.bench import overlap_report
from darts.bench.arms import BenchArm
from darts.bench.harness import OVERRIDE, Bench, BenchError, Save
from darts.bench.launch import LOG, run_trainer
from darts.bench.overlap_report import ARMS, BYPASS, EQUAL, FIGURES, OFF, OVERLAPPED, TAIL
from darts.bench.plan import RECORDS, BenchPlan
from darts.bench.records import Records, StepRecord
from darts.testbed import assets_dir

GROUP_SIZE = 8
BETWEEN, WITHIN = 0.4, 0.6
"""Standard deviations of log length, between prompts and within one. The longest of 12 is then some 2.2 times the mean
of its group: between the 1.4 and 2.4 of the two policies in the real run's log (docs/allocation.md)."""
PROMPT_TOKENS = 48
Batch = tuple[str, list[list[int]]]
"""Workload, and response lengths by prompt and candidate."""


def lengths_of(workload: str, bench_options: argparse.Namespace, random_source: np.random.Generator) -> list[list[int]]:
    """Response lengths of a batch, by prompt and candidate."""
    batch_shape = (bench_options.prompts, bench_options.candidates)
    if workload == EQUAL:
        return np.full(batch_shape, bench_options.limit).tolist()
    prompt_medians = bench_options.median * np.exp(random_source.normal(0, BETWEEN, (bench_options.prompts, 1)))
    drawn_lengths = np.ceil(prompt_medians * np.exp(random_source.normal(0, WITHIN, batch_shape)))
    return np.clip(drawn_lengths, 2, bench_options.limit).astype(int).tolist()


def batches_of(bench_options: argparse.Namespace) -> list[Batch]:
    """All batches in their order."""
    random_source = np.random.default_rng(bench_options.seed)
    planned_workloads = [*[TAIL] * bench_options.batches, *[EQUAL] * bench_options.equal_batches]
    return [(workload, lengths_of(workload, bench_options, random_source)) for workload in planned_workloads]


def overrides(folder: Path, options: argparse.Namespace, platform: str) -> list[str]:
    """Those of the run's Hydra configuration."""
    longest = PROMPT_TOKENS + options.limit
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        f"platform={platform}", "testbed=overthink", "darts.placement=disaggregated",
        f"darts.overlap.kv_cache_gib={options.kv_cache_gib}", f"darts.streaming.chunk_tokens={options.chunk_tokens}",
        "darts.allocation.mode=uniform", f"darts.allocation.mean_candidates={options.candidates}",
        f"darts.allocation.high={options.candidates + 1}", "darts.selection.mode=dual_end",
        "darts.latency.profile=off", "darts.reward.pool=false", f"darts.seed={options.seed}",
        f"data.max_prompt_length={PROMPT_TOKENS}", f"data.max_response_length={options.limit}", "data.shuffle=false",
        f"data.train_batch_size={options.prompts}", "data.train_max_samples=-1",
        f"data.train_files={folder}/train.parquet", f"data.val_files={folder}/train.parquet",
        f"actor_rollout_ref.model.path={folder}/model",
        f"{rollout}.n={GROUP_SIZE}", f"{rollout}.max_model_len={longest + 16}", f"{rollout}.calculate_log_probs=true",
        f"{rollout}.max_num_batched_tokens={max(2048, longest + 16)}", f"{rollout}.enable_prefix_caching=false",
        f"{rollout}.agent.agent_loop_manager_class=darts.bench.overlap_trainer.ScriptedManager",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=1", f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"{actor}.ppo_mini_batch_size={options.prompts}", f"{actor}.optim.lr=0",
        *options.override,
    ]  # fmt: skip


def write_inputs(folder: Path, batches: list[Batch], hidden: int, layers: int) -> None:
    """Writes an untrained model of the testbeds' kind, and prompts with the lengths of their candidates.

    Args:
        folder: gets `model/` and `train.parquet`.
        batches: in the order of the steps.
        hidden: hidden size of the model, a multiple of 64.
        layers: number of the model's layers.
    """
    import pyarrow as pa
    import pyarrow.parquet
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from darts.testbed.model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    small = build_model(tokenizer, seed=0)
    sizes = {
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config.from_dict(small.config.to_dict() | sizes | {"layer_types": None}))
    model.generation_config = small.generation_config
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    prompts = pyarrow.parquet.read_table(assets_dir("overthink") / "train.parquet").to_pylist()
    lengths = [of_prompt for _, batch in batches for of_prompt in batch]
    rows = [
        row | {"extra_info": {"index": number, "split": "train", "lengths": of_prompt}}
        for number, (row, of_prompt) in enumerate(zip(itertools.cycle(prompts), lengths, strict=False))
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def measure(options: argparse.Namespace, save: Save) -> list[dict[str, Any]]:
    """Writes the inputs and runs the training; a record for each batch and arm.

    Raises:
        BenchError: the run failed; its log is named.
    """
    from verl_patches.device import is_cpu_only

    if is_cpu_only() and len(os.sched_getaffinity(0)) < 2:
        raise BenchError("one core: actor and server need one each.")
    folder, batches = options.runs.resolve(), batches_of(options)
    shutil.rmtree(folder, ignore_errors=True)
    plan = BenchPlan(
        arms=[
            BenchArm(name=arm, strategy="darts", overlap=arm if arm in OVERLAPPED else OFF, bypass=arm == BYPASS)
            for arm in ARMS
        ],
        seeds=1,
        steps=len(batches),
        validate_every=0,
        config_name="quickstart",
        overrides=overrides(folder, options, "cpu" if is_cpu_only() else "gpu"),
    )
    plan.save(folder)
    write_inputs(folder, batches, options.hidden, options.layers)
    run_trainer(plan, folder, 60 * options.silence, "darts.bench.overlap_trainer")
    lines = map(json.loads, (folder / FIGURES).read_text().splitlines())
    figures = {(line["arm"], line["step"]): line for line in lines}
    steps = [step for step in Records(folder / RECORDS).read() if isinstance(step, StepRecord)]
    if len(steps) != len(batches) * len(ARMS):
        raise BenchError(f"the run ended after {len(steps)} steps of {len(batches) * len(ARMS)}; see {folder / LOG}")
    # as the arms are listed, for the tables
    steps.sort(key=lambda step: (step.step, ARMS.index(step.arm)))
    return [{"workload": batches[s.step - 1][0], **asdict(s), **figures[s.arm, s.step]} for s in steps]


BENCH = Bench(
    name="overlap",
    about=__doc__,
    options={
        "--batches": (7, "with a heavy tail"),
        "--equal-batches": (2, "with equal lengths"),
        "--prompts": (4, "of a batch"),
        "--candidates": (12, "per prompt"),
        "--median": (300.0, "length, heavy tail"),
        "--limit": (1024, "longest response"),
        "--chunk-tokens": (64, "of a growing response"),
        "--hidden": (256, "hidden size of the model"),
        "--layers": (4, "of the model"),
        "--kv-cache-gib": (2.0, "for prefixes"),
        "--seed": (0, "of lengths and tokens"),
        "--runs": (Path("outputs/overlap"), "folder"),
        "--silence": (15.0, "minutes without a step"),
        **OVERRIDE,
    },
    quick={"batches": 2, "equal_batches": 1},
    measure=measure,
    tables=overlap_report.tables,
    checks=overlap_report.checks,
)
