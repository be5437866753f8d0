"""Whole runs as users start them, each in a folder of its own, with verl, Ray and vLLM as they are."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
RAY_TOO_SLOW = "The current node timed out during startup"
LIMIT_S = 1700.0
"""A limit of a run against hanging alone: ten times what the longest takes, and below that of a test."""


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    out: Path
    returncode: int
    output: str
    seconds: float
    ended: float

    def records(self) -> list[dict]:
        """What the server wrote: one line per request that ended, per rollout (`drained`) and per kill."""
        return [record for record in read_lines(self.out / "requests.jsonl") if "started" not in record]

    def started(self, weights: int) -> list[dict]:
        """The training requests that were started on the weights of a step."""
        return [
            record
            for record in read_lines(self.out / "requests.jsonl")
            if "started" in record and record["weights"] == weights and record["seed"] is not None
        ]

    def metrics(self) -> list[dict]:
        """verl's metrics by line of its file logger: validation before training, then each step."""
        return [record["data"] for record in read_lines(self.out / "metrics.jsonl")]

    def rows(self, step: int) -> list[dict]:
        """The rows that were trained on in a step, as verl dumps them."""
        return read_lines(self.out / "rollouts" / f"{step}.jsonl")

    def trained_model(self) -> Path:
        last = (self.out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
        return self.out / "checkpoints" / f"global_step_{last}" / "actor" / "huggingface"


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file that may be growing, or not be there yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_job(
    command: list[str],
    out: Path,
    kill_when: Callable[[Run], bool] | None = None,
    kill_with: signal.Signals = signal.SIGKILL,
    **environment: str,
) -> Run:
    """Runs a command in `out` with the tests' modules importable in Ray's workers, within `LIMIT_S`.

    With `kill_when` its process group gets `kill_with` as soon as that is true of what it has left behind so far. Where
    Ray itself did not start, for which it allows a node 30 s whatever the machine has to do, the job begins again.
    """
    for _ in range(2):
        run = _run_once(command, out, kill_when, kill_with, **environment)
        if run.returncode == 0 or RAY_TOO_SLOW not in run.output:
            break
    return run


def _run_once(
    command: list[str],
    out: Path,
    kill_when: Callable[[Run], bool] | None,
    kill_with: signal.Signals,
    **environment: str,
) -> Run:
    out.mkdir(parents=True, exist_ok=True)
    overrides = [
        f"+ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH={SUPPORT}",
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=recording",
        f"trainer.rollout_data_dir={out / 'rollouts'}",
    ]
    settings = {
        "DARTS_TEST_RECORD": str(out / "requests.jsonl"),
        "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
        "DARTS_OUT": str(out),
        "HYDRA_FULL_ERROR": "1",
        **environment,
    }
    start = time.time()
    with open(out / "output.log", "w") as log:
        process = subprocess.Popen(
            [*command, *overrides], cwd=out, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if kill_when is not None and kill_when(Run(out, 0, "", 0.0, 0.0)):
                os.killpg(process.pid, kill_with)
                kill_when = None
            if time.time() > start + LIMIT_S:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    output = (out / "output.log").read_text(errors="replace")
    return Run(out, process.returncode, output, time.time() - start, time.time())
