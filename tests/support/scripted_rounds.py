"""A trainer without its workers: data, rollouts and the order of rows are real, over servers with a script.

Prompt `row` of the data has responses of `length_of(row, candidate)` tokens; each token takes some milliseconds.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from fakes import Turn
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import create_rl_sampler
from verl.utils.dataset.rl_dataset import collate_fn

from darts.config import DartsConfig
from darts.messages import CANDIDATE
from darts.planning import RolloutPlanner
from darts.rollout.worker import candidate_seed
from darts.training.trainer import RayDartsTrainer

M, ROWS = 4, 40


def length_of(row: int, candidate: int) -> int:
    return 1 + row % 13 + candidate % 5


class Rows:
    """A dataset."""

    def __init__(self, count: int = ROWS) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict:
        return {
            "raw_prompt": [{"role": "user", "content": f"{row}+1="}],
            "data_source": "scripted",
            "reward_model": {"style": "rule", "ground_truth": "0"},
            "extra_info": {"index": row},
            "index": row,
            "dummy_tensor": torch.zeros(1),
        }


def make_trainer(
    kind: type[RayDartsTrainer], cluster: tuple, darts: DartsConfig, rows: Rows | None = None
) -> RayDartsTrainer:
    """A trainer without its constructor: what rollouts and their rows need."""
    manager, _, config = cluster
    trainer = kind.__new__(kind)
    trainer.config = OmegaConf.create(OmegaConf.to_container(config))
    trainer.darts = darts
    trainer._overridden, trainer.curr_step_profile, trainer.use_rm, trainer.global_steps = {}, False, False, 0
    trainer._warned_of_saturation = trainer._warned_of_slowdown = True
    trainer.async_rollout_manager = manager
    manager.planner.load_state_dict(RolloutPlanner(ema_weight=0.3, response_length=32).state_dict())  # as in a new run
    trainer.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None, update_weights=lambda step: None)
    trainer.actor_rollout_wg = SimpleNamespace()
    rows = Rows() if rows is None else rows
    sampler = create_rl_sampler(OmegaConf.create({"shuffle": True, "seed": 1}), rows)
    trainer.train_dataloader = SimpleNamespace(dataset=rows, sampler=sampler, collate_fn=collate_fn)
    return trainer


def load_script(
    servers: list[Any],
    launched: tuple[int, ...],
    step: int,
    token_ms: float,
    length: Callable[[int, int], int] = length_of,
    held: Callable[[int, int], bool] = lambda place, candidate: False,
) -> None:
    """The lengths of all that candidates of a step may become, and which of them never end by themselves."""
    turns = {
        candidate_seed(0, step, place, candidate): [
            Turn(length(row, candidate), delay=length(row, candidate) * token_ms / 1000, held=held(place, candidate))
        ]
        for place, row in enumerate(launched)
        for candidate in range(2 * M)
    }
    ray.get([server.load.remote(turns) for server in servers])


def take_records(servers: list[Any]) -> list[dict]:
    """What the servers served since the last call; nothing runs any more."""
    records = [record for some in ray.get([server.take_records.remote() for server in servers]) for record in some]
    assert ray.get([server.count_running.remote() for server in servers]) == [0] * len(servers)
    return records


def rows_of(batch: Any) -> list[tuple[int, int, int]]:
    """Prompt, candidate (-1 under plain verl) and length of each row."""
    columns = batch.non_tensor_batch
    candidates = columns.get(CANDIDATE, np.full(len(batch), -1))
    lengths = batch.batch["response_mask"].sum(dim=-1).tolist()
    prompts = [info["index"] for info in columns["extra_info"]]
    return list(zip(prompts, candidates.tolist(), lengths, strict=True))
