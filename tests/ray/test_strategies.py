"""Every strategy through the real trainer's rollout and update, manager, workers and client; servers with a script.

Checked is what servers generated and stopped, what was kept, the rows at `update_actor` in their order, and that over
50 steps, with a resume, each prompt is trained on once or waits.
"""

import asyncio
import concurrent.futures
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import handle
from omegaconf import OmegaConf
from scripted_rounds import ROWS, M, length_of, load_script, make_trainer, rows_of, take_records
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

from darts.config import DartsConfig
from darts.evidence.checkpoint import StateError
from darts.metrics import METRICS
from darts.rollout.manager import _Job
from darts.strategy import make_strategy
from darts.training.trainer import RayDartsTrainer

PROMPTS = 4


@pytest.fixture(scope="module")
def cluster(scripted, make_config):
    """A manager of two workers, two servers, and their configuration."""
    config = make_config("actor_rollout_ref.rollout.agent.num_workers=2", f"data.train_batch_size={PROMPTS}")
    return scripted.manager(config), scripted.servers, config


class Run:
    """A trainer without its workers: data, rollouts and updates are real, what an update does is recorded."""

    def __init__(self, cluster, monkeypatch, strategy: str, **block) -> None:
        self.manager, self.servers, config = cluster
        base = OmegaConf.to_container(config.darts) | {"strategy": strategy, "seed": 0, "early_stop": "eager"} | block
        trainer = self.trainer = make_trainer(RayDartsTrainer, cluster, DartsConfig.from_block(base, M))
        monkeypatch.setattr(RayDartsTrainer, "_get_dp_size", lambda self, *_: 2)
        self.updates = []
        monkeypatch.setattr(RayPPOTrainer, "_update_actor", lambda trainer, batch: self.updates.append(batch))
        trainer.use_strategy(make_strategy(trainer.darts, PROMPTS))
        trainer._rounds = self.loader = trainer.round_loader(trainer.train_dataloader)
        if strategy != "sorted":  # which switches it off
            trainer.config.trainer.balance_batch = False  # so that the order of rows can be seen

    def step(self, held=lambda launched: lambda place, candidate: False) -> SimpleNamespace:
        """One rollout and update; what the servers served, and what was trained on.

        `held(launched)(place, candidate)`: whether a candidate never ends by itself.
        """
        trainer = self.trainer
        trainer.global_steps += 1
        batch = self.loader.next()
        launched = self.loader.launched
        load_script(self.servers, launched, trainer.global_steps, token_ms=1, held=held(launched))
        trainer.metrics, trainer.timing_raw = {}, {}
        batch = trainer._fit_generate(trainer._fit_get_batch(batch))
        before = batch.select_idxs(np.arange(len(batch)))
        trainer._update_actor(batch)
        records = take_records(self.servers)
        assert set(trainer.metrics) >= {"darts/tokens/generated"}
        assert {name for name in trainer.metrics if name.startswith("darts/")} <= set(METRICS)
        return SimpleNamespace(
            batch=before,
            launched=launched,
            records=records,
            rows=rows_of(before),
            updated=rows_of(self.updates[-1]),
            token_num=self.updates[-1].meta_info["global_token_num"],
            attention=self.updates[-1].batch["attention_mask"].sum(dim=-1).tolist(),
            metrics=trainer.metrics,
            pool=trainer._rollout.pool,
        )


@pytest.fixture
def start(cluster, monkeypatch):
    return lambda strategy, **block: Run(cluster, monkeypatch, strategy, **block)


@pytest.mark.parametrize("strategy", ["none", "bypass"])
def test_plain_strategies_generate_m_responses_without_streaming(start, strategy):
    """As validation: the servers' seeds, priorities and chunks are not ours."""
    step = start(strategy).step()
    assert len(step.records) == M * PROMPTS
    assert not any(record["streamed"] for record in step.records)
    assert {record["seed"] for record in step.records} == {None}
    assert [prompt for prompt, *_ in step.rows] == [row for row in step.launched for _ in range(M)]
    assert step.metrics["darts/candidates/launched"] == step.metrics["darts/allocation/total"] == M * PROMPTS
    assert step.metrics["darts/tokens/generated"] == step.metrics["darts/tokens/kept"] == 3 * M * PROMPTS
    assert sorted(step.updated) == sorted(step.rows)


