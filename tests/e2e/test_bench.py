"""`python -m darts.bench --quick` as a user starts it: real verl, Ray and vLLM; stopped in the middle, it goes on."""

import json
import sys

import pytest
from jobs import run_job

from darts.bench.records import Records, StepRecord, ValidationRecord
from darts.bench.report import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ARMS, STEPS = ("none", "darts", "tail_batching"), 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bench that was killed in its third round, and then started again."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "darts.bench", "--quick", "--out", str(out / "bench")]
    records = Records(out / "bench" / "records.jsonl")
    killed = run_job(command, out / "killed", limit=600, kill_when=lambda run: len(records.read()) >= 2 * len(ARMS) + 4)
    assert killed.returncode == -9, killed.output[-3000:]
    again = run_job(command, out / "again", limit=900)
    assert again.returncode == 0, again.output[-3000:]
    assert "rounds are there; going on" in again.output
    assert again.seconds < 900, "quick is under 15 minutes"
    return out / "bench"


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
        assert (record.tokens_dropped == 0) == (record.arm == "none")
        if record.arm == "none":
            assert (record.launched, record.aborted) == (64, 0)
    tail = [record for record in records if record.arm == "tail_batching"]
    assert {record.launched for record in tail} <= {100, 64}
    assert sum(record.aborted for record in tail) > 0


def test_tables_figures_document_and_traces_are_there(folder):
    opened, results = load(folder / "bench.json")
    assert [arm["name"] for arm in opened["arms"]] == list(ARMS)
    assert opened["machine"]["verl"] == "0.9.1"
    assert opened["config"]["darts"]["allocation"]
    assert len(results.steps("none")) == STEPS
    assert "speed-up over none" in (folder / "table.md").read_text()
    assert {path.stem for path in folder.glob("*.png")} == {"seconds", "accuracy", "lengths", "phases"}
    for arm in ARMS:
        trace = folder / "traces" / "seed0" / f"{arm}.jsonl"
        lines = [json.loads(line) for line in trace.read_text().splitlines()]
        assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
