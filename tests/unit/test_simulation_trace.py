"""Traces: CSV files, the JSONL of runs, what is censored, and what is refused."""

import gzip
import json

import numpy as np
import pytest

from darts.evidence.trace import TraceError, read_steps
from darts.simulation import SimulationError
from darts.simulation.trace import read_trace

HEADER = "step,prompt,candidate,reward,response_length\n"
GOOD = HEADER + "7,b,0,1.0,30\n7,b,2,,50\n7,a,0,-1,10\n6,a,0,0.5,11\n"


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["lengths.csv", "lengths.csv.gz"])
def test_a_csv_file(tmp_path, name):
    trace = read_trace(write(tmp_path / name, GOOD))
    assert [(prompt.step, prompt.key, prompt.lengths.tolist()) for prompt in trace.prompts] == [
        (6, "a", [11]),
        (7, "b", [30, 50]),
        (7, "a", [10]),
    ]
    assert trace.prompts[1].reward.tolist() == pytest.approx([1.0, np.nan], nan_ok=True)
    assert (trace.steps, trace.response_length, trace.prompts_per_step) == ([6, 7], 51, 1)
    assert [prompt.key for prompt in trace.between(7, None).prompts] == ["b", "a"]
    with pytest.raises(SimulationError, match=r"has steps 6 to 7, none of 8 to None"):
        trace.between(8, None)


def test_truncated_candidates_say_what_the_limit_is(tmp_path):
    text = "response_length,truncated,candidate,prompt,step\n40,1,0,a,1\n12,0,1,a,1\n13,,2,a,1\n"
    trace = read_trace(write(tmp_path / "lengths.csv", text))
    assert trace.prompts[0].truncated.tolist() == [True, False, False]
    assert trace.response_length == 40


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step,prompt,candidate,length\n1,a,0,5\n", "line 1: column response_length is missing; found: step, prompt"),
        ("", "line 1: column step is missing; found: none"),
        (HEADER, "line 2: holds no rows below its header"),
        (GOOD + "7,a,1,0,-4\n", r"line 6: response_length='-4'; a trace is a whole number of tokens in \[1, "),
        (GOOD + "7,a,1,0,0\n", "line 6: response_length='0'"),
        (GOOD + "7,a,1,0,4.5\n", "line 6: response_length='4.5'; a trace is a whole number of tokens"),
        (GOOD + "7,a,1,0,nan\n", "line 6: response_length='nan'"),
        (GOOD + "7,a,1,0\n", "line 6: response_length=None"),
        (GOOD + "7,a,1,0,99999999999999\n", "line 6: response_length='99999999999999'"),
        (GOOD + "x,a,1,0,4\n", "line 6: step='x'; a trace is a whole number"),
        (GOOD + "7,a,1,good,4\n", "line 6: reward='good'"),
        (GOOD + "7,,1,0,4\n", "line 6: prompt=''"),
        (GOOD + "7,b,2,0,4\n", "line 6: step=7, prompt=b, candidate=2 is there twice"),
        ("step,prompt,candidate,response_length,truncated\n1,a,0,5,2\n", "line 2: truncated='2'; a trace is 0 or 1"),
    ],
)
def test_a_bad_csv_file_is_one_error_with_file_and_line(tmp_path, text, told):
    path = write(tmp_path / "lengths.csv", text)
    with pytest.raises(SimulationError, match=told) as raised:
        read_trace(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SimulationError, match="cannot be read"):
        read_trace(tmp_path / "nothing.csv")
    with pytest.raises(TraceError, match=r"nothing.jsonl: cannot be read \(No such file or directory\); give"):
        read_trace(tmp_path / "nothing.jsonl")
    with pytest.raises(SimulationError, match="is a folder; give the CSV file"):
        read_trace(tmp_path)
    for name, content in (("plain.csv.gz", GOOD.encode()), ("cut.csv.gz", gzip.compress(GOOD.encode())[:40])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SimulationError, match="cannot be read"):
            read_trace(tmp_path / name)
    (tmp_path / "zipped.csv").write_bytes(gzip.compress(GOOD.encode()))
    with pytest.raises(SimulationError, match=r"must be CSV as UTF-8 text|column step is missing"):
        read_trace(tmp_path / "zipped.csv")


# --- runs ------------------------------------------------------------------------------------------------------------


def line(step, lengths, fates, reward=None, **changes):
    rollout = {"key": [f"p{n}" for n in range(len(lengths))], "budget": [], "length": lengths, "fate": fates}
    rollout |= {"reward": reward} if reward else {}
    record = {"version": 1, "step": step, "at": 0.0, "metrics": {"timing_s/gen": 2.0}, "rollout": rollout} | changes
    return json.dumps(record) + "\n"


def run_of(tmp_path, *lines):
    path = tmp_path / "darts.jsonl"
    path.write_text("".join(lines))
    return path


