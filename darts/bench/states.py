"""What an arm goes on with in its next step: its actor and what the trainer knows, on disk, of the last complete round.

Contract: no verl import; the actor is whatever has verl's two RPCs. A round is one step of every arm.

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
from typing import Any, Protocol

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


class Actor(Protocol):
    """verl's worker group of the actor (`ActorRolloutRefWorker`, 0.9.1)."""

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> Any:
        """Writes the state of all ranks into the folder."""

    def load_checkpoint(self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False) -> Any:
        """Puts it back."""


class ArmStates:
    """The states of a bench's arms.

    Args:
        folder: is made; may hold the states of a bench that was interrupted.
        arms: names.
        actor: as it is to begin with, where the folder is new.

    Raises:
        StatesError: names that cannot be told apart as folders, or a folder of other arms.
    """

    def __init__(self, folder: Path, arms: Sequence[str], actor: Actor) -> None:
        self._folder = folder
        self._actor = actor
        self._names = {arm: folder_name(arm) for arm in arms}
        if len({name.lower() for name in self._names.values()}) != len(arms):
            raise StatesError(f"arms={list(arms)}: need folders of their own, not {list(self._names.values())}.")
        if not (folder / POSITION).exists():
            self._keep_actor(folder / "initial", step=0)
            documents.save(folder / POSITION, {"arms": list(arms), "seed": None, "step": 0})
        position = self._read(folder / POSITION)
        if position.get("arms") != list(arms):
            raise StatesError(
                f"{folder}: has states of the arms {', '.join(position.get('arms', []))}; this bench has "
                f"{', '.join(arms)}. Choose another folder, or remove it."
            )
        self._seed: int | None = position["seed"]
        self._step: int = position["step"]

    def is_complete(self, seed: int, step: int) -> bool:
        """Whether this round is behind us; seeds come in increasing order."""
        return self._seed is not None and (seed, step) <= (self._seed, self._step)

    def load(self, arm: str, seed: int, step: int) -> Any:
        """Gives the actor the weights and optimizer with which the arm begins this step.

        Returns:
            What `save` was told after the step before; None at step 1.

        Raises:
            StatesError: the round before is not the last complete one.
        """
        if step == 1:
            self._actor.load_checkpoint(str(self._folder / "initial"), None, False)
            return None
        if (seed, step - 1) != (self._seed, self._step):
            raise StatesError(
                f"{self._folder}: has the states after step {self._step} of seed {self._seed}, from which step {step} "
                f"of seed {seed} cannot go on."
            )
        where = self._place(arm, seed, step - 1)
        self._actor.load_checkpoint(str(where / "actor"), None, False)
        return self._read(where / TOLD)

    def save(self, arm: str, seed: int, step: int, told: Any) -> None:
        """Keeps what the arm's step has made of the actor.

        Args:
            told: all else that the arm's next step depends on, for JSON.
        """
        where = self._place(arm, seed, step)
        shutil.rmtree(where, ignore_errors=True)  # of a round that was interrupted
        self._keep_actor(where / "actor", step)
        documents.save(where / TOLD, told)

    def complete(self, seed: int, step: int) -> None:
        """Every arm has had its turn: from now on this is the round that is gone on with."""
        documents.save(self._folder / POSITION, {"arms": list(self._names), "seed": seed, "step": step})
        self._seed, self._step = seed, step
        for round_ in self._folder.glob("seed*-step*"):
            if round_ != self._round(seed, step):
                shutil.rmtree(round_, ignore_errors=True)

    def _keep_actor(self, where: Path, step: int) -> None:
        where.mkdir(parents=True, exist_ok=True)
        self._actor.save_checkpoint(str(where), None, step, None)  # None: verl removes none of the others

    def _round(self, seed: int, step: int) -> Path:
        return self._folder / f"seed{seed}-step{step}"

    def _place(self, arm: str, seed: int, step: int) -> Path:
        return self._round(seed, step) / self._names[arm]

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as cause:
            raise StatesError(f"{path}: cannot be read ({cause}); the bench cannot go on from this folder.") from cause


def folder_name(arm: str) -> str:
    """An arm's name as that of a folder.

    Example:
        >>> folder_name("+ streaming")
        '+_streaming'
    """
    return re.sub(r"[^A-Za-z0-9+.-]", "_", arm)
