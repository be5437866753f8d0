"""DARTS's state in verl's checkpoint of a step: `global_step_N/darts.json`.

Contract.
1. The file is written whole or not at all, and before verl marks the step as its latest.
2. It is read from the folder that is resumed from and nowhere else, and only if it is that step's.
3. JSON, never pickle: a checkpoint can be looked at, and loading it runs nothing.
4. Whether a run has ended is read from verl's own file.
5. What cannot be used is one `StateError`; the caller decides whether that is a warning.
"""

import json
from pathlib import Path
from typing import Any

from darts.evidence import documents

FILE_NAME = "darts.json"
FORMAT = "verl-darts"
TRACKER = "latest_checkpointed_iteration.txt"  # verl's file beside the steps' folders: the number of the last one


class StateError(RuntimeError):
    """A checkpoint without usable state; the message names the file and what is wrong with it. `loses_prompts`: to go
    on without the state would train on other prompts than those that come next."""

    def __init__(self, message: str, loses_prompts: bool = False) -> None:
        super().__init__(message)
        self.loses_prompts = loses_prompts


def step_folder(trainer: Any, step: int) -> Path:
    """Where verl 0.9.1's `RayPPOTrainer` saves a step, and what it resumes from; `trainer`: that block of the
    configuration."""
    resume_path = trainer.get("resume_from_path") if trainer.get("resume_mode") == "resume_path" else None
    if resume_path is not None and resume_path.rstrip("/").endswith(f"global_step_{step}"):
        return Path(resume_path)
    return Path(trainer.default_local_dir) / f"global_step_{step}"


def finished_at(trainer: Any) -> int | None:
    """The last checkpoint's step, if a run that goes on from it (`resume_mode=auto`) would have nothing left to train:
    verl 0.9.1 trains one more step then, whatever `total_training_steps` says."""
    if trainer.get("resume_mode") != "auto" or trainer.get("total_training_steps") is None or trainer.get("val_only"):
        return None
    try:
        last_step = int((Path(trainer.default_local_dir) / TRACKER).read_text())
    except (OSError, ValueError):
        return None
    return last_step if last_step >= trainer.total_training_steps and step_folder(trainer, last_step).is_dir() else None


def save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the state of a step into its folder, which is made if it is not there."""
    saved_content = {"format": FORMAT, "step": step, "state": state}
    documents.write(folder / FILE_NAME, json.dumps(saved_content, allow_nan=False, separators=(",", ":")))


def load_state(folder: Path, step: int) -> dict[str, Any]:
    """The state of a step; `StateError` for no file, one that was cut, or one of something else or another step."""
    state_path = folder / FILE_NAME
    try:
        saved_content = json.loads(state_path.read_text())
    except FileNotFoundError:
        raise StateError(f"{state_path}: there is no such file; was the checkpoint made without DARTS?") from None
    except (OSError, ValueError) as cause:
        raise StateError(f"{state_path}: cannot be read: {cause}") from cause
    if not isinstance(saved_content, dict) or saved_content.get("format") != FORMAT:
        raise StateError(f"{state_path}: is not a state of verl-darts.")
    if saved_content.get("step") != step:
        raise StateError(f"{state_path}: is the state of step {saved_content.get('step')}, not of step {step}.")
    return saved_content.get("state")
