"""An arm that takes turns with others trains as it would alone: same prompts, budgets and rows in every step.

The bench's own trainer on scripted servers; the actor is a file that counts its updates. That the real actor,
optimizer and schedule are the same to the last bit is shown in `tests/actor/test_swap.py`.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from scripted_rounds import M, Rows, load_script, make_trainer, rows_of, take_records
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer

from darts.bench.arms import BenchArm
from darts.bench.plan import BenchPlan
from darts.bench.records import TIMES, Records
from darts.bench.states import ArmStates
from darts.bench.trainer import ArmsTrainer
from darts.config import DartsConfig
from darts.forecast import CostModel
from darts.latency import LatencyCurve
from darts.strategy import BYPASS_MODE, make_strategy

PROMPTS, STEPS = 4, 4
ADAPTIVE = BenchArm(name="adaptive", strategy="darts", changes={"allocation.mode": "adaptive", "early_stop": "off"})
TAIL = BenchArm(name="tail", strategy="tail_batching")
PLANNED = BenchArm(
    name="planned",
    strategy="darts",
    changes={
        "allocation.mode": "off",
        "selection.mode": "dual_end",
        "early_stop": "off",
        "spare_prompts": "plan",
        "bypass": True,
    },
)
SORTED = BenchArm(name="sorted", strategy="sorted", changes={"sorted.prompts": 2})


def length_of(row: int, candidate: int) -> int:
    """Each of the eight prompts comes again after two steps; the last ones vary most. Ends lie two tokens apart."""
    return 1 + 2 * row + candidate % 5 * (2 + row // 3)


class CountingActor:
    """The actor's worker group: its state is how often it was updated, by whom."""

    def __init__(self) -> None:
        self.updates: list[str] = []

    def save_checkpoint(self, folder, hdfs_path=None, step=0, max_ckpt_to_keep=None) -> None:
        (Path(folder) / "actor.json").write_text(json.dumps(self.updates))

    def load_checkpoint(self, folder, hdfs_path=None, del_local_after_load=False) -> None:
        self.updates = json.loads((Path(folder) / "actor.json").read_text())


@pytest.fixture(scope="module")
def cluster(scripted, make_config):
    config = make_config("actor_rollout_ref.rollout.agent.num_workers=2", f"data.train_batch_size={PROMPTS}")
    return scripted.manager(config), scripted.servers, config


