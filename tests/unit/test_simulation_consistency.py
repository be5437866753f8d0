"""A replay of the lengths that a run left behind takes as long as the run."""

import json

import numpy as np
import pytest

from darts.config import STRATEGIES
from darts.evidence.trace import fate
from darts.latency import LatencyCurve
from darts.simulation.costs import Cluster
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Setting, replay
from darts.simulation.rollout import SimulatedRollout
from darts.simulation.trace import LengthTrace, PromptLengths, read_trace

PROMPTS, GROUP, STEPS = 16, 4, 120
DEADLINE = {"strategy": "darts", "allocation": {"mode": "uniform"}, "selection": {"long_wait": "deadline"}}
BLOCKS = {name: {"strategy": name} for name in STRATEGIES} | {"deadline": DEADLINE}
SETTING = Setting(
    num_prompts=PROMPTS,
    group_size=GROUP,
    response_length=1024,
    curve=LatencyCurve([1, 16, 64, 256], [0.010, 0.011, 0.014, 0.03]),
    cluster=Cluster(gpus=2, max_num_seqs=64),
)
TOLERANCE = 0.05
"""Fresh draws of all candidates alone move the mean step by up to 4 %; and what aborts cut off is drawn again."""


@pytest.fixture(scope="module")
def data():
    """Prompts of different lengths and spreads, a tenth of them three times as long."""
    rng = np.random.default_rng(0)
    prompts = []
    for number in range(40 * PROMPTS):
        median = np.exp(rng.normal(4.5, 0.4)) * (3 if rng.random() < 0.1 else 1)
        lengths = np.ceil(median * np.exp(rng.uniform(0.1, 0.6) * rng.standard_normal(4 * GROUP)))
        lengths = np.clip(lengths, 1, SETTING.response_length).astype(np.int64)
        truncated, reward = lengths == SETTING.response_length, np.full(len(lengths), np.nan)
        prompts.append(PromptLengths(step=1, key=str(number), lengths=lengths, truncated=truncated, reward=reward))
    return LengthTrace(name="data", prompts=prompts)


def seconds_a_step(arm, dataset):
    return np.mean([step.time.rollout for step in replay(arm, SETTING, dataset, STEPS)])


FAST = ("darts", "deadline", "tail_batching")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BLOCKS])
def test_a_run_replayed_on_its_own_trace_takes_as_long(name, data, tmp_path, monkeypatch):
    """Once 8 % longer with `tail_batching` and `sorted`: what waited counted as another prompt at each launch."""
    lines = []

    class Recorded(Dataset):
        def draw(self, rows, launches):
            lines.append([self.keys[row % len(self)] for row in rows])
            return super().draw(rows, launches)

    run = SimulatedRollout.run

    def recorded(rollout):
        outcome, ends = run(rollout), np.cumsum(rollout.budgets)[:-1]
        fates = ["".join(some) for some in np.split(fate(outcome.pool), ends)]
        columns = {
            "key": lines[-1],
            "fate": fates,
            "length": [some.tolist() for some in np.split(outcome.pool.length, ends)],
        }
        lines[-1] = json.dumps({"version": 1, "step": len(lines), "metrics": {}, "rollout": columns})
        return outcome

    arm = ReplayArm(name=name, block=BLOCKS[name])
    with monkeypatch.context() as patched:
        patched.setattr(SimulatedRollout, "run", recorded)
        took = seconds_a_step(arm, Recorded(data, 4 * GROUP, seed=1))
    path = tmp_path / "darts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    own = read_trace(path)
    assert own.prompts_per_step == PROMPTS
    again = [seconds_a_step(arm, Dataset(own, SETTING.width(arm), seed)) for seed in (0, 1, 2)]
    assert np.mean(again) == pytest.approx(took, rel=TOLERANCE)
