"""The states of a bench's arms on disk; the exactness of the actor's own part is in tests/actor/test_swap.py."""

import json

import pytest

from darts.bench.states import ArmStates, StatesError, folder_name


class Actor:
    """Its state is a number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None) -> None:
        assert max_ckpt_to_keep is None, "verl would remove others"
        with open(f"{local_path}/actor.json", "w") as file:
            json.dump(self.value, file)

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False) -> None:
        assert not del_local_after_load
        with open(f"{local_path}/actor.json") as file:
            self.value = json.load(file)


def turn(states: ArmStates, actor: Actor, arm: str, seed: int, step: int, adds: int) -> None:
    told = states.load(arm, seed, step)
    assert told == (None if step == 1 else {"arm": arm, "step": step - 1})
    actor.value += adds
    states.save(arm, seed, step, {"arm": arm, "step": step})


def rounds(states: ArmStates, actor: Actor, seed: int, steps) -> None:
    for step in steps:
        turn(states, actor, "a", seed, step, 1)
        turn(states, actor, "b", seed, step, 10)
        states.complete(seed, step)


def test_each_arm_goes_on_with_its_own(tmp_path):
    actor = Actor(1000)
    states = ArmStates(tmp_path, ["a", "b"], actor)
    rounds(states, actor, 0, range(1, 4))
    states.load("a", 0, 4)
    assert actor.value == 1003
    states.load("b", 0, 4)
    assert actor.value == 1030


def test_every_seed_begins_with_the_initial_actor(tmp_path):
    actor = Actor(1000)
    states = ArmStates(tmp_path, ["a", "b"], actor)
    rounds(states, actor, 0, range(1, 3))
    rounds(states, actor, 1, range(1, 2))
    states.load("b", 1, 2)
    assert actor.value == 1010
    assert states.is_complete(0, 99)
    assert states.is_complete(1, 1)
    assert not states.is_complete(1, 2)


def test_a_new_process_goes_on_after_the_last_complete_round(tmp_path):
    actor = Actor(1000)
    states = ArmStates(tmp_path, ["a", "b"], actor)
    assert not states.is_complete(0, 1)
    rounds(states, actor, 0, range(1, 3))
    turn(states, actor, "a", 0, 3, 500)  # killed here

    actor = Actor(7)  # whatever it has then
    states = ArmStates(tmp_path, ["a", "b"], actor)
    assert (states.is_complete(0, 2), states.is_complete(0, 3)) == (True, False)
    rounds(states, actor, 0, range(3, 4))
    states.load("a", 0, 4)
    assert actor.value == 1003


def test_killed_before_the_first_round_was_complete(tmp_path):
    actor = Actor(1000)
    turn(ArmStates(tmp_path, ["a", "b"], actor), actor, "a", 0, 1, 1)
    actor = Actor(7)
    states = ArmStates(tmp_path, ["a", "b"], actor)
    assert states.load("a", 0, 1) is None
    assert actor.value == 1000


def test_old_rounds_are_removed(tmp_path):
    actor = Actor()
    states = ArmStates(tmp_path, ["a", "b"], actor)
    rounds(states, actor, 0, range(1, 4))
    rounds(states, actor, 1, range(1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete.json", "initial", "seed1-step1"]


def test_a_round_cannot_be_skipped(tmp_path):
    actor = Actor()
    states = ArmStates(tmp_path, ["a", "b"], actor)
    rounds(states, actor, 0, range(1, 2))
    with pytest.raises(StatesError, match="after step 1 of seed 0, from which step 5 of seed 0 cannot go on"):
        states.load("a", 0, 5)


def test_a_folder_of_other_arms_is_refused(tmp_path):
    ArmStates(tmp_path, ["a", "b"], Actor())
    with pytest.raises(StatesError, match="has states of the arms a, b; this bench has a, c"):
        ArmStates(tmp_path, ["a", "c"], Actor())


def test_a_spoilt_folder_is_named(tmp_path):
    ArmStates(tmp_path, ["a"], Actor())
    (tmp_path / "complete.json").write_text("{")
    with pytest.raises(StatesError, match=r"complete\.json: cannot be read"):
        ArmStates(tmp_path, ["a"], Actor())


def test_names_of_folders(tmp_path):
    assert folder_name("keep 5 %") == "keep_5__"
    with pytest.raises(StatesError, match="need folders of their own"):
        ArmStates(tmp_path, ["a b", "a_b"], Actor())