def test_shortest_k_keeps_the_shortest_and_aborts_nobody(start):
    step = start("shortest_k", allocation={"mode": "adaptive", "mean_candidates": 6, "high": 6}).step()
    assert len(step.records) == 6 * PROMPTS
    assert all(record["ended"] for record in step.records)
    expected = []
    for row in step.launched:
        shortest = sorted(range(6), key=lambda candidate: (length_of(row, candidate), candidate))[:M]
        expected += [(row, candidate, length_of(row, candidate)) for candidate in sorted(shortest)]
    assert step.rows == expected


def test_darts_stops_saturated_groups_and_keeps_the_longest_of_the_others(start):
    block = {"allocation": {"mode": "uniform", "mean_candidates": 5.5, "high": 6}, "streaming": {"chunk_tokens": 1}}
    budgets = [6, 6, 5, 5]
    # Lengths are 1, 2, 3, 4, 5, 1 more than the row's: of a saturated group the last two are too long.
    step = start("darts", **block).step(lambda launched: lambda place, c: budgets[place] == 6 and c in (3, 4))
    kept = Counter(prompt for prompt, *_ in step.rows)
    assert set(kept.values()) == {M}
    for place, (row, budget) in enumerate(zip(step.launched, budgets, strict=True)):
        mine = [candidate for prompt, candidate, _ in step.rows if prompt == row]
        aborted = step.pool.aborted[step.pool.prompt == place]
        if budget == 6:
            assert set(mine) == {0, 1, 2, 5}
            assert aborted.tolist() == [False, False, False, True, True, False]
        else:
            assert set(mine) == {0, 1, 2, 4}
            assert not aborted.any()


def test_a_short_round_of_tail_batching_keeps_the_first_to_finish_and_stops_the_rest(start):
    def held(launched):
        slowest = max(range(len(launched)), key=lambda place: launched[place] % 13)
        return lambda place, candidate: place == slowest or candidate == M

    step = start("tail_batching").step(held)
    assert len(step.launched) == 5
    assert len(step.records) == 5 * 5
    trained = list(dict.fromkeys(prompt for prompt, *_ in step.rows))
    assert trained == [row for row in step.launched if row in trained], "in the order of the batch"
    assert len(trained) == PROMPTS
    (left,) = set(step.launched) - set(trained)
    assert left % 13 == max(row % 13 for row in step.launched), "the slowest prompt was not waited for"
    assert all({c for p, c, _ in step.rows if p == row} == {0, 1, 2, 3} for row in trained)
    place = step.launched.index(left)
    assert step.pool.aborted[step.pool.prompt == place].any()
    assert not step.pool.kept[step.pool.prompt == place].any()
    assert step.metrics["darts/group/returned"] == step.metrics["darts/strategy/queue"] == 1
    assert step.metrics["darts/candidates/kept"] == M * PROMPTS
    assert not {name for name in step.metrics if name.startswith("darts/latency/predicted")}


def test_long_rounds_of_tail_batching_race_nobody(start):
    run = start("tail_batching")
    queue: list[int] = []
    for _ in range(4):
        step = run.step()
        queue += [row for row in step.launched if row not in {prompt for prompt, *_ in step.rows}]
    step = run.step()
    assert list(step.launched) == queue
    assert len(step.records) == M * PROMPTS
    assert all(record["ended"] for record in step.records)
    assert sorted(step.rows) == sorted((row, c, length_of(row, c)) for row in queue for c in range(M))
    assert run.trainer.strategy.queue == ()


def test_sorted_trains_from_short_to_long_and_begins_again_what_is_unfinished(start):
    def all_but_the_shortest(launched):
        shortest = sorted(range(len(launched)), key=lambda place: launched[place] % 13)[:PROMPTS]
        return lambda place, candidate: place not in shortest

    run = start("sorted", sorted={"prompts": 3})
    first, second, third, fourth = (run.step(all_but_the_shortest) for _ in range(4))
    cached = set(first.launched)
    assert len(cached) == 3 * PROMPTS
    trained = [{prompt for prompt, *_ in step.rows} for step in (first, second, third)]
    assert set.union(*trained) == cached
    assert sum(map(len, trained)) == len(cached)
    assert set(second.launched) == cached - trained[0], "no new prompts before the cached are consumed"
    assert not set(fourth.launched) & cached
    slowest = [max(row % 13 for row in some) for some in trained]
    assert slowest == sorted(slowest), "short prompts come first"
    for step in (first, second, third):
        ranks = np.split(np.array([length for *_, length in step.updated]), 2)
        assert all((np.diff(rank) >= 0).all() for rank in ranks)
        assert sorted(step.updated) == sorted(step.rows)
        assert step.token_num == step.attention, "what verl counts per row moves with the rows"
    assert (run.trainer.config.trainer.balance_batch, run.trainer.config.actor_rollout_ref.actor.shuffle) == (
        False,
        False,
    )


