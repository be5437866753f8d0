"""The command that trains (`recipe.darts.main_darts`), with a real rank of the overlapped actor failing in a forward.

$DARTS_TEST_ACTOR_TROUBLE says how: `raise`, or `die` as by an out-of-memory killer. The last rank does so in the second
step, while the others wait for it in a collective.
"""

import os
import signal
import time
from typing import Any

import ray
import torch
from recording import write
from verl.trainer.ppo.ray_trainer import Role

from recipe.darts import main_darts
from verl_patches.dp_actor import OverlappedActorWorker, RankSession

STEP, CALL = 2, 2


class FailingWorker(OverlappedActorWorker):
    """The actor's worker, with that trouble."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        write({"actor": os.getpid()})
        upstream = RankSession._forward_growing

        def forward_growing(session: RankSession, works: list[Any]) -> None:
            last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            if last and session._settings.step == STEP and session._number > CALL:
                write({"failed": time.time()})
                if os.environ["DARTS_TEST_ACTOR_TROUBLE"] == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError("scripted: out of memory in a forward")
            upstream(session, works)

        RankSession._forward_growing = forward_growing


class FailingTaskRunner(main_darts.DartsTaskRunner):
    """The task runner, with that worker."""

    def add_actor_rollout_worker(self, config: Any) -> tuple[type, type]:
        """As upstream."""
        worker, group = super().add_actor_rollout_worker(config)
        self.role_worker_mapping |= {
            role: ray.remote(FailingWorker)
            for role in (Role.ActorRollout, Role.ActorRolloutRef)
            if role in self.role_worker_mapping
        }
        return worker, group


if __name__ == "__main__":
    # Ray's workers know the classes by this module's name, not by __main__.
    import failing_actor

    main_darts.DartsTaskRunner = failing_actor.FailingTaskRunner
    main_darts.main()
