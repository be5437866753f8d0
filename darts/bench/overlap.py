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

A record is a step of an arm: the `StepRecord`, and what `darts.bench.overlap_trainer` adds. Ratios are of totals,
paired by batch, with 95 % bootstrap intervals over the batches. Exposed seconds are what the trainer waited for
log-probs after generation, by its clock and alike in all arms: verl's phases `old_log_prob` and `ref`. The exit code is
1 if a check fails. What the run printed is in `--runs`.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from darts.bench import harness
from darts.bench.arms import BenchArm
from darts.bench.harness import ArmFigures, Bench, BenchError, FlatRecords, Save
from darts.bench.launch import LOG, run_trainer
from darts.bench.plan import RECORDS, BenchPlan
from darts.bench.records import Records, StepRecord
from darts.evidence.statistics import Estimate
from darts.evidence.tables import Check
from darts.testbed import assets_dir

ARMS = OFF, SEQUENCE, TOKEN, BYPASS = "off", "sequence", "token", "bypass"
OVERLAPPED = (SEQUENCE, TOKEN)
TAIL, EQUAL = "heavy tail", "equal lengths"
FIGURES = "figures.jsonl"
HIDDEN_GOAL = 0.9
BEFORE_END_GOAL = 0.5
SAME_LENGTHS = "share of batches with equal kept lengths in all arms"
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
    """Writes an untrained `model/`, and prompts with their candidates' lengths; `hidden` is a multiple of 64."""
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
    prompts = pd.read_parquet(assets_dir("overthink") / "train.parquet")
    lengths = [prompt_lengths for _, batch in batches for prompt_lengths in batch]
    rows = prompts.iloc[np.arange(len(lengths)) % len(prompts)].reset_index(drop=True)
    rows["extra_info"] = [
        {"index": number, "split": "train", "lengths": prompt_lengths} for number, prompt_lengths in enumerate(lengths)
    ]
    rows.to_parquet(folder / "train.parquet")


def measure(options: argparse.Namespace, save: Save) -> FlatRecords:
    """Writes the inputs and runs the training; a record for each batch and arm.

    Raises:
        BenchError: the run failed; its log is named.
    """
    from verl_patches.device import is_cpu_only

    if is_cpu_only() and len(os.sched_getaffinity(0)) < 2:
        raise BenchError("one core: actor and server need one each.")
    folder, batches = options.runs.resolve(), batches_of(options)
    shutil.rmtree(folder, ignore_errors=True)
    modes = {arm: arm if arm in OVERLAPPED else OFF for arm in ARMS}
    plan = BenchPlan(
        arms=[BenchArm(name=arm, strategy="darts", overlap=modes[arm], bypass=arm == BYPASS) for arm in ARMS],
        seeds=1,
        steps=len(batches),
        validate_every=0,
        config_name="quickstart",
        overrides=overrides(folder, options, "cpu" if is_cpu_only() else "gpu"),
        trainer="darts.bench.overlap_trainer.OverlapTrainer",
    )
    plan.save(folder)
    write_inputs(folder, batches, options.hidden, options.layers)
    run_trainer(plan, folder, 60 * options.silence)
    steps = [step for step in Records(folder / RECORDS).read() if isinstance(step, StepRecord)]
    if len(steps) != len(batches) * len(ARMS):
        raise BenchError(f"the run ended after {len(steps)} steps of {len(batches) * len(ARMS)}; see {folder / LOG}")
    lines = map(json.loads, (folder / FIGURES).read_text().splitlines())
    figures = {(line["arm"], line["step"]): line for line in lines}
    steps.sort(key=lambda step: (step.step, ARMS.index(step.arm)))  # as the arms are listed, for the tables
    return [{"workload": batches[s.step - 1][0], **asdict(s), **figures[s.arm, s.step]} for s in steps]


