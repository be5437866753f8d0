"""docs/extending.md: its strategy runs in the simulator, goes on where it was, and is short."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
from documents import ROOT, commands_of, text_of, write_example

from darts.config import DartsConfig
from darts.latency import LatencyCurve
from darts.simulation.costs import Cluster
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Setting, replay
from darts.simulation.trace import LengthTrace, PromptLengths
from darts.strategy import make_strategy

M, PROMPTS = 4, 6


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The path of the example's class, which is imported anew."""
    path = write_example(tmp_path)
    module = path.partition(".")[0]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(module, None)


def test_the_class_is_short_and_named_in_the_commands(example):
    code = next(code for code in re.findall(r"```python\n(.*?)```", text_of("docs/extending.md"), flags=re.S))
    assert len(code[code.index("class ") :].splitlines()) <= 30
    commands = [" ".join(words) for _, words in commands_of([ROOT / "docs" / "extending.md"])]
    assert sum(example in command for command in commands) == 3


def test_it_runs_in_the_simulator_and_waits_for_all_in_every_fourth_round(example):
    rng = np.random.default_rng(0)
    prompts = [
        PromptLengths(
            step=1,
            key=str(key),
            lengths=rng.integers(1, 100, M),
            truncated=np.zeros(M, dtype=bool),
            reward=np.full(M, np.nan),
        )
        for key in range(40)
    ]
    setting = Setting(
        num_prompts=PROMPTS,
        group_size=M,
        response_length=100,
        curve=LatencyCurve([1, 2], [1.0, 1.1]),
        cluster=Cluster(gpus=2),
    )
    dataset = Dataset(LengthTrace(name="made up", prompts=prompts), M)
    steps = list(replay(ReplayArm(name="mine", block={"strategy": example}), setting, dataset, 8))
    assert [step.queue for step in steps] == 2 * [3, 3, 3, 0], "half of a batch waits, and then none"
    assert [step.prompts for step in steps] == 2 * [9, 9, 9, 6]


def test_it_goes_on_where_it_was(example):
    darts = DartsConfig.from_block({"strategy": example}, M)
    first, second = make_strategy(darts, PROMPTS), make_strategy(darts, PROMPTS)
    for turn in range(3):
        round_ = first.next_round()
        launched = [*round_.queued, *range(10 * turn, 10 * turn + round_.new)]
        first.ended(launched, range(1, PROMPTS + 1))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.next_round() == first.next_round()
    assert first.next_round().harvest is None
