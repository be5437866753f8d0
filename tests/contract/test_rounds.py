"""Batches by rounds over verl's samplers: every row comes once an epoch; a resumed run goes on with the same rows."""

import json
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import RandomSampler, SequentialSampler
from verl.trainer.ppo.utils import create_rl_sampler

from darts.config import DartsConfig
from darts.strategy import Round, TailBatching
from darts.training.rounds import RoundLoader

ROWS = 11


def own_sampler(rows):
    return RandomSampler(rows, generator=torch.Generator().manual_seed(3))


SAMPLERS = {
    "verl": lambda rows: create_rl_sampler(OmegaConf.create({"shuffle": True, "seed": 5}), rows),
    "verl in order": lambda rows: create_rl_sampler(OmegaConf.create({"shuffle": False}), rows),
    "torch": own_sampler,
    "torch in order": SequentialSampler,
}


def loader(sampler: str, next_round) -> RoundLoader:
    rows = list(range(100, 100 + ROWS))
    return RoundLoader(rows, SAMPLERS[sampler](rows), lambda some: {"rows": some}, next_round)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_row_comes_once_in_an_epoch_though_rounds_do_not_divide_it(sampler):
    rounds = loader(sampler, lambda: Round(rules=None, new=4))
    batches = [batch["rows"] for batch in islice(rounds, 22)]
    drawn = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [4] * 22
    epochs = [drawn[start : start + ROWS] for start in range(0, 88, ROWS)]
    assert all(sorted(epoch) == list(range(100, 100 + ROWS)) for epoch in epochs)
    assert (epochs[0] == epochs[1]) == sampler.endswith("in order")
    assert rounds.epoch in (7, 8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 11, 12])
def test_a_resumed_loader_goes_on_with_the_same_rows(sampler, stop):
    first = loader(sampler, lambda: Round(rules=None, new=4))
    before = list(islice(first, stop))
    assert len(before) == stop
    position = json.loads(json.dumps(first.position))
    again = loader(sampler, lambda: Round(rules=None, new=4))
    again.go_to(position)
    assert list(islice(again, 12)) == list(islice(first, 12))


def test_queued_rows_come_first_and_the_strategy_is_asked_once_a_batch():
    strategy, asked = TailBatching(DartsConfig.from_block({}, group_size=4), 4), []

    def next_round():
        asked.append(strategy.next_round())
        return asked[-1]

    rounds = loader("verl in order", next_round)
    for _ in range(4):
        rounds.next()
        strategy.ended(rounds.launched, range(4))
    assert rounds.next() == {"rows": [104, 109, 103, 108]}
    assert rounds.launched == (4, 9, 3, 8)
    assert len(asked) == 5
    assert rounds.round == asked[-1]


def test_verl_takes_all_steps_for_the_first_epoch_and_keeps_nothing_of_it():
    rounds = loader("verl", lambda: Round(rules=None, new=4))
    assert 10**9 // len(rounds) == 0
    assert rounds.state_dict() == {}
    rounds.load_state_dict({})
    assert rounds.position == {"epoch": 0, "drawn": 0}


@pytest.mark.parametrize(
    "position",
    [None, {}, {"epoch": 1}, {"epoch": -1, "drawn": 0}, {"epoch": 0, "drawn": 12}, {"epoch": 0, "drawn": 1.5}],
)
def test_what_is_no_position_in_these_data_is_refused(position):
    with pytest.raises(ValueError, match="must be an epoch, and how many of 11 rows were drawn"):
        loader("verl", lambda: Round(rules=None, new=4)).go_to(position)
