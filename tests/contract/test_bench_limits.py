"""An arm's overlong penalty is verl's: the same number on the same lengths, at the same place of the row."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.protocol import DataProto

from darts.bench.limits import LengthLimits
from darts.bench.trainer import ArmsTrainer

LIMIT, SCORE = 64, 1.0


def rows(lengths: list[int]) -> DataProto:
    """Responses of these lengths behind prompts of 3 tokens, as the rollout pads them, with verl's scores."""
    response_mask = torch.arange(LIMIT) < torch.tensor(lengths)[:, None]
    scores = torch.zeros(len(lengths), LIMIT)
    scores[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = SCORE
    return DataProto.from_dict(
        tensors={
            "prompts": torch.ones(len(lengths), 3, dtype=torch.long),
            "responses": torch.ones(len(lengths), LIMIT, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(len(lengths), 3, dtype=torch.long), response_mask.long()], dim=1),
            "rm_scores": scores,
        },
        non_tensors={
            "data_source": np.array(["test"] * len(lengths), dtype=object),
            "reward_model": np.array([{"ground_truth": "0"}] * len(lengths), dtype=object),
        },
    )


def verls_penalties(batch: DataProto, limit: int, buffer: int, factor: float) -> list[float]:
    """What verl's manager adds to the score."""
    overlong = {"enable": True, "len": buffer, "penalty_factor": factor, "log": True}
    reward_config = {"reward_kwargs": {"overlong_buffer_cfg": overlong, "max_resp_len": limit}}
    config = OmegaConf.create({"reward": reward_config})
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")

    async def run() -> list[float]:
        manager = DAPORewardManager(config, tokenizer, compute_score=lambda **_: SCORE)
        return [float((await manager.run_single(batch[[row]]))["reward_score"]) - SCORE for row in range(len(batch))]

    return asyncio.run(run())


@pytest.mark.parametrize(("limit", "buffer", "factor"), [(LIMIT, 16, 1.0), (LIMIT, LIMIT, 0.5), (40, 7, 3.0)])
def test_the_penalty_is_that_of_verls_reward_manager(limit, buffer, factor):
    lengths = list(range(1, limit + 1))
    limits = LengthLimits(response=limit, buffer=buffer, factor=factor)
    ours = limits.penalties(np.array(lengths), LIMIT)
    assert ours.tolist() == pytest.approx(verls_penalties(rows(lengths), limit, buffer, factor))
    assert ours.min() == -factor


def test_the_trainer_adds_it_to_the_score_at_the_last_token():
    batch = rows([1, 32, 48, LIMIT])
    scores = batch.batch["rm_scores"].clone()
    trainer = ArmsTrainer.__new__(ArmsTrainer)
    trainer.config = OmegaConf.create({"data": {"max_response_length": LIMIT}})
    trainer.use_rm, trainer.timing_raw = False, {}
    trainer._limits = LengthLimits()
    assert torch.equal(trainer._fit_compute_reward(batch).batch["rm_scores"], scores)
    assert torch.equal(trainer.reward_tensor, scores)

    trainer._limits = LengthLimits(buffer=0.5)
    trainer._fit_compute_reward(batch)
    assert trainer.reward_tensor.sum(dim=-1).tolist() == [1, 1, 0.5, 0]
    assert torch.equal(trainer.reward_tensor != 0, (scores != 0) & (torch.tensor([1, 1, 1, 0])[:, None] == 1))
    assert torch.equal(batch.batch["rm_scores"], scores), "what was scored stays"
    assert "_fit_compute_reward" in vars(SeparateRayPPOTrainer), "upstream's phase"