PHASES = {
    "step, s": "step_s", "generation, s": "rollout_s", "old log-probs, s": "old_log_prob_s", "reference, s": "ref_s",
    "update, s": "update_s", "weights, s": "weights_s",
}  # fmt: skip
STEP_COLUMNS: harness.Columns = (
    ("batches", lambda arm: len(arm.known("step_s"))),
    *((title, lambda arm, key=key: f"{arm.mean(key):.2f}") for title, key in PHASES.items()),
    ("step over off", lambda arm: arm.over("step_s", ".3f")),
    ("generation over off", lambda arm: arm.over("rollout_s", ".3f")),
    ("log-probs' share of the step", lambda arm: format(arm.share("waited_s", "step_s"), ".1%")),
)
HIDDEN_COLUMNS: harness.Columns = (
    ("hidden / (hidden + exposed)", lambda arm: format(arm.share("hidden_s", "computed_s"), ".3f")),
    ("1 - exposed / exposed of off", lambda arm: format(not_exposed(arm), ".3f")),
    ("tokens before their end", lambda arm: f"{arm.mean('before_end_share'):.3f}"),
    ("tokens in the rollout", lambda arm: f"{arm.mean('in_rollout_share'):.3f}"),
    ("forwarded per kept", lambda arm: f"{arm.mean('forwarded_per_kept'):.2f}"),
    ("wasted tokens", lambda arm: f"{arm.mean('tokens_wasted'):,.0f}"),
    ("calls", lambda arm: f"{arm.mean('calls'):.0f}"),
    ("cache peak, GiB", lambda arm: f"{arm.known('cache_peak_gib').max():.3f}"),
)


def not_exposed(arm: ArmFigures) -> Estimate:
    """1 minus the arm's exposed seconds over those of `off`."""
    exposed_ratio = harness.ratio(arm.records, arm.arm, OFF, arm.pair_by, "waited_s")
    return Estimate(value=1 - exposed_ratio.value, low=1 - exposed_ratio.high, high=1 - exposed_ratio.low)


def with_sums(records: pd.DataFrame) -> pd.DataFrame:
    """The records, with the seconds that the tables are made of."""
    waited_s, hidden_s = records["old_log_prob_s"] + records["ref_s"], records["hidden_s"].fillna(0.0)
    return records.assign(waited_s=waited_s, hidden_s=hidden_s, computed_s=hidden_s + waited_s)


def note(records: pd.DataFrame) -> str:
    """What a batch is, and whether the arms agree."""
    plain = records[records["arm"] == OFF]
    lengths = np.concatenate([np.array(kept)[:, 2] for kept in plain["kept_lengths"]])
    tokens = plain[["tokens_generated", "tokens_kept"]].mean()
    compared = records[["same_rows", "rows"]].sum()
    return (
        f"A batch: {tokens.iloc[0]:,.0f} tokens generated, {tokens.iloc[1]:,.0f} kept in {len(lengths) // len(plain)} "
        f"responses; kept lengths: median {np.median(lengths):.0f}, longest {lengths.max()}.\nOld log-probs of an arm "
        f"and of the first of its batch: {compared.iloc[0]:,.0f} of {compared.iloc[1]:,.0f} rows have the same tokens, "
        f"their largest difference is {records['log_prob_diff_max'].max():.1e} nats."
    )


def tables(records: pd.DataFrame) -> str:
    """All, for each workload."""
    made_parts = []
    for workload, part in with_sums(records).groupby("workload", sort=False):
        steps_table = harness.arms_table(part, STEP_COLUMNS, ["step"], OFF)
        hidden_table = harness.arms_table(part, HIDDEN_COLUMNS, ["step"], OFF, arms=OVERLAPPED)
        made_parts += [workload, steps_table, hidden_table, note(part)]
    return "\n\n".join(made_parts)


def checks(records: pd.DataFrame) -> list[Check]:
    """The bounds, each with what was measured."""
    equal = records["kept_lengths"].map(str).groupby(records["step"]).nunique() == 1
    late_rows = records.loc[records["arm"].isin(OVERLAPPED), "late_rows"].sum()
    made_checks = [
        Check(name=SAME_LENGTHS, value=equal.mean(), low=1, high=1),
        Check(name="late rows", value=late_rows, low=0, high=0),
    ]
    for workload, part in with_sums(records).groupby("workload", sort=False):
        arm = ArmFigures(arm=TOKEN, base=OFF, pair_by=["step"], records=part)
        hidden_share = arm.share("hidden_s", "computed_s").value
        made_checks.append(Check(name=f"{workload}, token: hidden share", value=hidden_share, low=HIDDEN_GOAL, high=1))
        if workload == EQUAL:
            name = f"{workload}, token: share of kept tokens computed before their response has finished"
            made_checks.append(Check(name=name, value=arm.mean("before_end_share"), low=BEFORE_END_GOAL, high=1))
    return made_checks


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
        **harness.OVERRIDE,
    },
    quick={"batches": 2, "equal_batches": 1},
    measure=measure,
    tables=tables,
    checks=checks,
)
