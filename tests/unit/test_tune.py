"""The rule by which a testbed's learning rate is chosen, and how a validation dump is read."""

import json

import pytest

from darts.testbed.tune import acceptable, chosen, lengths_and_accuracy, main, table


def result(after: float, p99: float = 200.0) -> dict[str, float]:
    return {
        "accuracy_before": 0.5, "accuracy_after": after, "p99_before": 256.0, "p99_after": p99,
        "mean_before": 50.0, "mean_after": 45.0,
    }  # fmt: skip


def test_acceptable_needs_a_rise_beyond_noise_and_the_tail():
    assert acceptable(result(0.7))
    assert not acceptable(result(0.53)), "0.03 is within two standard errors of 800 samples"
    assert not acceptable(result(0.9, p99=127.0))


def test_each_arm_gets_its_best_acceptable_rate():
    results = {"plain@1e-05": result(0.6), "plain@0.0001": result(0.8), "plain@0.001": result(0.99, p99=60.0),
               "darts@1e-05": result(0.7), "darts@0.0001": result(0.5)}  # fmt: skip
    assert chosen(results, "plain") == "plain@0.0001"
    assert chosen(results, "darts") == "darts@1e-05"
    assert chosen({}, "plain") is None
    lines = table(results).splitlines()
    assert sum("chosen" in line for line in lines) == 2
    assert "| plain | 0.001 | 0.500 -> 0.990 | 256 -> 60 | 50 -> 45 | not acceptable |" in lines


def test_lengths_of_a_dump_count_the_end_token_but_not_beyond_the_limit(tmp_path):
    rows = [{"output": "abc", "score": 1.0}, {"output": "a" * 8, "score": 0.0}, {"output": "a" * 7, "score": 0.5}]
    path = tmp_path / "0.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths, accuracy = lengths_and_accuracy(path, limit=8)
    assert lengths.tolist() == [4, 8, 8]
    assert accuracy == 0.5


def test_runs_of_other_steps_are_not_mixed_in(tmp_path, capsys):
    (tmp_path / "depth").mkdir()
    kept = {"testbed": "depth", "steps": 5, "assets": "other", "runs": {"plain@0.0001": result(0.8)}}
    (tmp_path / "depth" / "tune.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit):
        main(["--testbed", "depth", "--out", str(tmp_path)])
    assert "holds runs of other steps or assets" in capsys.readouterr().err
