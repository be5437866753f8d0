"""`scripts/slurm/ray.sbatch` on a real Slurm: two virtual nodes on this machine, Ray's GPUs logical."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jobs import ROOT, read_lines
from slurm_cluster import Job, SlurmCluster, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5000)]

LAUNCHER = ROOT / "scripts" / "slurm" / "ray.sbatch"
SHARED = ("--nodes=2", "--oversubscribe", "--cpus-per-task=8", "--mem=1000")
"""Two such jobs fit on the nodes at once."""
STARTS = 900
"""Seconds until COMMAND runs, on a busy machine."""
# Holds a GPU of every node, says what it and its actors see, and does nothing for a while.
LIGHT = """
import json, os, sys, time
import ray
ray.init(log_to_driver=False)

@ray.remote(num_gpus=1)
class Held:
    def environment(self):
        return dict(os.environ)

held = [Held.remote() for _ in range(int(os.environ["NNODES"]))]
print("SEEN", json.dumps([dict(os.environ), *ray.get([each.environment.remote() for each in held])]), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def slurm():
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))  # short: sockets lie in it
    folder.chmod(0o755)
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture
def submit(slurm, tmp_path):
    """Submits the launcher from a folder of the test's own; what is left is cancelled."""
    jobs = []

    def submit(command: str, *options: str, **environment: str) -> Job:
        own = {"COMMAND": command, "GPUS_PER_NODE": "1", "DARTS_TEST_JOB": f"{tmp_path.name}-{len(jobs)}"} | environment
        run = subprocess.run(
            ["sbatch", "--parsable", *options, str(LAUNCHER)], cwd=tmp_path, capture_output=True, text=True,
            env=slurm.environment | {name: value for name, value in own.items() if value},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        jobs.append(Job(slurm, run.stdout.strip(), tmp_path))
        return jobs[-1]

    yield submit
    for job in jobs:
        slurm.run("scancel", job.number)


@pytest.fixture
def light(tmp_path):
    program = tmp_path / "light.py"
    program.write_text(LIGHT)
    return lambda seconds, code=0: f"{sys.executable} {program} {seconds} {code}"


def seen(job: Job, attempt: int = 1) -> list[dict]:
    """The environments of COMMAND and of its actors."""
    found = re.search(r"^SEEN (.*)$", job.log("command.log", attempt), re.MULTILINE)
    return json.loads(found.group(1)) if found else []


def processes(**environment: str) -> list[str]:
    """Command lines of the processes that have all of this in their environment."""
    wanted, lines = {f"{name}={value}" for name, value in environment.items()}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                lines.append((process / "cmdline").read_text(errors="replace").replace("\0", " "))
    return lines


def errors(job: Job) -> list[str]:
    return [line for line in job.output().splitlines() if line.startswith("[ray.sbatch] error:")]


def test_a_job_smaller_than_the_run_is_one_line_and_starts_nothing(submit, light):
    job = submit(light(0), *SHARED, NNODES="3")
    job.wait(30)
    assert (job.field("JobState"), job.field("ExitCode")) == ("FAILED", "2:0")
    assert job.output().splitlines() == [
        "[ray.sbatch] error: NNODES=3: the job has 2 node(s). Fix: sbatch --nodes=3, or a smaller NNODES."
    ]
    assert not (job.folder / "slurm_logs").exists()


def test_a_command_on_two_nodes_has_the_environment_and_its_exit_code_is_the_jobs(submit, light):
    job = submit(light(1, code=7), *SHARED, "--time=30", MY_VARIABLE="with spaces")
    job.wait(STARTS)
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "7:0", "0")
    command, *actors = seen(job)
    assert sorted(actor["SLURMD_NODENAME"] for actor in actors) == ["n1", "n2"]
    assert command["SLURMD_NODENAME"] == "n1"
    assert (command["NNODES"], command["GPUS_PER_NODE"]) == ("2", "1")
    assert command["RAY_ADDRESS"]
    end = time.mktime(time.strptime(job.field("StartTime"), "%Y-%m-%dT%H:%M:%S")) + 30 * 60
    for environment in (command, *actors):
        assert environment["MY_VARIABLE"] == "with spaces"
        assert environment["MLP_CURRENT_CAPACITY_BLOCK_EXPIRATION_TIMESTAMP"] == str(int(end) - 300 - 60)
        assert environment["VERL_FILE_LOGGER_PATH"].endswith(f"slurm_logs/{job.number}/attempt-1/metrics.jsonl")
    assert "COMMAND ended with exit code 7" in job.output()
    assert job.log("ray-n1/gcs_server.out")
    assert job.log("ray-n2/raylet.out")
    assert processes(SLURM_JOB_ID=job.number) == []
    assert not list(Path(os.environ.get("RAY_TMPDIR", "/tmp")).glob(f"ray-{job.number}"))


