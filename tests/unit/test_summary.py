"""The end of a run: what it says, and when it fails."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from darts.config import STRATEGIES
from darts.report.summary import main, read_metrics, summarise, weight_change

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
    "darts/candidates/aborted": 12.0,
    "darts/early_stop/stop_s_mean": 0.02,
    "darts/group/saturated_share": 0.5,
    "darts/group/mixed_reward_share": 0.75,
}


@pytest.fixture
def run(tmp_path):
    """A folder as the quickstart leaves it: metrics of two steps and two validations, two models, a configuration."""

    def make(moved: float = 0.1, step=STEP, saturating: bool = True, allocation=None, strategy="darts", **changes):
        first = {"response_length/mean": 32.0, "critic/score/mean": 0.4} | step | changes
        lines = [
            {"val-core/x/acc/mean@1": 0.5},
            first,
            first | {"darts/length/pool_mean": 45.0, "val-core/x/acc/mean@1": 0.6},
        ]
        if "darts/length/pool_mean" not in step:
            del lines[2]["darts/length/pool_mean"]
        text = "".join(json.dumps({"step": number, "data": line}) + "\n" for number, line in enumerate(lines))
        (tmp_path / "metrics.jsonl").write_text(text)
        after = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
        for folder, value in ((tmp_path / "before", 1.0), (after, 1.0 + moved)):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"weight": torch.full((3,), value)}, folder / "model.safetensors")
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
        (tmp_path / "hydra" / ".hydra").mkdir(parents=True, exist_ok=True)
        saturated = {"mode": "uniform", "mean_candidates": 10.5, "high": 11}
        allocation = allocation or (saturated if saturating else {})
        config = {
            "actor_rollout_ref": {"model": {"path": str(tmp_path / "before")}, "rollout": {"n": 8}},
            "darts": {"strategy": strategy, "allocation": allocation},
        }
        (tmp_path / "hydra" / ".hydra" / "config.yaml").write_text(json.dumps(config))
        return [str(tmp_path)]

    return make


def test_a_good_run_ends_with_a_summary_and_0(run, capsys):
    assert main(run()) == 0
    text = capsys.readouterr().out
    assert "50 -> 45 tokens, with what was aborted" in text
    assert "24 candidates, stopped in 20 ms" in text
    assert "32 -> 32 tokens, the kept" in text
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


def test_settings_that_saturate_nobody_are_not_asked_for_it(run):
    assert main(run(saturating=False, **{"darts/group/saturated_share": 0.0})) == 0


def test_adaptive_budgets_have_to_differ_once_prompts_are_known(run, capsys):
    adaptive = {"mode": "adaptive", "mean_candidates": 10.5, "high": 12}
    same = {"darts/allocation/budget_min": 10.0, "darts/allocation/budget_max": 11.0}
    known = {"darts/history/known_share": 1.0}
    assert main(run(allocation=adaptive, **same | known)) == 1
    assert capsys.readouterr().err == "FAILED: no budgets differed by more than one\n"
    assert main(run(allocation=adaptive, **same)) == 0, "nothing was known"
    assert main(run(allocation=adaptive | {"mean_candidates": 12}, **same | known)) == 0, "all at M_up"
    spread = same | known | {"darts/allocation/budget_min": 8.0, "darts/history/std_correlation": 0.5}
    assert main(run(allocation=adaptive, **spread)) == 0
    assert "8 to 11 candidates; predicted std correlates by 0.50 with observed" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_asked_only_for_what_their_rules_promise(run, capsys, strategy):
    """With the quickstart's block and known prompts; none but `darts` gives prompts different budgets."""
    asked = {"darts": ["no candidate was dropped", "no budgets differed by more than one"]}
    asked |= {"shortest_k": asked["darts"][:1], "tail_batching": asked["darts"][:1]}
    idle = {"darts/candidates/dropped": 0.0, "darts/group/saturated_share": 0.0, "darts/history/known_share": 1.0}
    idle |= {"darts/allocation/budget_min": 10.0, "darts/allocation/budget_max": 10.0}
    adaptive = {"mode": "adaptive", "mean_candidates": 10.5, "high": 12}
    main(run(strategy=strategy, allocation=adaptive, **idle))
    assert capsys.readouterr().err.splitlines() == [f"FAILED: {problem}" for problem in asked.get(strategy, [])]


@pytest.mark.parametrize("allocation", [{"mode": "off"}, {"mode": "uniform", "mean_candidates": 8}])
def test_a_run_that_launches_m_candidates_is_not_asked_to_drop_one(run, allocation):
    assert main(run(allocation=allocation, **{"darts/candidates/dropped": 0.0})) == 0


@pytest.mark.parametrize("mode", ["adaptive", "uniform"])
@pytest.mark.parametrize("mean_candidates", ["plan", "utility"])
def test_where_the_number_of_candidates_is_found_out_nothing_is_asked_that_it_decides(run, mode, mean_candidates):
    """A plan may choose M candidates, and budgets of M or M_up do not differ."""
    idle = {"darts/group/saturated_share": 0.0, "darts/history/known_share": 1.0}
    idle |= {"darts/allocation/budget_min": 8.0, "darts/allocation/budget_max": 8.0}
    idle |= {"darts/candidates/dropped": 0.0} if mean_candidates == "plan" else {}
    assert main(run(allocation={"mode": mode, "mean_candidates": mean_candidates}, **idle)) == 0


def test_a_run_of_plain_verl_is_summarised_and_asked_only_whether_it_learnt(run, capsys):
    plain = {"timing_s/step": 1.0, "timing_s/gen": 0.5}
    assert main(run(step=plain)) == 0
    text = capsys.readouterr().out
    assert "2, plain verl" in text
    assert "nan" not in text
    assert main(run(step=plain, moved=0.0)) == 1


def test_a_run_without_a_step_or_a_model_says_so(run, tmp_path, capsys):
    arguments = run()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    assert main(arguments) == 1
    assert "no checkpoint, so nobody can say whether the weights moved" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(arguments) == 1
    assert "no training step was logged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        weight_change(tmp_path, tmp_path)


def test_missing_figures_are_not_invented(tmp_path):
    assert "not measured" in summarise(pd.DataFrame([STEP]), [], 0.1)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 1, "data": {"timing_s/step": 1.0}}) + "\n")
    assert "nan" in summarise(*read_metrics(path), 0.1)
