"""`scripts/slurm` without Slurm: what is refused, and how steps are asked for. A stub stands for srun and scontrol."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "scripts" / "slurm" / "ray.sbatch"
SCONTROL = """#!/bin/bash
case "$2" in
  hostnames) printf '%s\\n' $NODES ;;
  node) echo "NodeName=$3 NodeAddr=127.0.0.1 NodeHostName=here" ;;
  job) echo "JobId=$3 JobName=a b"; echo "   EndTime=$END Deadline=N/A"; echo "   Command=$LAUNCHER more" ;;
esac
[[ $1 != requeue ]] || echo "$*" >> "$STUBS/requeued"
"""
# As Slurm's: notes how it was called, and plays Ray's head, the wait for it, or COMMAND.
SRUN = """#!/bin/bash
echo "$* RAY_ADDRESS=${RAY_ADDRESS:-}" >> "$STUBS/steps"
for word in "$@"; do
  case $word in
    --output=*) exec >"${word#--output=}" 2>&1 ;;
    */ray-address) echo 192.0.2.1:1 > "$word" ;;
  esac
done
case "$*" in
  *ray_node.py*) [[ $* == *--nodelist=$BROKEN* ]] && { echo no space left; exit 1; }; cat ;;
  *wait_for_ray.py*) [[ $BROKEN == none ]] || exec sleep 600; echo all there ;;
  *) exec bash -c "${@: -1}" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher as Slurm does: a copy of it, in a job of two nodes without GPUs, unless said otherwise."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("python", "#!/bin/sh\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    copy = shutil.copy(LAUNCHER, tmp_path / "slurm_script")

    def launch(**changes: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs), "LAUNCHER": str(LAUNCHER), "NODES": "n1 n2",
            "END": "Unknown", "BROKEN": "none", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_ON_NODE": "64", "COMMAND": "true", "GPUS_PER_NODE": "4",
            "PYTHON": str(stubs / "python"),
        }  # fmt: skip
        environment = {name: value for name, value in (environment | changes).items() if value}
        return subprocess.run(
            ["bash", copy], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )

    launch.steps = lambda: (stubs / "steps").read_text().splitlines() if (stubs / "steps").exists() else []
    launch.requeued = lambda: (stubs / "requeued").exists()
    return launch


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        ({"COMMAND": ""}, "COMMAND is not set"),
        ({"LAUNCHER": "/elsewhere/copy.sbatch", "SLURM_SUBMIT_DIR": "/elsewhere"}, "ray_node.py is not there"),
        ({"GPUS_PER_NODE": ""}, "GPUS_PER_NODE is not set, and Slurm gave no GPUs"),
        ({"GPUS_PER_NODE": "eight"}, "GPUS_PER_NODE=eight: must be a whole number of at least 1"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: must be"),
        ({"GPUS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}, "GPUS_PER_NODE=8: the job has 4 on a node"),
        ({"NNODES": "-1"}, "NNODES=-1: must be"),
        ({"NNODES": "3"}, "NNODES=3: the job has 2 node(s). Fix: sbatch --nodes=3"),
        ({"CPUS_PER_NODE": "15"}, "CPUS_PER_NODE=15: with 4 GPU(s) at least 16"),
        ({"SLURM_CPUS_ON_NODE": "1"}, "CPUS_PER_NODE=1: with 4 GPU(s) at least 16"),
        ({"MAX_RESTARTS": "often"}, "MAX_RESTARTS=often: must be"),
        ({"RAY_WAIT_SECONDS": "1.5"}, "RAY_WAIT_SECONDS=1.5: must be"),
        ({"RAY_TMPDIR": "/tmp/" + 40 * "x"}, "too long for Ray's sockets. Fix: at most 34 characters"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not there"),
        ({"LOG_DIR": "/proc/logs"}, "LOG_DIR=/proc/logs: cannot be written"),
        ({"END": "2001-01-01T00:00:00"}, "leaves no time to work"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_starts_nothing(launch, changes, said):
    run = launch(**changes)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("mkdir:")]
    assert run.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("[ray.sbatch] error: ")
    assert said in lines[0]
    assert run.stdout == ""
    assert launch.steps() == []


def test_every_step_says_what_it_wants(launch):
    """The GPUs of a node by number: the job's total, which srun would inherit, does not fit on one node."""
    run = launch(
        SLURM_GPUS_ON_NODE="4", GPUS_PER_NODE="", SRUN_ARGS="--container-image=an/image --mpi=none", SLURM_GPUS="8"
    )
    assert run.returncode == 0, run.stderr
    head, *others, command = launch.steps()
    worker, wait = sorted(others, key=lambda step: "wait_for_ray" in step)  # they start at the same time
    for step, node in ((head, "n1"), (worker, "n2"), (wait, "n1"), (command, "n1")):
        for option in (f"--nodelist={node}", "--overlap", "--gres=gpu:4", "--container-image=an/image", "--mpi=none"):
            assert option in step.split()
    assert "--num-gpus" not in head, "Ray counts what Slurm gave"
    assert head.endswith("RAY_ADDRESS=")
    assert "--address 192.0.2.1:1" in worker
    assert "--nodes n1 n2 --gpus 4" in wait
    assert command.endswith("RAY_ADDRESS=192.0.2.1:1")


def test_where_slurm_knows_no_gpus_ray_is_told(launch):
    assert launch().returncode == 0
    assert [step.count("--num-gpus 4") for step in launch.steps() if "ray_node" in step] == [1, 1]
    assert not any("--gres" in step for step in launch.steps())


@pytest.mark.parametrize("code", [0, 1, 2, 77])
def test_the_exit_code_is_the_commands_and_what_fails_is_not_requeued(launch, tmp_path, code):
    run = launch(COMMAND=f"echo $NNODES $GPUS_PER_NODE 'a b' $MINE; exit {code}", MINE="my own")
    assert run.returncode == code
    log = tmp_path / "slurm_logs" / "77" / "attempt-1" / "command.log"
    assert log.read_text() == "2 4 a b my own\n"
    assert (log.read_text() in run.stderr) == (code != 0)
    assert not launch.requeued()


def test_a_second_attempt_has_logs_of_its_own(launch, tmp_path):
    assert launch(COMMAND="echo $VERL_FILE_LOGGER_PATH", SLURM_RESTART_COUNT="1", LOG_DIR="logs").returncode == 0
    folder = tmp_path / "logs" / "77" / "attempt-2"
    assert (folder / "command.log").read_text() == f"{folder / 'metrics.jsonl'}\n"


def test_a_ray_that_ends_at_once_is_named(launch):
    run = launch(BROKEN="n2", COMMAND="sleep 600")
    assert run.returncode == 1
    assert "no space left" in run.stderr
    assert "error: Ray on n2 has ended" in run.stderr
    assert "COMMAND starts" not in run.stdout


def test_the_nodes_in_excess_are_named(launch):
    assert "warning: NNODES=1 of 2 nodes: idle are n2," in launch(NNODES="1").stdout


def test_verl_is_told_of_the_end_in_time_for_the_signal(launch, tmp_path):
    for signal, before in (("", 300), ("B:USR1@120", 120), ("B:SIGUSR1@600", 600)):
        run = launch(END="2100-01-01T00:00:00", TZ="UTC", SBATCH_SIGNAL=signal,
                     COMMAND="echo $MLP_CURRENT_CAPACITY_BLOCK_EXPIRATION_TIMESTAMP")  # fmt: skip
        assert run.returncode == 0, run.stderr
        log = tmp_path / "slurm_logs" / "77" / "attempt-1" / "command.log"
        assert int(log.read_text()) == 4102444800 - before - 60


def test_without_a_limit_verl_is_told_nothing(launch, tmp_path):
    """Not even what the job inherits from one that it was submitted from."""
    name = "MLP_CURRENT_CAPACITY_BLOCK_EXPIRATION_TIMESTAMP"
    assert launch(COMMAND=f"echo ${{{name}:-nothing}}", **{name: "1"}).returncode == 0
    assert (tmp_path / "slurm_logs" / "77" / "attempt-1" / "command.log").read_text() == "nothing\n"


def test_missing_nodes_and_gpus_are_named():
    spec = importlib.util.spec_from_file_location("wait_for_ray", LAUNCHER.with_name("wait_for_ray.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cluster = [
        {"NodeName": "n1", "Alive": True, "Resources": {"GPU": 8.0}},
        {"NodeName": "n2", "Alive": True, "Resources": {"GPU": 7.0}},
        {"NodeName": "n3", "Alive": False, "Resources": {"GPU": 8.0}},
        {"NodeName": "n4", "Alive": True, "Resources": {}},
    ]
    assert module.missing(["n1"], 8, cluster) == []
    assert module.missing(["n1", "n2", "n3", "n4"], 8, cluster) == ["n2 (7 of 8 GPUs)", "n3", "n4 (0 of 8 GPUs)"]


def test_the_launcher_parses():
    assert subprocess.run(["bash", "-n", str(LAUNCHER)]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    run = subprocess.run(["shellcheck", "-s", "bash", str(LAUNCHER)], capture_output=True, text=True)
    assert run.stdout == ""
