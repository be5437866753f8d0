"""Training on a cut long end, with spare prompts: the rows are what the servers generated, and none comes late twice.

Colocated, and on two pools with log-probs of growing responses. 8 prompts a step and a quarter more are launched, so
after four steps those that came late make a step of their own.
"""

import sys
from collections import Counter

import pytest
from jobs import run_job
from transformers import AutoTokenizer

from darts.testbed import assets_dir

pytestmark = pytest.mark.timeout(3600)  # the runs are fixtures

STEPS, PROMPTS, M, CANDIDATES, SPARE = 6, 8, 8, 9, 2
COMMAND = [
    sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart",
    "darts.preset=fast", f"darts.allocation.mean_candidates={CANDIDATES}", f"darts.spare_prompts={SPARE / PROMPTS}",
    "darts.streaming.chunk_tokens=8", "trainer.val_before_train=false", "trainer.test_freq=-1",
    f"trainer.total_training_steps={STEPS}",
]  # fmt: skip
PLACEMENTS = {
    "colocated": ["darts.bypass=true"],
    "disaggregated": [
        "darts.bypass=false", "darts.placement=disaggregated", "darts.overlap.mode=token",
        # Enough for a server that is one update behind to show in its log-probs.
        "actor_rollout_ref.actor.optim.lr=1e-3",
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param("colocated", marks=pytest.mark.slow), "disaggregated"])
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    run = run_job([*COMMAND, *PLACEMENTS[request.param], f"trainer.default_local_dir={out}/checkpoints"], out)
    assert run.returncode == 0, run.output[-3000:]
    return run


@pytest.fixture(scope="module")
def steps(run):
    return [metrics for metrics in run.metrics() if "timing_s/step" in metrics]


def test_every_row_is_what_a_server_generated_with_the_weights_of_the_step_before(run, steps):
    assert len(steps) == STEPS
    decode = AutoTokenizer.from_pretrained(assets_dir("overthink") / "model").decode
    for step, metrics in enumerate(steps, 1):
        answers = Counter()
        for record in run.records():
            if record.get("tokens") and record["weights"] == step - 1:
                answers[decode(record["tokens"], skip_special_tokens=True), record["finish_reason"]] += 1
        rows = Counter(row["output"] for row in run.rows(step))
        assert rows.total() == PROMPTS * M
        texts = Counter()
        for (text, _), count in answers.items():
            texts[text] += count
        assert not rows - texts, "no row is anything but a whole answer of a server"
        assert metrics["darts/group/cut_share"] == pytest.approx(metrics["darts/candidates/cut"] / (PROMPTS * M))
        aborted = sum(count for (_, reason), count in answers.items() if reason == "abort")
        assert metrics["darts/candidates/cut"] <= aborted
    assert sum(metrics["darts/candidates/cut"] for metrics in steps) > 0


def test_log_probs_of_cut_rows_are_right_to_the_last_token(run, steps):
    """By the engine's own; colocated, these are the old ones, and none are computed."""
    is_overlapped = "disaggregated" in run.out.name
    for metrics in steps:
        assert ("timing_s/old_log_prob" in metrics) == ("darts/overlap/hidden_s" in metrics) == is_overlapped
        if is_overlapped:
            assert metrics["darts/overlap/late_rows"] == 0
            assert metrics["training/rollout_probs_diff_max"] < 1e-3


def test_who_came_late_makes_a_step_of_its_own_and_comes_late_no_more(steps):
    launched = [metrics["darts/candidates/launched"] / CANDIDATES for metrics in steps]
    assert launched == [PROMPTS + SPARE] * 4 + [PROMPTS] + [PROMPTS + SPARE]
    assert [metrics["darts/strategy/late"] for metrics in steps] == [SPARE] * 4 + [0, SPARE]
    assert [metrics["darts/strategy/queue"] for metrics in steps] == [2, 4, 6, 8, 0, 2]
    assert {metrics["darts/strategy/late_times_most"] for metrics in steps} == {1}
    assert steps[4]["darts/strategy/trained_over_drawn"] == pytest.approx(1)
    assert steps[4]["darts/strategy/waiting_share"] == pytest.approx(0)