@pytest.mark.parametrize("strategy", ["darts", "tail_batching", pytest.param("sorted", marks=pytest.mark.slow)])
def test_over_fifty_steps_no_prompt_is_lost_and_a_resumed_run_goes_on(start, strategy):
    """Each time that a prompt is drawn it is trained on once, or waits at the end."""
    drawn, trained = Counter(), Counter()
    settings = {"sorted": {"prompts": 2}, "spare_prompts": 0.5, "selection": {"mode": "dual_end", "long_end": "cut"}}
    run = start(strategy, **settings)
    for number in range(50):
        if number == 23:
            saved = json.loads(
                json.dumps(
                    {
                        "strategy": strategy,
                        "state": run.trainer.strategy.state_dict(),
                        "ledger": run.trainer.ledger.state_dict(),
                        "position": run.loader.position,
                    }
                )
            )
            expected = run.trainer.strategy.queue
            run = start(strategy, **settings)
            run.trainer._load_rounds(saved)
            run.trainer.global_steps = number
            assert run.trainer.strategy.queue == expected
        step = run.step()
        queued = run.loader.round.queued
        assert step.launched[: len(queued)] == queued
        drawn.update(step.launched[len(queued) :])
        counts = Counter(prompt for prompt, *_ in step.rows)
        assert sum(counts.values()) == M * PROMPTS
        assert all(count % M == 0 for count in counts.values())
        trained.update({row: count // M for row, count in counts.items()})
    assert sum(trained.values()) == 50 * PROMPTS
    assert drawn == trained + Counter(run.trainer.strategy.queue)
    epochs = sum(drawn.values()) // ROWS
    assert set(drawn.values()) <= {epochs, epochs + 1}, "the data come round evenly, also across the resume"


def test_a_checkpoint_of_another_strategy_is_refused(start):
    run = start("tail_batching")
    for state, says in ((None, "without a queue"), ({"strategy": "sorted"}, "strategy is sorted")):
        with pytest.raises(ValueError, match=says):
            run.trainer._load_rounds(state)


def test_a_checkpoint_with_a_queue_is_refused_by_a_run_without_one(start):
    """Its place in the data is not verl's: the run would begin them again."""
    trainer = start("darts").trainer
    trainer._rounds = None
    trainer.darts = replace(trainer.darts, state=replace(trainer.darts.state, strict=False))
    state = trainer.planner.state_dict() | {"rounds": {"strategy": "sorted", "state": {}, "position": {}}}
    with pytest.raises(StateError, match="strategy=sorted, which has prompts of its own") as refusal:
        trainer._load_state(state)
    assert refusal.value.loses_prompts


def test_answers_that_are_late_are_waited_for(cluster):
    """All groups end by themselves, and the workers' jobs before the manager has heard of it."""

    class LateWorker:
        told = 0

        async def settled(self, number, known):
            await asyncio.sleep(0.1)
            return [f"uid-{n}" for n in range(known, 5)]

        async def end_waits(self, number, trained):
            self.told += 1

    async def gather():
        done = concurrent.futures.Future()
        done.set_result("rows")
        worker, complete = LateWorker(), []
        job = _Job(handle(worker), SimpleNamespace(future=lambda: done), [f"uid-{n}" for n in range(5)], 20)
        assert await manager._gather([job], complete, None) == ["rows"]
        assert worker.told == 1
        return complete

    manager = cluster[0]
    manager.begin_round(manager.rules, harvest=4)
    assert asyncio.run(gather()) == [f"uid-{n}" for n in range(4)], "those with which the rollout goes on"


def test_a_round_larger_than_the_data_is_refused(start):
    with pytest.raises(ValueError, match=r"data.train_batch_size=4: a round of darts.strategy=sorted may launch 44"):
        start("sorted", sorted={"prompts": 11})
