"""The end of a run: what it says, and when it fails."""

import json

import pytest
import torch
from safetensors.torch import save_file

from darts.summary import failures, main, read_steps, summarise, weight_change

STEP = {
    "timing_s/step": 3.0,
    "timing_s/gen": 1.5,
    "darts/length/pool_mean": 50.0,
    "darts/length/kept_mean": 30.0,
    "darts/reward/pool_mean": 0.4,
    "darts/reward/kept_mean": 0.5,
    "darts/candidates/launched": 84.0,
    "darts/candidates/dropped": 20.0,
    "darts/tokens/generated": 4000.0,
    "darts/tokens/dropped": 2000.0,
    "darts/group/saturated_share": 0.5,
    "darts/group/mixed_reward_share": 0.75,
}


@pytest.fixture
def run(tmp_path):
    """A folder with metrics of two steps between two validations, and two models."""

    def make(moved: float = 0.1, **changes: float):
        lines = [{"val-core/x/acc/mean@1": 0.5}, STEP | changes]
        lines += [lines[1] | {"darts/length/pool_mean": 45.0, "val-core/x/acc/mean@1": 0.6}]
        text = "".join(json.dumps({"step": number, "data": line}) + "\n" for number, line in enumerate(lines))
        (tmp_path / "metrics.jsonl").write_text(text)
        for name, value in (("before", 1.0), ("after", 1.0 + moved)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file({"weight": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
        return [
            str(tmp_path / "metrics.jsonl"),
            "--before",
            str(tmp_path / "before"),
            "--after",
            str(tmp_path / "after"),
        ]

    return make


def test_a_good_run_ends_with_a_summary_and_0(run, capsys):
    assert main(run()) == 0
    text = capsys.readouterr().out
    assert "50 -> 45 tokens, all candidates" in text
    assert "validation accuracy   0.50 -> 0.60" in text
    assert "40 of 168 candidates, 4000 of 8000 tokens" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"darts/candidates/dropped": 0.0}, "no candidate was dropped"),
        ({"darts/group/saturated_share": 0.0}, "no prompt was saturated"),
        ({"darts/group/mixed_reward_share": 0.0}, "no reward differed within a group"),
        ({"moved": 0.0}, "the weights did not move"),
    ],
)
def test_a_run_that_did_not_do_its_work_ends_with_1(run, capsys, changes, problem):
    assert main(run(**changes)) == 1
    assert capsys.readouterr().err == f"FAILED: {problem}\n"


def test_plain_verl_fails_all_of_darts_checks():
    assert len(failures([{"timing_s/step": 1.0}], moved=1.0)) == 3


def test_a_run_without_a_step_or_a_model_says_so(run, tmp_path, capsys):
    arguments = run()
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(arguments) == 1
    assert "no training step was logged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        weight_change(tmp_path, tmp_path / "after")


def test_missing_figures_are_not_invented(tmp_path):
    assert "not measured" in summarise([STEP], [], 0.1)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 1, "data": {"timing_s/step": 1.0}}) + "\n")
    assert "nan" in summarise(read_steps(path), [], 0.1)
