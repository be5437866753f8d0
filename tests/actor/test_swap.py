"""Arms that take turns on one actor: each trains as if it were alone, bit for bit."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from actor_cases import actor_state, full, script, seed_process, train
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.workers.engine_workers import ActorRolloutRefWorker

from darts.bench.states import OVERRIDES, ArmStates

SCHEDULE = ["actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.optim.lr_warmup_steps=5"]
STEPS = 4
SEEDS = {"a": 100, "b": 200}


class Group:
    """The RPCs of the ranks, as verl's worker group has them."""

    def __init__(self, group) -> None:
        self._group = group

    def save_checkpoint(self, *args) -> None:
        self._group.all("call", "save_checkpoint", *args)

    def load_checkpoint(self, *args) -> None:
        self._group.all("call", "load_checkpoint", *args)


def build(group, strategy="fsdp2", contents=OVERRIDES) -> None:
    group.build("qwen2", strategy=strategy, overrides=[*SCHEDULE, *contents])
    group.all("run", seed_process, 0)


def step(group, arm: str, number: int) -> None:
    """Old log-probs, and an update on a batch of the arm's own."""
    seed = SEEDS[arm] + number
    full(group, [script(np.random.default_rng(seed), "s")])
    group.all("run", train, seed)


def alone(group, folder: Path, arm: str) -> list[dict]:
    """The arm's final state on each rank, from the initial actor, with nobody else and no swap."""
    ArmStates(folder, [arm], Group(group)).load(arm, 0, 1)
    for number in range(1, STEPS + 1):
        step(group, arm, number)
    return group.all("run", actor_state)


def take_turns(group, states: ArmStates, rounds: range, arms="ab") -> None:
    """Steps of both arms; who is first alternates."""
    for number in rounds:
        for arm in arms if number % 2 else arms[::-1]:
            assert states.load(arm, 0, number) == (None if number == 1 else {"arm": arm, "steps": number - 1})
            step(group, arm, number)
            states.save(arm, 0, number, {"arm": arm, "steps": number})
        states.complete(0, number)


def final(group, states: ArmStates) -> dict[str, list[dict]]:
    """Of each arm, its state on each rank after the last step."""
    found = {}
    for arm in SEEDS:
        states.load(arm, 0, STEPS + 1)
        found[arm] = group.all("run", actor_state)
    return found


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    """Bit for bit, on each rank."""
    for ours, theirs in zip(found, expected, strict=True):
        assert different(ours, theirs) == []


def different(found: dict, expected: dict) -> list[str]:
    """Names of what differs."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(found[name], value)]


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_arms_in_turns_are_arms_alone(group, tmp_path, strategy):
    build(group, strategy)
    before = group.all("run", actor_state)
    expected = {}
    for arm in SEEDS:
        build(group, strategy)
        expected[arm] = alone(group, tmp_path / arm, arm)
    build(group, strategy)
    states = ArmStates(tmp_path / "turns", list(SEEDS), Group(group))
    take_turns(group, states, range(1, STEPS + 1))
    found = final(group, states)
    for arm in SEEDS:
        assert_equal(found[arm], expected[arm])
    for of_rank, other, start in zip(expected["a"], expected["b"], before, strict=True):
        moved = {name.split()[0] for name in different(of_rank, start)}
        assert moved >= {"weight", "exp_avg", "exp_avg_sq", "step", "lr", "schedule", "random"}, "nothing to swap"
        assert {"weight", "exp_avg"} <= {name.split()[0] for name in different(of_rank, other)}, "the arms are the same"


def test_the_initial_state_is_that_of_an_actor_that_never_trained(group, tmp_path):
    """An arm that begins late equals one that began first: Adam's moments are gone, not kept."""
    build(group)
    states = ArmStates(tmp_path, list(SEEDS), Group(group))
    before = group.all("run", actor_state)
    for number in (1, 2):
        step(group, "b", number)
    assert different(group.all("run", actor_state)[0], before[0])
    states.load("a", 0, 1)
    assert_equal(group.all("run", actor_state), before)


def test_an_interrupted_round_begins_again_in_a_new_process(group, tmp_path):
    build(group)
    states = ArmStates(tmp_path / "whole", list(SEEDS), Group(group))
    take_turns(group, states, range(1, STEPS + 1))
    expected = final(group, states)

    build(group)
    states = ArmStates(tmp_path / "cut", list(SEEDS), Group(group))
    take_turns(group, states, range(1, 3))
    states.load("a", 0, 3)
    step(group, "b", 7)  # whatever: it does not count
    states.save("a", 0, 3, {"arm": "a", "steps": 3})

    build(group)
    step(group, "b", 8)
    states = ArmStates(tmp_path / "cut", list(SEEDS), Group(group))
    assert states.is_complete(0, 2)
    assert not states.is_complete(0, 3)
    take_turns(group, states, range(3, STEPS + 1))
    found = final(group, states)
    for arm in SEEDS:
        assert_equal(found[arm], expected[arm])


@pytest.mark.parametrize(
    ("contents", "mixed"),
    [("[model,extra]", {"exp_avg", "exp_avg_sq", "weight"}), ("[model,optimizer]", {"schedule", "random"})],
)
def test_with_less_in_the_checkpoints_arms_mix(one_rank, tmp_path, contents, mixed):
    """What the test above would find; and why `OVERRIDES` are needed."""
    build(one_rank)
    expected = alone(one_rank, tmp_path / "alone", "a")
    build(one_rank, contents=[f"{line.split('=')[0]}={contents}" for line in OVERRIDES])
    states = ArmStates(tmp_path / "turns", list(SEEDS), Group(one_rank))
    take_turns(one_rank, states, range(1, STEPS + 1))
    found = final(one_rank, states)["a"]
    assert {name.split()[0] for name in different(found[0], expected[0])} >= mixed


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("save_checkpoint", ("self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep")),
        ("load_checkpoint", ("self", "local_path", "hdfs_path", "del_local_after_load")),
    ],
)
def test_rpcs_are_verls_and_wait_for_all_ranks(name, parameters):
    function = getattr(ActorRolloutRefWorker, name)
    found = tuple(inspect.signature(function).parameters)
    assert tuple(one for one in found if one != "_ray_trace_ctx") == parameters
    attributes = getattr(function, MAGIC_ATTR)
    assert attributes["dispatch_mode"] == Dispatch.ONE_TO_ALL
    assert attributes["blocking"] is True
