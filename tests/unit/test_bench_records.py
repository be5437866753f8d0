"""Records of a bench: slots and bubbles, a step's figures from its pool, and the file that a bench resumes from."""

import dataclasses
import json
import math

import numpy as np
import pytest
from bench_records import step, validation
from hypothesis import given
from hypothesis import strategies as st

from darts.bench.records import (
    JSON,
    TIMES,
    RecordError,
    Records,
    StepRecord,
    frame_of,
    records_of,
    step_record,
    table_of,
)
from darts.bench.slots import in_turns, slot_steps
from darts.pool import CandidatePool

# --- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engines", "max_running", "slots", "steps", "idle"),
    [
        ([[10, 30]], None, 2, 30, 20),  # the first slot idles while the second goes on
        ([[10, 30]], 1, 1, 40, 0),  # one after the other
        ([[10, 30, 15]], 2, 2, 30, 5),  # the third follows the first, until step 25
        ([[30, 10, 15]], 2, 2, 30, 5),
        ([[10, 10], [30]], 4, 3, 30, 40),  # an engine that is done waits for the other
        ([[7], []], 4, 1, 7, 0),  # an engine without candidates has no slots
        ([[5, 0, 0]], 8, 3, 5, 10),  # aborted before they began
        ([[], []], 4, 0, 0, 0),
    ],
)
def test_slot_steps(engines, max_running, slots, steps, idle):
    used = slot_steps(engines, max_running)
    assert (used.slots, used.steps, used.idle) == (slots, steps, idle)
    assert used.whole == slots * steps


@given(st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=3), st.integers(1, 8))
def test_slot_steps_are_those_of_a_queue_step_by_step(engines, max_running):
    ends, busy = [], 0
    for lengths in engines:
        waiting, running, now = list(lengths), [], 0
        while waiting or running:
            while waiting and len(running) < max_running:
                running.append(waiting.pop(0))
            running = [left for left in running if left > 0]
            while waiting and len(running) < max_running:
                running = [left for left in [*running, waiting.pop(0)] if left > 0]
            if running:
                now, busy = now + 1, busy + len(running)
                running = [left - 1 for left in running]
        ends.append(now)
    used = slot_steps(engines, max_running)
    assert (used.steps, used.decoded) == (max(ends), busy)
    assert used.idle >= 0


def test_candidates_are_dealt_out_in_turns():
    assert [part.tolist() for part in in_turns(np.arange(5), 2)] == [[0, 2, 4], [1, 3]]


# --- a step ----------------------------------------------------------------------------------------------------------

METRICS = {
    "timing_s/step": 3.0, "timing_s/gen": 1.5, "timing_s/old_log_prob": 0.25, "timing_s/update_actor": 0.5,
    "timing_s/update_weights": 0.125, "darts/strategy/queue": 6.0, "training/epoch": 0,
}  # fmt: skip


