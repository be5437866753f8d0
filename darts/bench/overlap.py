"""Measures training steps with log-probs computed during generation against steps without, on one trainer and server.

    python -m darts.bench.overlap --out outputs/overlap.json

Contract. One disaggregated run, in which every batch is a step of each arm on the same weights (learning rate 0), with
the same prompts, lengths and seeds, in an order that rotates: `off` (verl's phase after generation), `sequence` and
`token` (`darts.overlap.mode`), and `bypass` (verl's `algorithm.rollout_correction.bypass_mode`, which has no phase).

1. On a CPU the actor has one core and the server another. Trainer and agent-loop worker share these two cores.
2. Two workloads, of responses whose lengths are drawn before the run: `heavy tail` (log-normal, the longest cut at
   `--limit`) and `equal lengths` (all as long as the limit), in chunks of `--chunk-tokens`. The model is untrained: its
   tokens mean nothing, and cost what those of a trained one would. M of `--candidates` are kept, dual-end.
3. Micro-batches of verl's own forwards hold one response, since it pads them without flash-attention: no arm is slow
   for its padding.
4. The first batch warms up and is not counted. All others are.

The exit code is 1 if a check fails. What the run printed is in `--runs`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from darts.bench import harness as common
from darts.bench.harness import ENVIRONMENT
from darts.bench.overlap_report import ARMS, EQUAL, TAIL, checks, tables
from darts.evidence.log import say

GROUP_SIZE = 8
BETWEEN, WITHIN = 0.4, 0.6
"""Standard deviations of log length, between prompts and within one. The longest of 12 is then some 2.2 times the mean
of its group: between the 1.4 and 2.4 of the two policies in the real run's log (docs/allocation.md)."""
PROMPT_TOKENS = 48
LIMIT_S = 3600


def lengths_of(workload: str, options: argparse.Namespace, rng: np.random.Generator) -> list[list[int]]:
    """Response lengths of a batch, by prompt and candidate."""
    shape = (options.prompts, options.candidates)
    if workload == EQUAL:
        return np.full(shape, options.limit).tolist()
    medians = options.median * np.exp(rng.normal(0, BETWEEN, (options.prompts, 1)))
    drawn = np.ceil(medians * np.exp(rng.normal(0, WITHIN, shape)))
    return np.clip(drawn, 2, options.limit).astype(int).tolist()


def batches_of(options: argparse.Namespace) -> list[tuple[str, list[list[int]]]]:
    """Workload and lengths of every batch, the warm-up's first."""
    rng = np.random.default_rng(options.seed)
    planned = [TAIL, *[TAIL] * options.batches, *[EQUAL] * options.equal_batches]
    return [(workload, lengths_of(workload, options, rng)) for workload in planned]


def overrides(options: argparse.Namespace, steps: int, platform: str) -> list[str]:
    """Those of the run's Hydra configuration."""
    longest = PROMPT_TOKENS + options.limit
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        f"platform={platform}", "testbed=overthink", "darts.placement=disaggregated", "darts.overlap.mode=token",
        f"darts.overlap.kv_cache_gib={options.kv_cache_gib}", f"darts.streaming.chunk_tokens={options.chunk_tokens}",
        "darts.allocation.mode=uniform", f"darts.allocation.mean_candidates={options.candidates}",
        f"darts.allocation.high={options.candidates + 1}", "darts.selection.mode=dual_end",
        "darts.latency.profile=off", "darts.reward.pool=false", f"darts.seed={options.seed}", "darts.trace=null",
        f"data.max_prompt_length={PROMPT_TOKENS}", f"data.max_response_length={options.limit}", "data.shuffle=false",
        f"data.train_batch_size={options.prompts}", "data.train_max_samples=-1",
        f"{rollout}.n={GROUP_SIZE}", f"{rollout}.max_model_len={longest + 16}", f"{rollout}.calculate_log_probs=true",
        f"{rollout}.max_num_batched_tokens={max(2048, longest + 16)}", f"{rollout}.enable_prefix_caching=false",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=1", f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"{actor}.ppo_mini_batch_size={options.prompts}", f"{actor}.optim.lr=0",
        "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.logger=[console]",
        f"trainer.total_training_steps={steps}",
        *options.override,
    ]  # fmt: skip


def new_records(path: Path, seen: int) -> Iterator[dict[str, Any]]:
    """The whole lines of a growing file, without the first `seen`."""
    text = path.read_text() if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines()[seen:]:
        yield json.loads(line)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes the inputs, runs the training, and says how far it is; all records, the warm-up's included.

    Raises:
        RuntimeError: the run failed; its log is named.
    """
    from darts.bench.overlap_inputs import RECORDS, write_inputs
    from verl_patches.device import is_cpu_only

    if is_cpu_only() and len(os.sched_getaffinity(0)) < 2:
        raise RuntimeError("one core: actor and server need one each.")
    folder, batches = options.runs.resolve(), batches_of(options)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, batches, options.hidden, options.layers)
    given = overrides(options, len(batches), "cpu" if is_cpu_only() else "gpu")
    command = [sys.executable, "-m", "darts.bench.overlap_run", str(folder), *given]
    records: list[dict[str, Any]] = []
    say(f"starting one trainer and one server; their log is {folder}/run.log")
    with (folder / "run.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**ENVIRONMENT, **os.environ}, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline, ended = time.monotonic() + LIMIT_S, False
        try:
            while not ended:
                ended = process.poll() is not None
                for record in new_records(folder / RECORDS, len(records)):
                    records.append(record)
                    parts = ", ".join(f"{key} {record[f'{key}_s']:.2f}" for key in ("step", "gen", "old_log_prob"))
                    say(f"batch {record['batch']}/{len(batches)}, {record['workload']}, {record['arm']}: {parts} s")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the run did not end within {LIMIT_S} s; see {folder}/run.log")
                time.sleep(0.0 if ended else 0.5)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or len(records) != len(batches) * len(ARMS):
        raise RuntimeError(
            f"the run ended with exit code {process.returncode} after {len(records)} steps of "
            f"{len(batches) * len(ARMS)}; see {folder}/run.log"
        )
    return records


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few batches, to try it out")
    parser.add_argument("--batches", type=int, default=7, help="with a heavy tail (default: %(default)s)")
    parser.add_argument("--equal-batches", type=int, default=2, help="with equal lengths (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="of a batch (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=12, help="per prompt (default: %(default)s)")
    parser.add_argument("--median", type=float, default=300, help="length, heavy tail (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1024, help="longest response (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=float, default=2, help="for prefixes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("outputs/overlap"), help="folder (default: %(default)s)")
    parser.add_argument("--override", action="append", default=[], help="of the run's Hydra configuration")
    if "--quick" in (sys.argv[1:] if given is None else given):
        parser.set_defaults(batches=2, equal_batches=1)
    options = parser.parse_args(given)
    opening = common.document(options)
    records = run(options)
    counted = [record for record in records if record["batch"] > 1]
    # as the arms are listed, for the tables
    counted.sort(key=lambda record: (record["batch"], ARMS.index(record["arm"])))
    made = checks(counted)
    common.save(options, opening, records=records, checks=[str(check) for check in made])
    print(f"\n{tables(counted)}\n")
    print("\n".join(map(str, made)))
    return 0 if all(check.passed for check in made) else 1


if __name__ == "__main__":
    sys.exit(main())
