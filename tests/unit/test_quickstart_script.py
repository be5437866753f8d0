"""`scripts/quickstart.sh` without training: what becomes of the last run's results. A stub stands for Python."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As Python is called: for the platform, to train (as STUB says), for the summary, for the report.
PYTHON = """#!/bin/bash
case "$*" in
  -c*) echo cpu ;;
  *main_darts*) mkdir -p hydra; echo "$STUB" > hydra/config.yaml; eval "$STUB" ;;
  *darts.report.summary*) echo "Summary of the run" ;;
esac
"""
TRAIN = """
echo '{"step":1,"data":{}}' >> metrics.jsonl; echo '{"step":2,"data":{}}' >> metrics.jsonl
mkdir -p checkpoints/global_step_1/actor; touch checkpoints/global_step_1/actor/model_world_size_1
echo -n 1 > checkpoints/latest_checkpointed_iteration.txt; echo "[darts] step 2/2"
"""
REFUSED = "echo '[darts] In quickstart: Could not find testbed/dephts' >&2; exit 2"
WITHOUT_RESULTS = {
    "refused": REFUSED,
    "refused by the parser": "echo 'usage: main_darts'; echo 'error: unrecognized arguments: --bogus' >&2; exit 2",
    "Hydra's exit code": "echo 'Key dart is not in struct' >&2; exit 1",
    "no engine": "mkdir -p checkpoints; touch checkpoints/latency.json metrics.jsonl; echo 'no memory'; exit 1",
    "interrupted": "exit 130",
    "only asked": "echo 'the composed configuration'",
}


@pytest.fixture
def quickstart(tmp_path):
    """Runs a copy of the script with the stub; `quickstart.out` is the folder of its results."""
    scripts, binaries = tmp_path / "scripts", tmp_path / ".venv" / "bin"
    scripts.mkdir()
    binaries.mkdir(parents=True)
    for name in ("quickstart.sh", "lib.sh"):
        shutil.copy(ROOT / "scripts" / name, scripts)
    for path, text in ((scripts / "setup.sh", "#!/bin/sh\n"), (binaries / "python", PYTHON)):
        path.write_text(text)
        path.chmod(0o755)

    def quickstart(stub: str, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", scripts / "quickstart.sh"], capture_output=True, text=True, timeout=600,
            env=os.environ | {"STUB": stub, "DARTS_OUT": str(quickstart.out)} | changes, start_new_session=True,
        )  # fmt: skip

    quickstart.out = tmp_path / "out"
    return quickstart


def contents(folder: Path) -> dict[str, str]:
    """What the files below a folder say, but the log of a run that failed and the mark of the folder."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("failed.log", ".quickstart")
    }


@pytest.mark.parametrize(
    ("ending", "resume"),
    [*((ending, "") for ending in WITHOUT_RESULTS), ("refused", "1"), ("no engine", "1")],
)
def test_runs_that_end_before_they_have_results_leave_the_last_ones(quickstart, ending, resume):
    assert quickstart("echo first; " + TRAIN).returncode == 0
    assert quickstart("echo second; " + TRAIN).returncode == 0
    good = contents(quickstart.out)
    assert "first" in good["previous/run.log"]
    for _ in range(2):
        failed = quickstart(WITHOUT_RESULTS[ending], DARTS_RESUME=resume)
        assert failed.returncode not in (0, 127)
        left_behind = contents(quickstart.out)
        if resume:
            left_behind.pop("checkpoints/latency.json", None)
        assert left_behind == good
    assert (quickstart.out / "failed.log").is_file()


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("refused", 2, "Could not find testbed/dephts"),
        ("refused by the parser", 2, "error: unrecognized arguments: --bogus"),
        ("Hydra's exit code", 1, "Key dart is not in struct"),
        ("no engine", 1, "no memory"),
        ("interrupted", 130, "interrupted before there were results"),
        ("only asked", 1, "the composed configuration"),
    ],
)
def test_a_run_without_results_says_why_and_leaves_its_log_alone(quickstart, ending, code, said):
    run = quickstart(WITHOUT_RESULTS[ending])
    assert run.returncode == code
    assert said in run.stdout + run.stderr
    assert ("the settings were refused" in run.stdout) == (code == 2)
    assert "Summary of the run" not in run.stdout
    assert contents(quickstart.out) == {}


@pytest.mark.parametrize(("code", "said"), [(0, "Summary of the run"), (1, "exit code 1"), (2, "exit code 2"),
                                            (130, "interrupted; log and results so far")])  # fmt: skip
def test_a_run_with_results_moves_the_last_ones_aside_however_it_ends(quickstart, code, said):
    quickstart("echo first; " + TRAIN)
    first = contents(quickstart.out)
    run = quickstart(f"echo second; {TRAIN} exit {code}")
    assert run.returncode == code or (code == 2 and run.returncode == 1)
    assert said in run.stdout + run.stderr
    assert contents(quickstart.out / "previous") == first
    assert "second" in (quickstart.out / "run.log").read_text()
    assert not list(quickstart.out.glob(".[!q]*"))


def test_what_a_killed_run_had_set_aside_comes_back_with_the_next(quickstart):
    """Killed before it had results, and with some."""
    quickstart("echo first; " + TRAIN)
    good = contents(quickstart.out)
    assert quickstart("kill -9 0").returncode == -signal.SIGKILL
    assert not (quickstart.out / "metrics.jsonl").exists()
    quickstart(REFUSED)
    assert contents(quickstart.out) == good
    quickstart(TRAIN + "kill -9 0")
    quickstart(REFUSED)
    assert contents(quickstart.out / "previous") == good


def test_a_resumed_run_goes_on_from_its_checkpoint_in_one_file_of_metrics(quickstart):
    quickstart("echo first; " + TRAIN)
    resumed = quickstart("""echo '{"step":2,"data":"again"}' > metrics.jsonl""", DARTS_RESUME="1")
    assert resumed.returncode == 0
    assert (quickstart.out / "metrics.jsonl").read_text() == '{"step":1,"data":{}}\n{"step":2,"data":"again"}\n'
    nothing = quickstart("echo '[darts] nothing to train'", DARTS_RESUME="1")
    assert nothing.returncode == 0
    assert "Summary of the run" in nothing.stdout
    assert sorted(path.name for path in quickstart.out.iterdir()) == [
        ".quickstart", "checkpoints", "hydra", "metrics.jsonl", "run.log",
    ]  # fmt: skip
