"""The README's first command, judged by what the server saw: which tokens were generated, kept and dropped."""

import itertools
import re
from collections import defaultdict

import pytest
from jobs import ROOT, run_job
from transformers import AutoTokenizer

from darts.config import DartsConfig
from darts.selection import select
from darts.testbed import LIMITS, assets_dir

pytestmark = pytest.mark.timeout(700)  # the run is a fixture

STEPS, PROMPTS, M = 8, 8, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart with the watched server; eight steps as the README promises at least."""
    out = tmp_path_factory.mktemp("quickstart")
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), f"trainer.total_training_steps={STEPS}"]
    return run_job(command, out, limit=580)


@pytest.fixture(scope="module")
def steps(run):
    return [metrics for metrics in run.metrics() if "timing_s/step" in metrics]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_dir("overthink") / "model")


@pytest.fixture(scope="module")
def groups(run):
    """The server's records of training requests: step -> prompt text -> records in order of candidate.

    Training requests have a seed, validation's have none. `priority` numbers the candidates of a step.
    """
    by_step = defaultdict(lambda: defaultdict(list))
    for record in run.records():
        if record["seed"] is not None:
            by_step[record["weights"] + 1][tuple(record["prompt"])].append(record)
    return {
        step: {prompt: sorted(records, key=lambda r: r["priority"]) for prompt, records in prompts.items()}
        for step, prompts in by_step.items()
    }


def test_the_run_succeeds_and_says_so(run):
    assert run.returncode == 0, run.output[-3000:]
    assert "[darts] plugin active: M=8 of 10.5 candidates" in run.output
    assert "Summary of the run" in run.output
    assert re.search(r"weights moved +by at most [1-9]", run.output)
    assert f"[darts] step {STEPS}/{STEPS}" in run.output


def test_the_server_saw_every_candidate_with_a_seed_and_priority_of_its_own(groups):
    assert sorted(groups) == list(range(1, STEPS + 1))
    for prompts in groups.values():
        records = list(itertools.chain(*prompts.values()))
        assert [len(records) for records in prompts.values()].count(10) == PROMPTS / 2
        assert [len(records) for records in prompts.values()].count(11) == PROMPTS / 2
        for key in ("seed", "priority", "request_id"):
            assert len({record[key] for record in records}) == 84


def test_kept_are_the_k_shortest_and_l_longest_by_what_the_server_recorded(run, groups, tokenizer):
    """Lengths and finish reasons are the engine's; the kept rows are those verl trained on."""
    config = DartsConfig.from_block({"allocation": {"high": 11}}, group_size=M)
    dropped = truncated = 0
    for step, prompts in groups.items():
        expected = []
        for prompt, records in prompts.items():
            lengths = [len(record["tokens"]) for record in records]
            cut = [record["finish_reason"] == "length" for record in records]
            kept = select(lengths, M, config.num_long_for(len(records)), cut)
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            expected += [(text, tokenizer.decode(records[i]["tokens"], skip_special_tokens=True)) for i in kept]
            dropped += len(records) - M
            truncated += sum(cut)
        rows = [(row["input"], row["output"]) for row in run.rows(step)]
        assert len(rows) == PROMPTS * M
        assert sorted(rows) == sorted(expected)
    assert dropped == STEPS * (84 - PROMPTS * M)
    assert truncated > 0, "the testbed has responses at the limit; without one this test shows less than it says"


def test_metrics_are_what_the_server_recorded(groups, steps):
    for step, metrics in enumerate(steps, start=1):
        records = list(itertools.chain(*groups[step].values()))
        lengths = [len(record["tokens"]) for record in records]
        cut = sum(record["finish_reason"] == "length" for record in records)
        assert metrics["darts/candidates/launched"] == len(records) == 84
        assert metrics["darts/candidates/truncated"] == cut
        assert metrics["darts/candidates/finished"] == 84 - cut
        assert metrics["darts/tokens/generated"] == sum(lengths)
        assert metrics["darts/length/pool_max"] == max(lengths) <= LIMITS["overthink"].response
        assert metrics["darts/candidates/dropped"] == 84 - metrics["darts/candidates/kept"] == 20
        assert metrics["darts/group/saturated_share"] == 0.5


def test_the_served_weights_are_the_trained_ones_in_every_step(groups, steps):
    """Every request ran on the weights of the step before it, and the engine's log-probs agree with the trainer's."""
    for step, prompts in groups.items():
        assert {record["weights"] for records in prompts.values() for record in records} == {step - 1}
    assert max(metrics["training/rollout_probs_diff_max"] for metrics in steps) < 1e-3


def test_something_was_learnt_from(steps):
    assert any(metrics["darts/group/mixed_reward_share"] > 0 for metrics in steps)
    assert all(metrics["actor/grad_norm"] > 0 for metrics in steps)
