"""docs/comparing.md: its example runs, its commands are understood, what it names exists."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from darts.bench.arms import PRESETS
from darts.bench.command import options_of
from darts.config import STRATEGIES, DartsConfig
from darts.latency import LatencyCurve
from darts.simulation.cluster import Cluster
from darts.simulation.draws import Dataset
from darts.simulation.options import parse
from darts.simulation.replay import Arm, Setting, replay
from darts.simulation.trace import LengthTrace, PromptLengths
from darts.strategy import make_strategy

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "comparing.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(".venv/bin/python")
]
M, PROMPTS = 4, 6


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The path of the example's class, which is imported anew."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    module = re.match(r'"""(\w+)\.py:', code).group(1)
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    name = re.search(r"^class (\w+)", code, flags=re.M).group(1)
    yield f"{module}.{name}"
    sys.modules.pop(module, None)


def test_the_example_is_short_and_named_in_the_commands(example):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(code.splitlines()) < 45
    assert sum(example in " ".join(words) for words in COMMANDS) == 3


def test_the_example_runs_in_the_simulator_and_waits_for_all_in_every_fourth_round(example):
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
    steps = list(replay(Arm(name="mine", block={"strategy": example}), setting, dataset, 8))
    assert [step.queue for step in steps] == 2 * [3, 3, 3, 0], "half of a batch waits, and then none"
    assert [step.prompts for step in steps] == 2 * [9, 9, 9, 6]


def test_the_example_goes_on_where_it_was(example):
    darts = DartsConfig.from_block({"strategy": example}, M)
    first, second = make_strategy(darts, PROMPTS), make_strategy(darts, PROMPTS)
    for turn in range(3):
        round_ = first.next_round()
        launched = [*round_.queued, *range(10 * turn, 10 * turn + round_.new)]
        first.ended(launched, range(1, PROMPTS + 1))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.next_round() == first.next_round()
    assert first.next_round().harvest is None


def test_every_strategy_and_preset_is_told_of():
    table = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.M)
    assert set(STRATEGIES) <= set(table)
    assert all(f"`{name}`" in TEXT for name in PRESETS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words, example):
    assert words[:2] == [".venv/bin/python", "-m"]
    if words[2] == "darts.bench":
        assert options_of(words[3:]).plan.arms
    elif words[2] == "darts.simulation":
        assert parse(words[3:]).command
    else:
        assert words[2:] == ["recipe.darts.main_darts", f"darts.strategy={example}", "..."]


def test_every_file_that_is_named_exists():
    names = set(re.findall(r"`((?:darts|configs|docs|scripts|tests)/[\w./-]*)`", TEXT))
    names |= {f"docs/{name.split('#')[0]}" for name in re.findall(r"\]\((?!http)([^)]+)\)", TEXT)}
    assert names
    keys = {"darts/strategy/queue"}  # a metric
    assert [name for name in sorted(names - keys) if not (ROOT / name).exists()] == []


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 170
