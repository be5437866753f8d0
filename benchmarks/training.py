"""Trains the testbeds with adaptive and with uniform budgets, and compares what the runs left behind.

    python -m benchmarks.training --out outputs/training.json

Contract. Whole runs of the quickstart with verl, Ray and vLLM, which differ in `darts.allocation.mode` alone: equally
many candidates, bounds and seeds (prompts and their order, candidates, mini-batches). With these bounds no uniform
budget reaches M_up, so shortest-only groups, and what early stop saves, are in the adaptive arm alone.

1. Every testbed x seed x arm is one run; the arms alternate in time, and which of them is first alternates by seed. The
   forecasts' curve is measured once per testbed. Runs have folders in `--runs`; one whose trace has all steps is not
   repeated, any other starts anew.
2. Seconds and tokens are sums over the steps whose prompts are all known, from the second epoch on: before, budgets are
   uniform in both arms. Lengths and the accuracy in training are means over the first and the last epoch: of all
   candidates, aborted ones with the tokens that they had, and for the accuracy without them.
3. Validation: 4 responses to each of the testbed's 200 prompts, before the first step and after the last. Requests are
   not seeded there: what differs before the first step is noise.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.training_report import ADAPTIVE, UNIFORM, Steps, ratios_table, record_of, runs_table
from darts.report import ReportError
from darts.testbed import LIMITS
from darts.testbed.rollouts import ENVIRONMENT, rotated, say

ARMS = (UNIFORM, ADAPTIVE)


def planned(testbeds: Sequence[str], seeds: int) -> Iterator[tuple[str, int, str]]:
    """Testbed, seed and arm of each run, in the order in which they run."""
    for testbed, seed in itertools.product(testbeds, range(seeds)):
        yield from ((testbed, seed, arm) for arm in rotated(ARMS, seed))


def steps_of(folder: Path) -> Steps:
    """What a run's trace has; nothing where there is none."""
    try:
        return common.trace_metrics(folder)
    except ReportError:
        return {}


def call(command: Sequence[str], log: Path, **environment: str) -> None:
    """Runs a module of this project; the log opens with the command.

    Raises:
        RuntimeError: it failed; its log is named.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        file.write(f"{' '.join(command)}\n")
        file.flush()
        code = subprocess.run(
            [sys.executable, "-m", *command],
            env={**ENVIRONMENT, **os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=3600,
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; see {log}")


def train(folder: Path, profile: Path, where: Sequence[str], seed: int, arm: str, steps: int) -> None:
    """One run, unless it is there.

    Raises:
        RuntimeError: it failed, or the folder has a whole run of other settings.
    """
    command = [
        "recipe.darts.main_darts", "--config-name", "quickstart", *where, f"darts.allocation.mode={arm}",
        f"darts.seed={seed}", f"data.seed={seed}", f"actor_rollout_ref.actor.data_loader_seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}", "actor_rollout_ref.rollout.val_kwargs.n=4",
        f"darts.latency.profile={profile}", f"darts.trace={folder}/darts.jsonl",
        f"trainer.total_training_steps={steps}", "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/checkpoints", f"hydra.run.dir={folder}/hydra",
    ]  # fmt: skip
    log = folder / "run.log"
    if len(steps_of(folder)) == steps:
        with log.open() as file:
            if file.readline() != f"{' '.join(command)}\n":
                raise RuntimeError(f"{folder}: a run of other settings; choose another --runs, or remove it")
        return
    say(f"{folder.parent.name}, {folder.name}: training ...")
    shutil.rmtree(folder, ignore_errors=True)
    call(command, log, VERL_FILE_LOGGER_PATH=str(folder / "metrics.jsonl"))


def run(options: argparse.Namespace, opening: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs what is missing, and reads all; what is there is saved after each run."""
    from darts.summary import read_validation
    from verl_patches.device import is_cpu_only

    platform, records = "cpu" if is_cpu_only() else "gpu", []
    for testbed, seed, arm in planned(options.testbeds, options.seeds):
        where = [f"testbed={testbed}", f"platform={platform}", *options.override]
        root = options.runs.resolve() / testbed
        folder, profile = root / f"steps{options.steps}-seed{seed}-{arm}", root / "latency.json"
        if not profile.is_file():
            say(f"{testbed}: measuring the engine ...")
            command = ["darts.latency", "profile", *where, f"--out={profile}"]
            call(command, root / "latency.log")
        train(folder, profile, where, seed, arm, options.steps)
        figures = record_of(steps_of(folder), read_validation(folder / "metrics.jsonl"))
        records.append({"testbed": testbed, "seed": seed, "arm": arm, "run": str(folder)} | figures)
        say(f"{testbed}, {folder.name}: rollouts with known prompts took {figures['seconds']:.1f} s")
        common.save(options, opening, records=records)
    # as the arms are listed, for the tables
    return sorted(
        records, key=lambda run: (options.testbeds.index(run["testbed"]), run["seed"], ARMS.index(run["arm"]))
    )


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--testbeds", choices=sorted(LIMITS), nargs="+", default=sorted(LIMITS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of each testbed and arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of a run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("outputs/training"), help="folder (default: %(default)s)")
    parser.add_argument("--override", action="append", default=[], help="of all runs' Hydra configuration")
    options = parser.parse_args(given)
    records = run(options, common.document(options))
    print(f"\n{runs_table(records)}\n\n{ratios_table(records)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