def made_pool(length, kept, reward=None, aborted=None, size=2):
    state = "d" if aborted is None else np.where(aborted, "a", "d")
    known = {} if reward is None else {"reward": reward}
    return CandidatePool.of([size] * (len(length) // size), length=length, state=state, kept=kept, **known)


def test_record_of_a_step():
    """Two prompts of two candidates; the second starts first. Two slots: 40 and 8, then 10 after 8, 20 after 18."""
    pool = made_pool([10, 20, 40, 8], [1, 1, 0, 1], [1, 0, math.nan, 1], [0, 0, 1, 0])
    record = step_record(
        arm="darts", seed=1, step=2, place=3, metrics=METRICS, pool=pool, launch_order=np.array([1, 0]), max_running=2
    )
    assert (record.step_s, record.rollout_s, record.old_log_prob_s, record.queue) == (3.0, 1.5, 0.25, 6)
    assert record.other_s == pytest.approx(3 - 1.5 - 0.25 - 0.5 - 0.125)
    assert (record.launched, record.aborted) == (4, 1)
    assert (record.tokens_generated, record.tokens_kept, record.tokens_dropped) == (78, 38, 40)
    assert (record.slots, record.slot_steps, record.idle_slot_steps) == (2, 80, 2)
    assert (record.kept_mean, record.kept_max, record.pool_max) == (pytest.approx(38 / 3), 20, 40)
    assert (record.reward_kept, record.reward_pool) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_what_is_not_measured():
    """No rewards; a phase that did not run took no time; without an order prompts start as they stand."""
    pool = made_pool([10, 20, 40, 8], [1] * 4)
    metrics = {key: 1.0 for name, key in TIMES.items() if name != "old_log_prob_s"}
    record = step_record(arm="bypass", seed=0, step=1, place=0, metrics=metrics, pool=pool, num_engines=2)
    assert (record.reward_kept, record.reward_pool, record.old_log_prob_s, record.queue) == (None, None, 0.0, 0)
    assert (record.slots, record.slot_steps) == (4, 160)
    assert record.served_difference is None


@pytest.mark.parametrize("missing", ["timing_s/step", "timing_s/gen", "timing_s/update_weights"])
def test_a_time_that_verl_no_longer_gives_is_an_error(missing):
    """And not a phase that took no time."""
    metrics = {key: 1.0 for key in TIMES.values() if key != missing}
    with pytest.raises(KeyError, match=missing):
        step_record(arm="none", seed=0, step=1, place=0, metrics=metrics, pool=made_pool([10], [1], size=1))


# --- the file --------------------------------------------------------------------------------------------------------


def test_records_come_back(tmp_path):
    records = Records(tmp_path / "new" / "records.jsonl")
    assert records.read() == []
    written = [validation(prompt_accuracy=(0.0, 1.0), mean_length=12.5), step(), step("darts", 1, 2, reward_kept=0.5)]
    for record in written:
        records.append(record)
    assert records.read() == written


def test_what_is_not_a_number_is_null(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    records.append(validation(accuracy=math.nan))
    assert records.read() == [validation(accuracy=None)]


def test_a_round_that_begins_again_is_removed(tmp_path):
    path = tmp_path / "records.jsonl"
    records = Records(path)
    whole = [validation(), validation("darts"), step(), step("darts")]
    for record in [*whole, step(number=2), validation(number=2)]:
        records.append(record)
    with path.open("a") as file:
        file.write('{"kind": "step", "arm')
    assert records.keep(lambda seed, number: (seed, number) <= (0, 1)) == whole
    assert records.read() == whole
    records.append(step(number=2, seconds=3.0))
    assert len(records.read()) == 5
    assert records.keep(lambda seed, number: False) == []
    assert path.read_text() == ""
    assert Records(tmp_path / "none.jsonl").keep(lambda seed, number: True) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "records.jsonl:2: Invalid JSON"),
        ('{"kind": "rollout"}', "records.jsonl:2: .*'rollout'.*'step', 'validation'"),
        ('{"kind": "validation", "arm": "a", "seed": 0, "step": 1}', "validation: accuracy: Field required"),
        (
            '{"kind": "validation", "arm": "a", "seed": 0, "step": 1, "accuracy": 1, "colour": 1}',
            "validation: colour: Unexpected keyword argument",
        ),
        ("[]", "should be an object"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, said):
    path = tmp_path / "records.jsonl"
    Records(path).append(step())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=said):
        Records(path).read()


def test_records_by_column():
    written = [step(), step("darts", 1, 2, 1 / 3, reward_kept=0.5)]
    columns = json.loads(json.dumps(table_of(StepRecord, [frame_of(StepRecord, written)])))
    assert columns["step_s"] == [2.0, 0.333333]
    assert records_of(StepRecord, columns) == [
        written[0],
        dataclasses.replace(written[1], step_s=0.333333, rollout_s=0.166667),
    ]
    assert records_of(StepRecord, table_of(StepRecord, [])) == records_of(StepRecord, {}) == []
    validated = JSON.validate_python({"kind": "validation", "arm": "a", "seed": 0, "step": 0, "accuracy": 1.0})
    assert validated.prompt_accuracy == ()