@pytest.fixture
def bench(cluster, monkeypatch):
    """Runs arms to some step in a folder; what each arm's steps trained on."""

    def fit_step(trainer, batch_dict) -> None:
        launched = trainer._rounds.launched
        shortest = sorted(range(len(launched)), key=lambda place: launched[place])[:PROMPTS]

        def held(place, candidate) -> bool:
            """Where more is launched than trained on, the shortest end, and what is too much does not."""
            return len(launched) > PROMPTS and (place not in shortest or candidate >= M)

        load_script(cluster[1], launched, trainer.global_steps, token_ms=1, length=length_of, held=held)
        assert trainer.served == trainer.actor_rollout_wg.updates, "the servers have this arm's weights"
        choice = trainer.strategy.choice if trainer.strategy.plans else None
        trainer.metrics, trainer.timing_raw = dict.fromkeys(TIMES.values(), 1.0), {}
        batch = trainer._fit_generate(trainer._fit_get_batch(batch_dict))
        take_records(cluster[1])
        trainer.actor_rollout_wg.updates.append(trainer.strategy.darts.strategy)
        trainer.checkpoint_manager.update_weights(trainer.global_steps)
        trainer.trained.append(
            {
                "launched": trainer._rounds.launched,
                "budgets": trainer._rollout.plan.budgets.tolist(),
                "rows": rows_of(batch),
                "queue": trainer.strategy.queue,
                "late": [trainer.ledger.state_dict()[name] for name in ("late", "most")],
                "choice": choice,
                "bypass": OmegaConf.select(trainer.config, BYPASS_MODE),
                "next_choice": trainer.strategy.choice if trainer.strategy.plans else None,
                "updates": list(trainer.actor_rollout_wg.updates),
            }
        )

    monkeypatch.setattr(SeparateRayPPOTrainer, "fit_step", fit_step)
    cost = CostModel(LatencyCurve([1, 16], [0.01, 0.02]), "scripted")
    monkeypatch.setattr(ArmsTrainer, "_set_cost_model", lambda self: self.planner.use_cost_model(cost))
    monkeypatch.setattr(ArmsTrainer, "_get_dp_size", lambda self, *_: 1)

    def run(folder: Path, arms: list[BenchArm], last: int = STEPS, stop_in_round: int | None = None) -> dict[str, list]:
        block = OmegaConf.to_container(cluster[2].darts) | {"seed": 0, "early_stop": "eager"}
        block["latency"]["refine"] = False  # by seconds of the clock, which differ
        trainer = make_trainer(ArmsTrainer, cluster, DartsConfig.from_block(block, M), Rows(8))
        trainer.config.darts = block
        trainer.config.trainer.balance_batch = False
        trainer._folder, trainer._data = folder, trainer.train_dataloader
        trainer._plan = BenchPlan(arms=arms, seeds=1, steps=last, validate_every=0, overrides=[])
        trainer.train_dataloader = list(trainer._plan.turns())
        trainer.use_strategy(make_strategy(trainer.darts, PROMPTS))
        trainer._bypass = False
        trainer.actor_rollout_wg, trainer._initial, trainer.trained = CountingActor(), None, []
        trainer.checkpoint_manager.update_weights = lambda step: setattr(
            trainer, "served", list(trainer.actor_rollout_wg.updates)
        )
        trainer.served = []
        trainer._prepare_overlap()
        trainer._states = ArmStates(folder / "states", [arm.name for arm in arms], trainer.actor_rollout_wg)
        trainer._records = Records(folder / "records.jsonl")
        trainer._records.keep(trainer._states.is_complete)
        found: dict[str, list] = {arm.name: [] for arm in arms}
        take_turn = trainer._take_turn

        def watched(arm, place, seed, step) -> None:
            if step == stop_in_round and place == len(arms) - 1:
                raise KeyboardInterrupt
            take_turn(arm, place, seed, step)
            found[arm.name].append(trainer.trained[-1])

        trainer._take_turn = watched
        for turn in trainer._plan.turns():
            trainer.fit_step(turn)
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "arms", [(ADAPTIVE, TAIL), (ADAPTIVE, TAIL, SORTED), (ADAPTIVE, TAIL, PLANNED, SORTED)], ids=len
)
def test_an_arm_that_takes_turns_trains_as_it_does_alone(bench, tmp_path, arms):
    together = bench(tmp_path / "together", list(arms))
    for arm in arms:
        alone = bench(tmp_path / arm.name, [arm])[arm.name]
        assert len(alone) == STEPS
        assert together[arm.name] == alone
        assert alone[-1]["updates"] == [arm.strategy] * STEPS, "only its own"
        assert {step["bypass"] for step in alone} == {arm is PLANNED}
        for step, next_step in pairwise(alone):
            assert next_step["choice"] == step["next_choice"], "what was planned is what the next turn goes by"
    assert any(step["queue"] for step in together["tail"])
    assert [bool(step["choice"]) for step in together.get("planned", [])] in ([], [False, True, True, True])
    budgets = [step["budgets"] for step in together["adaptive"]]
    assert any(len(set(step)) > 1 for step in budgets[1:]), "what was learnt matters, so equality says something"


@pytest.mark.slow
def test_a_bench_that_was_stopped_goes_on_where_it_was(bench, tmp_path):
    arms = [ADAPTIVE, TAIL, PLANNED]
    whole = bench(tmp_path / "whole", arms)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "stopped", arms, stop_in_round=3)
    rest = bench(tmp_path / "stopped", arms)
    for arm in arms:
        assert rest[arm.name] == whole[arm.name][2:], "the round that was stopped begins again"
    records = Records(tmp_path / "stopped" / "records.jsonl").read()
    assert sorted((record.step, record.arm) for record in records) == sorted(
        (step, arm.name) for step in range(1, STEPS + 1) for arm in arms
    )
