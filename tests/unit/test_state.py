"""The state's file: whole or not at all, of the step that is asked for, JSON, with one clear error for what is not."""

import json

import pytest
from omegaconf import OmegaConf

from darts.evidence.checkpoint import FILE_NAME, TRACKER, StateError, finished_at, load_state, save_state, step_folder

STATE = {"version": 1, "steps": 3, "history": {"a": [1.5, 2.5]}}


def test_it_round_trips_into_a_folder_that_is_made(tmp_path):
    folder = tmp_path / "runs" / "global_step_3"
    save_state(folder, 3, STATE)
    assert load_state(folder, 3) == STATE
    assert [path.name for path in folder.iterdir()] == [FILE_NAME], "no temporary file stays"
    save_state(folder, 3, STATE | {"steps": 4})
    assert load_state(folder, 3)["steps"] == 4


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    save_state(tmp_path, 3, STATE)
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path, 3, STATE | {"steps": float("nan")})
    assert load_state(tmp_path, 3) == STATE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; was the checkpoint made without DARTS?"),
        ('{"format": "verl-darts", "step": 3, "state": {"ver', "cannot be read"),
        ("", "cannot be read"),
        ("[]", "is not a state of verl-darts"),
        ('{"step": 3, "state": {}}', "is not a state of verl-darts"),
        (json.dumps({"format": "verl-darts", "step": 2, "state": {}}), "is the state of step 2, not of step 3"),
    ],
)
def test_what_cannot_be_used_is_one_error_that_names_the_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(StateError, match=message) as error:
        load_state(tmp_path, 3)
    assert str(tmp_path / FILE_NAME) in str(error.value)


def test_bytes_of_a_pickle_are_not_loaded(tmp_path):
    import pickle

    (tmp_path / FILE_NAME).write_bytes(pickle.dumps(STATE))
    with pytest.raises(StateError, match="cannot be read"):
        load_state(tmp_path, 3)


@pytest.mark.parametrize(
    ("trainer", "folder"),
    [
        ({"resume_mode": "auto"}, "out/global_step_12"),
        ({"resume_mode": "resume_path", "resume_from_path": "/other/global_step_12"}, "/other/global_step_12"),
        ({"resume_mode": "resume_path", "resume_from_path": "/other/global_step_12/"}, "/other/global_step_12/"),
        ({"resume_mode": "resume_path", "resume_from_path": "/other/global_step_2"}, "out/global_step_12"),
        ({"resume_mode": "auto", "resume_from_path": "/other/global_step_12"}, "out/global_step_12"),
    ],
)
def test_the_folder_is_verls(trainer, folder):
    config = OmegaConf.create({"default_local_dir": "out", "resume_from_path": None} | trainer)
    assert str(step_folder(config, 12)) == folder.rstrip("/")


@pytest.mark.parametrize(
    ("settings", "tracker", "step"),
    [
        ({}, "10", 10),
        ({}, "12", 12),
        ({}, "9", None),
        ({}, "", None),
        ({}, None, None),
        ({"total_training_steps": None}, "10", None),
        ({"resume_mode": "disable"}, "10", None),
        ({"resume_mode": "resume_path"}, "10", None),
        ({"val_only": True}, "10", None),
    ],
)
def test_a_run_with_its_last_step_has_ended(tmp_path, settings, tracker, step):
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
        (tmp_path / f"global_step_{tracker}").mkdir()
    trainer = {"resume_mode": "auto", "total_training_steps": 10, "default_local_dir": str(tmp_path)}
    assert finished_at(OmegaConf.create(trainer | settings)) == step


def test_a_run_whose_last_step_was_removed_begins_anew(tmp_path):
    """As verl has it."""
    (tmp_path / TRACKER).write_text("10")
    trainer = {"resume_mode": "auto", "total_training_steps": 10, "default_local_dir": str(tmp_path)}
    assert finished_at(OmegaConf.create(trainer)) is None
