"""Records what each candidate of a run did and when, for `benchmarks.step_figure`. Needs verl and Ray.

    bash scripts/quickstart.sh darts.placement=disaggregated darts.overlap.mode=token \\
      actor_rollout_ref.rollout.agent.agent_loop_manager_class=benchmarks.step_record.RecordingManager

Contract. The run is that of any other manager; each training step with overlapped log-probs adds one line to `RECORDS`
in the run's `trainer.default_local_dir`, with times in seconds since its rollout began.
"""

import json
from pathlib import Path
from typing import Any

from verl.protocol import DataProto
from verl.utils.ray_utils import auto_await

from benchmarks.step_figure import RECORDS
from darts.actor_calls import SequenceKey
from darts.overlap_session import OverlapOutcome, OverlapSession
from darts.planning import Rollout
from darts.rollout import DartsAgentLoopManager
from darts.trace import fate


class RecordingManager(DartsAgentLoopManager):
    """The manager, which also writes down when candidates ended and when their log-probs were there."""

    _session: OverlapSession | None = None
    _of_step = -1
    _told: Rollout | None = None

    @property
    def overlap(self) -> OverlapSession | None:
        """Upstream: `DartsAgentLoopManager.overlap`."""
        return self._session

    @overlap.setter
    def overlap(self, session: OverlapSession | None) -> None:
        self._session = session
        if session is not None:
            finish = session.finish
            session.finish = lambda keys: self._write(finish(keys))

    @auto_await
    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Upstream: `DartsAgentLoopManager.generate_sequences`."""
        self._of_step = prompts.meta_info.get("global_steps", -1)
        return await super().generate_sequences(prompts)

    def pop_rollout(self) -> Rollout | None:
        """Upstream: `DartsAgentLoopManager.pop_rollout`."""
        self._told = super().pop_rollout()
        return self._told

    def _write(self, outcome: OverlapOutcome) -> OverlapOutcome:
        if self._told is not None:
            path = Path(self.config.trainer.default_local_dir) / RECORDS
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"step": self._of_step, **candidates_of(self._told, outcome)}) + "\n")
        return outcome


def candidates_of(rollout: Rollout, outcome: OverlapOutcome) -> dict[str, Any]:
    """All candidates of a rollout, one entry each, sorted by prompt.

    Example: `{"seconds": 1.2, "prompt": [0, 0], "num_long": [1, 1], "length": [31, 80], "fate": ["k", "a"], "ended":
    [0.6, 0.9], "stop": [null, 0.01], "computed": [[[0.4, 16], [0.7, 15]], []]}`. `fate` as in `darts.trace`; `stop`:
    seconds from the decision to abort to its end; `computed`: when log-probs were there, and of how many more tokens.
    """
    pool = rollout.pool
    keys = [
        SequenceKey(rollout.uids[prompt], candidate)
        for prompt, candidate in zip(pool.prompt.tolist(), pool.candidate.tolist(), strict=True)
    ]
    return {
        "seconds": round(rollout.ended - rollout.began, 3),
        "prompt": pool.prompt.tolist(),
        "num_long": pool.num_long.tolist(),
        "length": pool.length.tolist(),
        "fate": fate(pool).tolist(),
        "ended": [round(at - rollout.began, 3) for at in pool.ended_at.tolist()],
        "stop": [None if stop != stop else round(stop, 4) for stop in pool.stop_seconds.tolist()],
        "computed": [
            [[round(at - rollout.began, 3), tokens] for at, tokens in outcome.computed.get(key, [])] for key in keys
        ],
    }