def test_a_run(tmp_path):
    path = run_of(
        tmp_path,
        line(1, [[9, 9]], ["kk"]),
        line(2, [[5, 6], [7, 8]], ["kd", "ft"], reward=[[1, None], [0.5, 0]]),
        line(1, [[10, 20, 3], [30, 40, 0]], ["kkx", "kkx"]),  # a resume
        line(2, [[1, 2]], ["kk"])[:-9],
    )
    trace = read_trace(path)
    assert [(prompt.step, prompt.key, prompt.lengths.tolist()) for prompt in trace.prompts] == [
        (1, "p0", [10, 20]),
        (1, "p1", [30, 40]),
    ]
    assert list(trace.notes) == [
        "Line 4, the last, was cut off (a killed run?) and is left out",
        "Repeated or undone by a resume: 2 steps; only what replaced them counts",
        "2 of 6 candidates were lost by servers and are dropped",
    ]
    (step,), _ = read_steps(path, lambda step: step)
    assert (step.number, step.line, step.metrics["timing_s/gen"]) == (1, 3, 2.0)
    whole = read_trace(run_of(tmp_path, line(2, [[5, 6], [7, 8]], ["kd", "ft"], reward=[[1, None], [0.5, 0]])))
    assert whole.prompts[1].truncated.tolist() == [True, True]
    assert whole.prompts[0].reward.tolist() == pytest.approx([1.0, np.nan], nan_ok=True)


def test_a_prompt_that_is_launched_again_until_it_is_trained_on_counts_once(tmp_path):
    def launched(step, keys, lengths, fates):
        rollout = {"key": keys, "length": lengths, "fate": fates}
        return json.dumps({"version": 1, "step": step, "metrics": {}, "rollout": rollout}) + "\n"

    trace = read_trace(
        run_of(
            tmp_path,
            launched(1, ["a", "b", "c", "b"], [[1, 2], [9, 8], [3, 4], [70, 7]], ["kk", "dd", "kk", "da"]),
            launched(2, ["b", "b", "d"], [[5, 6], [80, 90], [1, 1]], ["kk", "dd", "kk"]),
            launched(3, ["b", "a"], [[60, 75], [2, 2]], ["kk", "kk"]),  # a again, in the next epoch
        )
    )
    assert [(prompt.step, prompt.key, len(prompt.lengths)) for prompt in trace.prompts] == [
        (1, "a", 2),
        (1, "b", 4),
        (1, "c", 2),
        (1, "b", 6),  # the data have it twice
        (2, "d", 2),
        (3, "a", 2),
    ]
    assert trace.prompts[1].lengths.tolist() == [9, 8, 5, 6]  # the first launch stands first
    assert trace.prompts[3].lengths[[0, 2, 3, 4, 5]].tolist() == [70, 80, 90, 60, 75]
    assert trace.prompts_per_step == trace.between(1, 1).prompts_per_step == 2  # that were trained on


def test_aborted_candidates_are_completed_and_that_is_said(tmp_path):
    path = run_of(
        tmp_path,
        line(1, [[10, 20, 20], [5, 5, 5], [100, 200, 400]], ["kka", "kka", "kkk"]),
        line(2, [[90, 95, 15], [5, 6, 5], [4, 9, 9]], ["kkk", "kka", "kaa"]),
    )
    for seed in range(5):
        trace = read_trace(path, seed)
        assert trace.prompts[0].lengths[2] in (90, 95)  # the same prompt's, longer than the part
        assert trace.prompts[1].lengths[2] == 6
        assert 9 <= trace.prompts[5].lengths[1] <= 400
        assert all((prompt.lengths > 0).all() for prompt in trace.prompts)
        (note,) = trace.notes
        assert note.startswith("CENSORED: 5 of 18 candidates (27.8%) were aborted")


def test_where_nothing_is_known_an_aborted_candidate_counts_with_what_it_had(tmp_path):
    trace = read_trace(run_of(tmp_path, line(1, [[10, 10, 0]], ["kaa"])))
    assert trace.prompts[0].lengths.tolist() == [10, 10, 10]  # the last never began: any is longer
    assert "1 were completed by draws from longer ones, 1 count with what they had" in trace.notes[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{\n", "line 1: must be JSON, but Expecting"),
        ("[]\n", "line 1: must be a step"),
        ("{}\n", r"line 1: must be a step, but KeyError\('version'\)"),
        (line(1, [[1]], ["k"], version=2), "line 1: version=2: must be 1"),
        (
            line(1, [[1, 2]], ["k"]),
            "but key, length, fate and reward are not of the same prompts",
        ),
        (line(1, [[1]], ["q"]), "line 1: must be a step, but fate='q' is not of 'kfcdtax'"),
        (
            line(1, [[5]], ["k"]) + line(2, [[-3]], ["k"]),
            "line 2: must be a step, but length=-3 with fate",
        ),
        (line(1, [[1.5]], ["k"]), "line 1: must be a step, but length=1.5"),
        (
            line(1, [[0]], ["k"]),
            r"but length=0 with fate=.k., must be a whole number of tokens in \[1, ",
        ),
        (
            line(1, [[-1]], ["a"]),
            r"but length=-1 with fate=.a., must be a whole number of tokens in \[0, ",
        ),
        (line(1, [], [], rollout=None), "line 1: no step has a rollout with a whole response"),
        ("", "must hold a whole step"),
    ],
)
def test_a_bad_run_is_one_error_with_file_and_line(tmp_path, text, told):
    path = run_of(tmp_path, text)
    with pytest.raises((SimulationError, TraceError), match=told) as raised:
        read_trace(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
