"""A run that is killed in mid-step and resumed goes on at its step, with the budgets of the run that was killed."""

import json
import sys
from collections import Counter

import pytest
from jobs import Run, read_lines, run_job
from transformers import AutoTokenizer

from darts.config import DartsConfig
from darts.evidence.checkpoint import FILE_NAME
from darts.history import prompt_key
from darts.planning import RolloutPlanner
from darts.rollout.worker import candidate_seed
from darts.testbed import assets_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]  # the runs are fixtures

CANDIDATES, PROMPTS, EPOCH = 84, 8, 4
KILLED, AT_BOUNDARY, LAST = 6, 9, 10


def start(folder, name: str, kill_in_step: int | None = None) -> Run:
    """The quickstart with a checkpoint every step; killed once every request of a step was started."""
    command = [
        sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart",
        "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.resume_mode=auto", "trainer.save_freq=1",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]", "darts.latency.profile=off",
        f"trainer.default_local_dir={folder}/checkpoints", f"trainer.total_training_steps={LAST}",
        "darts.state.strict=true",
    ]  # fmt: skip
    in_step = None if kill_in_step is None else lambda run: len(run.started(kill_in_step - 1)) == CANDIDATES
    return run_job(command, folder / name, kill_when=in_step)


def budgets(run: Run, step: int) -> Counter:
    """Candidates by prompt."""
    return Counter(tuple(record["prompt"]) for record in run.started(step - 1))


def steps(run: Run) -> list[int]:
    return [metrics["training/global_step"] for metrics in run.metrics() if "timing_s/step" in metrics]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def killed(folder):
    run = start(folder, "killed", kill_in_step=KILLED)
    assert run.returncode == -9, run.output[-3000:]
    assert steps(run) == list(range(1, KILLED))
    return run


@pytest.fixture(scope="module")
def resumed(folder, killed):
    """Resumed in the middle of an epoch, and killed again right after the end of one."""
    run = start(folder, "resumed", kill_in_step=AT_BOUNDARY)
    assert run.returncode == -9, run.output[-3000:]
    assert steps(run) == list(range(KILLED, AT_BOUNDARY))
    return run


def test_the_first_resumed_steps_budgets_are_those_of_the_run_that_was_killed(killed, resumed):
    before, after = budgets(killed, KILLED), budgets(resumed, KILLED)
    assert len(before) == PROMPTS
    assert max(before.values()) - min(before.values()) > 1, "budgets differ, so equality says something"
    assert after == before
    assert f"resumed with the length history of {EPOCH * PROMPTS} prompts" in resumed.output


def test_it_goes_on_with_verls_checkpoint_and_appends_to_the_trace(folder, killed, resumed):
    weights = {record["weights"] for record in resumed.records() if "ended" in record}
    assert min(weights) == KILLED - 1, "the first resumed rollout ran on the weights of the step before"
    trace = read_lines(folder / "checkpoints" / "darts.jsonl")
    assert [line["step"] for line in trace] == list(range(1, AT_BOUNDARY))
    assert [sum(line["rollout"]["budget"]) for line in trace] == [CANDIDATES] * (AT_BOUNDARY - 1)
    assert trace[0]["metrics"]["darts/history/known_share"] == 0
    assert trace[KILLED - 1]["metrics"]["darts/history/known_share"] == 1


def test_a_run_that_resumes_at_the_end_of_an_epoch_has_its_history_too(folder, resumed):
    """verl begins the epoch anew, in another order than the run that was killed; so the plan is computed here."""
    state = json.loads((folder / "checkpoints" / f"global_step_{AT_BOUNDARY - 1}" / FILE_NAME).read_text())["state"]
    run = start(folder, "again")
    assert run.returncode == 0, run.output[-3000:]
    assert steps(run) == list(range(AT_BOUNDARY, LAST + 1))
    planner = RolloutPlanner(ema_weight=0.3, response_length=256)
    planner.load_state_dict(state)
    darts = DartsConfig.from_block({"allocation": {"mean_candidates": 10.5, "high": 12}}, 8)
    prompt_of = {record["seed"]: tuple(record["prompt"]) for record in run.started(AT_BOUNDARY - 1)}
    prompts = [prompt_of[candidate_seed(0, AT_BOUNDARY, place, 0)] for place in range(PROMPTS)]
    tokenizer = AutoTokenizer.from_pretrained(assets_dir("overthink") / "model")
    plan = planner.plan([key_of(tokenizer.decode(prompt)) for prompt in prompts], darts)
    assert plan.known.all()
    assert [budgets(run, AT_BOUNDARY)[prompt] for prompt in prompts] == plan.budgets.tolist()

    # Started once more it trains nothing, and leaves its checkpoint as it is.
    ended = start(folder, "ended")
    assert ended.returncode == 0
    assert ended.output.count(f"nothing to train: {folder}/checkpoints has step {LAST}") == 1
    assert not (folder / "checkpoints" / f"global_step_{LAST + 1}").exists()


def key_of(text: str) -> str:
    """The key of a prompt, from its text after the chat template."""
    question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    return prompt_key([{"role": "user", "content": question}])
