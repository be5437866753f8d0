"""What an arm goes on with in its next step: its actor and what the trainer knows, on disk, of the last complete round.

Contract: no verl import; the actor is whatever has `save_checkpoint` and `load_checkpoint` of verl's worker group
(`ActorRolloutRefWorker`, 0.9.1). A round is one step of every arm.

1. An arm's turn is `load`, its step, `save`; when all arms have had theirs, `complete`. What `load` gives is the state
   of the round before, at step 1 the initial one: nothing of one arm's turn reaches another's, and a round that was
   interrupted begins again.
2. The actor's part is verl's own checkpoint: weights, optimizer, learning-rate schedule and random states, exactly
   (tests/actor/test_swap.py). Other contents than `CONTENTS` would leave one arm's optimizer to the next.
3. `complete` replaces one small file, so that the folder always has one whole round; then the round before is removed.
   There is room for two rounds, and the initial actor.
4. Every worker reads and writes the folder under the same path, as verl's checkpoints.

The swap is verl's `save_checkpoint` and `load_checkpoint`, and nothing of our own (our choice): on the testbeds it
takes tens of milliseconds (`swap_s` of the records), in none of the times that are compared, and the same files are
what a bench resumes from. For large actors the folder may be in shared memory.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darts.evidence import documents

CONTENTS = ("model", "optimizer", "extra")
"""What an actor's checkpoint holds: weights, optimizer; schedule and random states."""
OVERRIDES = tuple(
    f"actor_rollout_ref.actor.checkpoint.{which}_contents=[{','.join(CONTENTS)}]" for which in ("save", "load")
)
"""What a bench sets in verl's configuration for invariant 2."""
POSITION, TOLD = "complete.json", "told.json"


class StatesError(ValueError):
    """A folder that a bench cannot go on with."""


class ArmStates:
    """The states of a bench's arms.

    Args:
        states_folder: is made; may hold the states of a bench that was interrupted.
        arm_names: names.
        actor: as it is to begin with, where the folder is new.

    Raises:
        StatesError: names that cannot be told apart as folders, or a folder of other arms.
    """

    def __init__(self, states_folder: Path, arm_names: Sequence[str], actor: Any) -> None:
        self._folder = states_folder
        self._actor = actor
        self._names = {arm_name: folder_name(arm_name) for arm_name in arm_names}
        if len({name.lower() for name in self._names.values()}) != len(arm_names):
            raise StatesError(f"arms={list(arm_names)}: need folders of their own, not {list(self._names.values())}.")
        if not (states_folder / POSITION).exists():
            self._keep_actor(states_folder / "initial", step=0)
            documents.save(states_folder / POSITION, {"arms": list(arm_names), "seed": None, "step": 0})
        last_round = self._read(states_folder / POSITION)
        if last_round.get("arms") != list(arm_names):
            raise StatesError(
                f"{states_folder}: has states of the arms {', '.join(last_round.get('arms', []))}; this bench has "
                f"{', '.join(arm_names)}. Choose another folder, or remove it."
            )
        self._last: tuple[int | None, int] = last_round["seed"], last_round["step"]

    def is_complete(self, seed: int, step: int) -> bool:
        """Whether this round is behind us; seeds come in increasing order."""
        return self._last[0] is not None and (seed, step) <= self._last

    def load(self, arm_name: str, seed: int, step: int) -> Any:
        """Gives the actor what the arm begins this step with; returns what `save` was told before, None at step 1.

        Raises:
            StatesError: the round before is not the last complete one.
        """
        if step == 1:
            self._actor.load_checkpoint(str(self._folder / "initial"), None, False)
            return None
        if (seed, step - 1) != self._last:
            raise StatesError(
                f"{self._folder}: has the states after step {self._last[1]} of seed {self._last[0]}, from which step "
                f"{step} of seed {seed} cannot go on."
            )
        state_folder = self._round(seed, step - 1) / self._names[arm_name]
        self._actor.load_checkpoint(str(state_folder / "actor"), None, False)
        return self._read(state_folder / TOLD)

    def save(self, arm_name: str, seed: int, step: int, arm_state: Any) -> None:
        """Keeps what the arm's step has made of the actor and, as JSON, all else that its next step depends on."""
        state_folder = self._round(seed, step) / self._names[arm_name]
        shutil.rmtree(state_folder, ignore_errors=True)  # of a round that was interrupted
        self._keep_actor(state_folder / "actor", step)
        documents.save(state_folder / TOLD, arm_state)

    def complete(self, seed: int, step: int) -> None:
        """Every arm has had its turn: from now on this is the round that is gone on with."""
        documents.save(self._folder / POSITION, {"arms": list(self._names), "seed": seed, "step": step})
        self._last = seed, step
        for round_ in self._folder.glob("seed*-step*"):
            if round_ != self._round(seed, step):
                shutil.rmtree(round_, ignore_errors=True)

    def _keep_actor(self, state_folder: Path, step: int) -> None:
        state_folder.mkdir(parents=True, exist_ok=True)
        self._actor.save_checkpoint(str(state_folder), None, step, None)  # None: verl removes none of the others

    def _round(self, seed: int, step: int) -> Path:
        return self._folder / f"seed{seed}-step{step}"

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as cause:
            raise StatesError(f"{path}: cannot be read ({cause}); the bench cannot go on from this folder.") from cause


def folder_name(arm_name: str) -> str:
    """An arm's name as that of a folder: "+_streaming" for "+ streaming"."""
    return re.sub(r"[^A-Za-z0-9+.-]", "_", arm_name)
