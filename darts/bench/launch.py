"""Runs a bench's trainer as a process of its own, and tells how far it is.

Contract: the process, and all that it starts, ends with this one, by SIGTERM and Ctrl-C too. A run whose log and
records do not grow for a while is ended with an error that names its log.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from darts.bench.harness import ENVIRONMENT, BenchError
from darts.bench.plan import RECORDS, BenchPlan
from darts.bench.records import Records, StepRecord
from darts.evidence.log import say

LOG = "run.log"
ROOT = Path(__file__).resolve().parents[2]
QUIET = {"VERL_LOGGING_LEVEL": "WARN"}
"""Verl's checkpoints say several lines each."""


def run_trainer(plan: BenchPlan, folder: Path, silence_s: float, lock: int | None = None) -> None:
    """Runs what is missing in a folder, with a line for each round.

    Args:
        plan: of the folder.
        folder: where the run finds its plan, and leaves its records and log.
        silence_s: the longest time without a word.
        lock: a file that the run inherits, and in which its process is named.

    Raises:
        BenchError: the run failed, or said nothing for too long; its log is named.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    say(f"{len(plan.arms)} arms x {plan.seeds} seeds x {plan.steps} steps in {folder}; starting the engine ...")
    with (folder / LOG).open("a") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-m", "darts.bench.trainer", str(folder)],
            cwd=ROOT,
            env=ENVIRONMENT | QUIET | dict(os.environ) | {"PYTHONPATH": path},
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],
        )
        if lock is not None:
            os.pwrite(lock, f"{child.pid}\n".encode(), 0)
        handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            _follow(child, plan, folder, silence_s)
        finally:
            _end(child)
            signal.signal(signal.SIGTERM, handler)
    if child.returncode:
        raise BenchError(f"the bench ended with exit code {child.returncode}; see {folder / LOG}")


def _follow(child: subprocess.Popen, plan: BenchPlan, folder: Path, silence_s: float) -> None:
    """Waits for the end, and tells what is new."""
    records, files = Records(folder / RECORDS), (folder / RECORDS, folder / LOG)
    total, num_arms = plan.seeds * plan.steps, len(plan.arms)
    heard_at = started_at = time.monotonic()
    sizes, first, complete = [-1, -1], None, 0  # bytes; rounds that were there before, and that are there
    while child.poll() is None:
        time.sleep(1)
        sizes_before, sizes = sizes, [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes != sizes_before:
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > silence_s:
            minutes = f"{silence_s / 60:g} minutes (--silence)"
            raise BenchError(f"the run has said nothing for {minutes}; see {folder / LOG}")
        if sizes[0] == sizes_before[0]:
            continue
        steps = [record for record in records.read() if isinstance(record, StepRecord)]
        complete_before, complete = complete, len(steps) // num_arms
        if first is None:
            first = complete
            if complete:
                say(f"{complete} of {total} rounds are there; going on")
        elif complete > complete_before:
            arm_seconds = sorted(f"{step.arm} {step.step_s:.2f}" for step in steps[-num_arms:])
            minutes = (total - complete) * (time.monotonic() - started_at) / max(complete - first, 1) / 60
            say(
                f"round {complete}/{total} (seed {steps[-1].seed}, step {steps[-1].step}), about {minutes:.0f} min "
                f"left; seconds: {', '.join(arm_seconds)}"
            )


def _end(trainer_process: subprocess.Popen) -> None:
    """Ends the run and all that it started."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if trainer_process.poll() is None:
            os.killpg(trainer_process.pid, signal_number)
            with suppress(subprocess.TimeoutExpired):
                trainer_process.wait(timeout=30)
