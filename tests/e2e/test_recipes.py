"""A recipe of the paper's as it stands, on data that its own script prepared, with a model that a CPU can train: its
settings do not only compose, they work. The baseline too."""

import json
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Run, run_job

from darts.testbed import assets_dir

pytestmark = pytest.mark.slow
NAME = "run_qwen2.5_math_7b_dapo"
PROMPTS, M, STEPS, MAX_RESPONSE = 4, 8, 2, 256
KNOBS = {
    "MODEL_PATH": str(assets_dir("overthink") / "model"),
    "PYTHON": sys.executable,
    "NNODES": "1", "ULYSSES": "1", "ATTENTION": "sdpa", "ROLLOUT_TP": "1",
    "TRAIN_PROMPTS": str(PROMPTS), "MINI_BATCH_PROMPTS": str(PROMPTS), "TOTAL_STEPS": str(STEPS),
    # 576 positions: more than the model's 512, as in the recipe itself.
    "MAX_PROMPT": "320", "MAX_RESPONSE": str(MAX_RESPONSE),
}  # fmt: skip
ON_A_CPU = [
    "+platform=cpu", "actor_rollout_ref.model.use_remove_padding=False",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.rollout.max_num_seqs=64", "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
    "actor_rollout_ref.rollout.val_kwargs.n=1", "data.filter_overlong_prompts_workers=1", "darts.latency.profile_s=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prepared by the recipe's own script from rows like the published ones, each twice."""
    folder = tmp_path_factory.mktemp("data")
    sys.path.insert(0, str(ROOT / "scripts" / "data"))
    try:
        import prepare
        import published
    finally:
        sys.path.remove(str(ROOT / "scripts" / "data"))
    for name, first in (("raw", 10), ("val", 60)):
        rows = [
            {
                "prompt": [{"role": "user", "content": published.LINE.format(f"{number}+7")}],
                "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": str(number + 7)},
            }
            for number in range(first, first + 16)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines + lines))
    options = ["--source", folder / "raw.jsonl", "--val-source", folder / "val.jsonl", "--out", folder / "dapo_math"]
    assert prepare.main(["dapo_math", *map(str, options)]) == 0
    return folder


def run_recipe(name: str, data: Path, out: Path, *overrides: str, **knobs: str) -> Run:
    command = ["bash", str(ROOT / "recipe" / "darts" / f"{name}.sh"), *ON_A_CPU, *overrides]
    metrics = f"ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={out}/metrics.jsonl"
    return run_job([*command, metrics], out, **KNOBS, DATA_DIR=str(data), OUTPUT_DIR=str(out / "run"), **knobs)


def steps_of(run: Run) -> list[dict]:
    assert run.returncode == 0, run.output[-3000:]
    steps = [metrics for metrics in run.metrics() if "timing_s/step" in metrics]
    assert len(steps) == STEPS
    return steps


def test_the_recipe_trains_with_darts_on_two_pools(data, tmp_path):
    """One GPU trains and one serves, log-probs during generation, DAPO's reward for length."""
    run = run_recipe(NAME, data, tmp_path, PLACEMENT="disaggregated", GPUS_PER_NODE="2")
    steps = steps_of(run)
    assert "[darts] plugin active: M=8" in run.output
    assert "disaggregated: 1 GPUs train, 1 serve" in run.output
    for number, step in enumerate(steps, 1):
        assert len(run.rows(number)) == PROMPTS * M
        assert step["darts/candidates/launched"] > PROMPTS * M
        assert step["darts/overlap/in_rollout_share"] > 0
        assert step["actor/lr"] == pytest.approx(1e-6 * number / 10, rel=0.2, abs=1.1e-7), "ten steps of warm-up"
        # Wrong answers cost 1; tokens in the last half of the response up to 1 more. verl dumps both apart.
        rewards = [row["score"] + row["overlong_reward"] for row in run.rows(number)]
        for row in run.rows(number):
            assert row["score"] in (-1, 1)
            assert row["overlong"] == (len(row["output"]) >= MAX_RESPONSE / 2)
        assert step["critic/score/min"] == pytest.approx(min(rewards))
        assert step["critic/score/mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert (tmp_path / "run" / "darts.jsonl").is_file()
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


def test_its_baseline_trains_plain_verl(data, tmp_path):
    run = run_recipe(f"{NAME}_baseline", data, tmp_path, GPUS_PER_NODE="1")
    assert "darts.enable=false: plain verl" in run.output
    for number, step in enumerate(steps_of(run), 1):
        assert len(run.rows(number)) == PROMPTS * M
        assert not [name for name in step if name.startswith("darts/")]
