"""What dies, raises or is interrupted in the middle of a run ends it, with the cause."""

import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import ROOT, SUPPORT, Run, run_job

SETTINGS = ["--config-name", "quickstart", "trainer.val_before_train=false", "trainer.save_freq=-1"]


def check_end(run: Run) -> None:
    """The run ended by itself with an error, after one step, and left nothing behind."""
    assert run.returncode not in (0, None, -9)
    steps = [metrics for metrics in run.metrics() if "timing_s/step" in metrics]
    assert len(steps) == 1, "nothing was trained on a shorter batch"


@pytest.mark.slow
def test_a_killed_engine_ends_the_run_with_the_cause(tmp_path):
    """The engine's process is killed with SIGKILL, as an out-of-memory killer does, in the second step."""
    command = [sys.executable, "-m", "recipe.darts.main_darts", *SETTINGS]
    run = run_job(command, tmp_path, DARTS_TEST_KILL_AFTER="130")
    killed = [record for record in run.records() if "killed" in record]
    assert len(killed) == 1
    assert killed[0]["killed"], "an engine process was found and killed"
    check_end(run)
    assert "CandidateError" in run.output
    assert "of prompt uid=" in run.output
    assert "EngineDeadError" in run.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "cause"), [("raise", "MemoryError: scripted: out of memory"), ("die", r"Actor(Died|Unavailable)Error")]
)
def test_a_rank_of_the_overlapped_actor_that_fails_ends_the_run_with_the_cause(tmp_path, trouble, cause):
    """The other rank waits for it in a collective."""
    command = [
        sys.executable, SUPPORT / "failing_actor.py", *SETTINGS, "darts.placement=disaggregated",
        "trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
    ]  # fmt: skip
    run = run_job(command, tmp_path, DARTS_TEST_ACTOR_TROUBLE=trouble)
    assert sum("failed" in record for record in run.records()) == 1
    check_end(run)
    assert "the overlapped actor failed" in run.output
    assert re.search(cause, run.output)
    ranks = [record["actor"] for record in run.records() if "actor" in record]
    assert len(ranks) == 2
    deadline = time.monotonic() + 300
    while any(map(psutil.pid_exists, ranks)):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.5)


def processes_of(folder: Path) -> list[psutil.Process]:
    """What the quickstart with this DARTS_OUT has started: those with it in their environment, and their descendants,
    since some of Ray's and vLLM's processes write their title over it."""
    everyone = {process.pid: process for process in psutil.process_iter(["name", "ppid", "environ"])}

    def is_ours(process: psutil.Process | None) -> bool:
        if process is None:
            return False
        marked = (process.info["environ"] or {}).get("DARTS_OUT") == str(folder)
        return marked or is_ours(everyone.get(process.info["ppid"]))

    return [process for process in everyone.values() if is_ours(process)]


@pytest.mark.slow
def test_an_interrupted_quickstart_says_so_keeps_what_was_logged_and_leaves_nothing_running(tmp_path):
    """As Ctrl-C in a terminal: all processes of the foreground group get SIGINT."""
    before: list[psutil.Process] = []

    def two_steps_are_done(run: Run) -> bool:
        done = sum("timing_s/step" in metrics for metrics in run.metrics()) >= 2
        if done:
            before.extend(processes_of(tmp_path))
        return done

    command = ["env", "--default-signal=INT", "bash", str(ROOT / "scripts" / "quickstart.sh")]
    run = run_job(command, tmp_path, kill_when=two_steps_are_done, kill_with=signal.SIGINT)
    names = {process.info["name"] for process in before}
    assert "raylet" in names
    assert any(name.startswith("VLLM::EngineCor") for name in names)
    assert run.returncode == 130
    assert run.output.splitlines()[-1].endswith(f"interrupted; log and results so far are in {tmp_path}")
    assert "Traceback" not in run.output
    assert 2 <= sum("timing_s/step" in metrics for metrics in run.metrics()) < 10
    assert "KeyboardInterrupt" in (tmp_path / "run.log").read_text()
    _, left = psutil.wait_procs(before, timeout=300)
    assert not left
    assert not processes_of(tmp_path)