def test_nodes_that_nobody_asked_for_are_named(submit):
    job = submit("true", *SHARED, NNODES="1")
    job.wait(STARTS)
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0")
    assert "warning: NNODES=1 of 2 nodes" in job.output()
    assert "n2" in re.search("warning:.*", job.output()).group()


def test_a_gpu_that_slurm_gave_and_ray_does_not_find_is_named(submit, light):
    """Slurm's GPU of n2 is none."""
    job = submit(light(0), "--gpus=1", "--cpus-per-task=8", "--mem=1000", GPUS_PER_NODE="", RAY_WAIT_SECONDS="20")
    job.wait(STARTS)
    assert (job.field("JobState"), job.field("ExitCode")) == ("FAILED", "1:0")
    assert "missing: n2 (0 of 1 GPUs)" in job.output()
    assert not job.log("command.log")


def test_a_ray_that_does_not_start_fails_at_once_with_its_nodes_name(submit, light, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && echo broken here && exit 5\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = submit(light(0), *SHARED, PYTHON=str(python))
    job.wait(STARTS)
    assert (job.field("JobState"), job.field("ExitCode")) == ("FAILED", "1:0")
    assert "broken here" in job.output()
    assert "Ray on n2 has ended" in errors(job)[-1]
    assert not job.log("command.log")


def test_scancel_ends_all_of_a_job_and_nothing_else(submit, light, slurm, tmp_path):
    """Beside it live a process, a Ray of its own, and a second job on the same nodes."""
    bystander = (
        "import ray, sys; ray.init(num_cpus=1, num_gpus=0, include_dashboard=False); print('up', flush=True); "
        "sys.stdin.readline(); f = ray.remote(lambda: 'alive'); print(ray.get(f.remote(), timeout=600), flush=True)"
    )
    own = os.environ | {"RAY_ADDRESS": "local"}
    other = subprocess.Popen(
        [sys.executable, "-c", bystander],
        env=own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        job, second = submit(light(300), *SHARED), submit(light(20), *SHARED)
        for each in (job, second):
            each.wait(2 * STARTS, lambda each=each: bool(seen(each)))
        assert seen(job)[0]["RAY_ADDRESS"] != seen(second)[0]["RAY_ADDRESS"]
        mark = seen(job)[0]["DARTS_TEST_JOB"]
        assert len(processes(DARTS_TEST_JOB=mark)) > 10
        slurm.run("scancel", job.number)
        job.wait(STARTS)
        end = time.monotonic() + 100
        while (left := processes(DARTS_TEST_JOB=mark)) and time.monotonic() < end:
            time.sleep(0.5)
        assert left == []
        assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0")
        second.wait(STARTS)
        assert (second.field("JobState"), second.field("ExitCode")) == ("COMPLETED", "0:0")
        answer, _ = other.communicate("go on\n", timeout=900)
        assert answer.split() == ["up", "alive"]
    finally:
        other.kill()


def test_a_job_that_is_preempted_runs_again(submit, light, slurm):
    job = submit(light(20), "--nodes=2", "--exclusive")
    job.wait(STARTS, lambda: bool(seen(job)))
    urgent = submit("true", "--nodes=2", "--exclusive", "--partition=first")
    urgent.wait(2 * STARTS)
    assert urgent.field("ExitCode") == "0:0"
    job.wait(2 * STARTS)
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("COMPLETED", "0:0", "1")
    assert seen(job, 1)
    assert seen(job, 2)


# --- training ---------------------------------------------------------------------------------------------------------


def quickstart(steps: int, *overrides: str) -> str:
    start = f"bash {ROOT / 'scripts' / 'quickstart.sh'} trainer.total_training_steps={steps} darts.latency.profile=off"
    return " ".join((start, "trainer.val_before_train=false", *overrides))


def test_the_quickstart_trains_on_two_nodes(submit, tmp_path):
    """One GPU each; the trainer's two ranks, and their servers, are on both."""
    out = tmp_path / "out"
    micro_batch = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32"
    command = quickstart(4, "trainer.nnodes=$NNODES", "trainer.n_gpus_per_node=$GPUS_PER_NODE", micro_batch)
    job = submit(command, "--nodes=2", "--exclusive", DARTS_OUT=str(out))
    ranks = [set(), set()]

    def both_have_ranks() -> bool:
        for node, found in zip(("n1", "n2"), ranks, strict=True):
            lines = processes(SLURM_JOB_ID=job.number, SLURMD_NODENAME=node)
            found |= {line for line in lines if line.startswith("ray::") and "WorkerDict" in line}
        return all(ranks)

    job.wait(10 * 240, both_have_ranks)
    job.wait(10 * 240)
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.log("command.log")[-3000:]
    assert "Summary of the run" in job.log("command.log")
    assert re.search(r"steps +4\b", job.log("command.log"))
    assert len(read_lines(out / "metrics.jsonl")) >= 4, "a variable that COMMAND set came to Ray's workers"


def test_a_run_that_slurm_interrupts_goes_on_where_it_was(submit, slurm, tmp_path):
    """USR1 before the time limit: the trainer has saved because of the job's end alone, and the job is requeued."""
    out, steps = tmp_path / "out", 7
    # No save before the last step but for the end of the job, which is told to be near from the start.
    command = quickstart(steps, "trainer.esi_redundant_time=600", "darts.state.strict=true")
    own = {"SBATCH_SIGNAL": "B:USR1@60", "DARTS_OUT": str(out), "DARTS_RESUME": "1"}
    job = submit(command, "--nodes=1", "--exclusive", "--time=10", **own)
    tracker = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    job.wait(10 * 240, lambda: tracker.exists() and int(tracker.read_text() or 0) >= 3)
    slurm.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait(10 * 60, lambda: job.field("Restarts") == "1")
    saved = int(tracker.read_text())
    assert 3 <= saved < steps
    assert f"step {saved}/{steps}" in job.log("command.log", 1)
    job.wait(10 * 300)
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.log("command.log", 2)[-3000:]
    second = job.log("command.log", 2)
    assert f"step {saved + 1}/{steps}" in second
    assert f"step {saved}/{steps}" not in second
    assert "resumed with the length history of" in second
    metrics = [line["data"] for line in read_lines(out / "metrics.jsonl")]
    trained = [data["training/global_step"] for data in metrics if "timing_s/step" in data]
    assert trained == list(range(1, steps + 1)), "of both attempts, none twice"
    assert re.search(rf"steps +{steps}\b", second)


def test_a_resumed_quickstart_that_is_refused_loses_nothing(tmp_path):
    """What was logged comes back, also what came after the checkpoint; verl's logger would begin anew."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    lines = [f'{{"step":{step},"data":{{"a":{step}}}}}\n' for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / ".quickstart").touch()
    own = {"DARTS_OUT": str(tmp_path), "DARTS_RESUME": "1"}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "darts.allocation.high=1"]
    for _ in range(2):
        run = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=1200)
        assert run.returncode == 2, run.stderr
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
        assert not (tmp_path / "metrics.earlier.jsonl").exists()
        assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_the_time_limit_requeues_at_most_max_restarts_times(submit, light):
    """The signal is Slurm's own."""
    job = submit(light(600), *SHARED, "--time=3", SBATCH_SIGNAL="B:USR1@80", MAX_RESTARTS="0")
    job.wait(200)
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "1:0", "0")
    assert "SIGUSR1: COMMAND is ended" in job.output()
    assert errors(job)[-1] == "[ray.sbatch] error: MAX_RESTARTS=0: not requeued again"
