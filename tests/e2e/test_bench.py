"""`python -m darts.bench --quick` as a user starts it: real verl, Ray and vLLM; stopped in the middle, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from darts.bench.records import Records, StepRecord, ValidationRecord
from darts.bench.report import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(15000)]

ARMS, STEPS = ("none", "darts", "tail_batching"), 6


MARK = f"DARTS_TEST_BENCH={os.getpid()}"


def bench(folder: Path, log: Path, stop_when: Callable[[], bool] = lambda: False) -> tuple[int, str]:
    """Exit code and output; sends SIGTERM, as `kill` and Slurm do, once `stop_when` is true."""
    with log.open("w") as file:
        command = ["env", MARK, sys.executable, "-m", "darts.bench", "--quick", "--out", str(folder)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and not stop_when():
            time.sleep(0.1)
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=600)
    return process.returncode, log.read_text()


def still_running() -> list[str]:
    """Command lines of what any bench of this test has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if MARK.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bench that was stopped in its third round, and then started again."""
    out = tmp_path_factory.mktemp("bench")
    folder = out / "bench"
    records = Records(folder / "records.jsonl")
    enough = 2 * len(ARMS) + 1 + len(ARMS)  # two rounds, one step, and the initial actor's validation for each arm
    code, output = bench(folder, out / "first.log", lambda: len(records.read()) >= enough)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    patience = time.monotonic() + 300
    while still_running() and time.monotonic() < patience:
        time.sleep(0.5)
    assert still_running() == []
    code, output = bench(folder, out / "again.log")
    assert code == 0, (output + (folder / "run.log").read_text())[-3000:]
    assert "2 of 6 rounds are there; going on" in output
    return folder


def test_every_arm_has_every_step_once_and_the_same_validations(folder):
    records = Records(folder / "records.jsonl").read()
    steps = [(r.arm, r.step) for r in records if isinstance(r, StepRecord)]
    assert sorted(steps) == sorted((arm, step) for arm in ARMS for step in range(1, STEPS + 1))
    validations = [(r.arm, r.step) for r in records if isinstance(r, ValidationRecord)]
    assert sorted(validations) == sorted((arm, step) for arm in ARMS for step in (0, 3, 6))
    assert {len(r.prompt_accuracy) for r in records if isinstance(r, ValidationRecord)} == {200}


def test_the_arms_did_what_their_strategies_do(folder):
    records = [r for r in Records(folder / "records.jsonl").read() if isinstance(r, StepRecord)]
    for record in records:
        assert 0 < record.rollout_s < record.step_s
        assert (record.tokens_dropped == 0) == (record.launched == 64), "M candidates, all kept, or more of them"
        assert (record.arm, record.launched) in {
            ("none", 64),
            ("darts", 84),
            ("tail_batching", 64),
            ("tail_batching", 100),
        }
        if record.launched == 64:
            assert record.aborted == 0
        assert record.served_difference < 1e-5, "the servers have the arm's own weights"
    tail = [record for record in records if record.arm == "tail_batching"]
    assert {record.launched for record in tail} == {100, 64}, "short rounds, and a long one of what they left"
    assert sum(record.aborted for record in tail) > 0


def test_tables_figures_document_and_traces_are_there(folder):
    opened, results = load(folder / "bench.json")
    assert [arm["name"] for arm in opened["arms"]] == list(ARMS)
    assert opened["machine"]["verl"] == "0.9.1"
    assert opened["config"]["darts"]["allocation"]
    assert len(results.steps("none")) == STEPS
    assert "speed-up over none" in (folder / "table.md").read_text()
    assert {path.stem for path in folder.glob("*.png")} == {"seconds", "accuracy", "tradeoff", "lengths", "phases"}
    for arm in ARMS:
        trace = folder / "traces" / "seed0" / f"{arm}.jsonl"
        lines = [json.loads(line) for line in trace.read_text().splitlines()]
        assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
