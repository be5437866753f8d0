"""Strategies side by side: the same prompts and draws for all, tables and JSON out.

Contract: pure. Every figure is a mean over all steps of all seeds; no step is left out. `none` is always replayed:
the others are compared with it. The oracles are no strategies (`darts.simulation.bound`): they train on plain verl's
prompts, keep the M shortest of all candidates that any strategy could have drawn, know all lengths before, and compute
no log-probs. One has plain verl's batches, the other chooses which prompts come together, as `tail_batching` and
`sorted` may.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np

from darts.evidence import statistics
from darts.evidence.statistics import Estimate
from darts.evidence.tables import number, table
from darts.simulation.bound import Throughput
from darts.simulation.costs import StepTime
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Reshape, Setting, SimulatedStep, replay, width
from darts.simulation.trace import LengthTrace
from darts.strategy import strategy_class

PLAIN, ORACLE, FREE_ORACLE = "none", "oracle", "oracle, own batches"
FORMULAS = (
    "speed-up: seconds of plain verl's steps over the strategy's, with a 95 % bootstrap interval over steps.",
    "bound s: rollout seconds of an oracle on the batches that the strategy itself trained on; none is faster.",
    "gap closed: (plain's rollout seconds - the strategy's) / (plain's - the oracle's); for strategies that choose "
    "their prompts, the oracle that chooses its batches. These draw a prompt's candidates again when it comes again, "
    "and may be lucky, which the oracle may not.",
    "thrown away: share of the generated tokens that is not trained on. left: prompts that were launched and still "
    "wait at the end; their time is not in the mean. saturated: share of the prompts with M_up candidates.",
    "bubble: 1 - seconds in which slots ran a sequence / (slots x seconds of decoding), where an engine's slots are "
    "the lesser of max_num_seqs and its share of the candidates launched.",
)
CAVEAT = (
    "Lengths are replayed as they were recorded: what a strategy changes in the model, and so in later lengths, is not "
    "in these figures."
)


MEANS = ("generated", "kept", "saturated", "reward_kept", "reward_pool", "longest_kept")
"""What a summary has the mean of, over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySummary:
    """One strategy on one cluster; means over steps."""

    name: str
    gpus: int
    steps: int
    step_s: float
    speed_up: Estimate
    phases: Mapping[str, float]  # seconds by phase
    bound_s: float  # rollout of an oracle on the same prompts
    generated: float  # tokens
    kept: float
    gap_closed: float  # NaN where there is no gap
    per_prompt: float  # candidates launched
    longest_kept: float
    left: int = 0
    bubble: float = math.nan  # what follows is not known of an oracle
    saturated: float = math.nan  # share of the prompts with M_up candidates
    reward_kept: float = math.nan
    reward_pool: float = math.nan
    model: bool = False  # lengths were moved by a model of shaping

    @property
    def rollout_s(self) -> float:
        """Seconds of the rollout."""
        return self.phases["rollout"]

    @property
    def thrown_away(self) -> float:
        """Share of the generated tokens."""
        return 1 - self.kept / self.generated


def compare(
    trace: LengthTrace,
    arms: Sequence[ReplayArm],
    setting: Setting,
    steps: int,
    *,
    seeds: int = 1,
    reshape: Mapping[str, Reshape] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[ReplaySummary]:
    """Replays `none` and the arms on one cluster.

    Args:
        steps: of each arm and seed.
        seeds: replays with other draws.
        reshape: models of shaping by arm.
        say: hears how far it is.

    Returns:
        `none`, the arms in their order, the oracle, the oracle with its own batches.

    Raises:
        ConfigError: an arm whose settings cannot work.
    """
    arms = [ReplayArm(name=PLAIN, block={"strategy": PLAIN}), *(arm for arm in arms if arm.name != PLAIN)]
    most_candidates = max(width(arm, setting) for arm in arms)
    steps_by_arm: dict[str, list[SimulatedStep]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        dataset = Dataset(trace, most_candidates, seed)
        for arm in arms:
            for step_count, step in enumerate(replay(arm, setting, dataset, steps, (reshape or {}).get(arm.name)), 1):
                steps_by_arm[arm.name].append(step)
                say(f"{setting.cluster.gpus} GPUs, {arm.name}: seed {seed + 1}/{seeds}, step {step_count}/{steps}")
    plain = steps_by_arm[PLAIN]
    oracles = [[step.bound for step in plain], _own_batches(plain, setting, steps)]
    rows = [_summary(arm, steps_by_arm[arm.name], plain, setting, oracles, arm.name in (reshape or {})) for arm in arms]
    return [*rows, *(_oracle(*pair, plain, setting) for pair in zip((ORACLE, FREE_ORACLE), oracles, strict=True))]


def _own_batches(plain_steps: Sequence[SimulatedStep], setting: Setting, num_steps: int) -> list[StepTime]:
    """The oracle that chooses its batches among the prompts of a replay; every step has the mean time."""
    cluster, size = setting.cluster, setting.group_size
    throughput = Throughput(setting.curve, cluster.engines, cluster.max_num_seqs)
    step_times = []
    for first_step in range(0, len(plain_steps), num_steps):
        kept = np.concatenate([step.oracle for step in plain_steps[first_step : first_step + num_steps]])
        decode_s = throughput.least_seconds_of(kept.max(axis=1), int(kept.sum()), setting.num_prompts, size) / num_steps
        step_time = setting.costs.time(
            decode_s=decode_s,
            launched=setting.num_prompts * size,
            tokens=round(kept.sum() / num_steps),
            cluster=cluster,
            bypass=True,
            overlap=False,
        )
        step_times += [step_time] * num_steps
    return step_times


def _summary(
    arm: ReplayArm,
    steps: Sequence[SimulatedStep],
    plain_steps: Sequence[SimulatedStep],
    setting: Setting,
    oracle_times: Sequence[Sequence[StepTime]],
    is_modelled: bool,
) -> ReplaySummary:
    strategy = strategy_class(arm.config(setting.group_size, setting.cluster.placement).strategy)
    rollout_s, plain_s = (_mean(arm_steps, "time.rollout") for arm_steps in (steps, plain_steps))
    oracle_s = _mean(oracle_times[strategy.chooses_prompts], "rollout")
    return ReplaySummary(
        **_timing(arm.name, [step.time for step in steps], plain_steps, setting),
        bound_s=_mean(steps, "bound.rollout"),
        bubble=1 - sum(step.slot_s for step in steps) / sum(step.slot_capacity_s for step in steps),
        gap_closed=(plain_s - rollout_s) / (plain_s - oracle_s) if plain_s > oracle_s else math.nan,
        per_prompt=sum(step.launched for step in steps) / sum(step.prompts for step in steps),
        left=steps[-1].queue,
        model=is_modelled,
        **{name: _mean(steps, name) for name in MEANS},
    )


def _oracle(name: str, times: Sequence[StepTime], plain: Sequence[SimulatedStep], setting: Setting) -> ReplaySummary:
    kept_tokens = float(np.mean([step.oracle.sum() for step in plain]))
    return ReplaySummary(
        **_timing(name, times, plain, setting),
        bound_s=_mean(times, "rollout"),
        generated=kept_tokens,
        kept=kept_tokens,
        gap_closed=1.0,
        per_prompt=float(setting.group_size),
        longest_kept=float(np.mean([step.oracle.max() for step in plain])),
    )


def _timing(name: str, times: Sequence[StepTime], plain: Sequence[SimulatedStep], setting: Setting) -> dict[str, Any]:
    """What the rows of a strategy and of an oracle have in common."""
    seconds = np.array([time.step for time in times])
    plain_seconds = np.array([step.time.step for step in plain])
    return {
        "name": name,
        "gpus": setting.cluster.gpus,
        "steps": len(times),
        "step_s": _mean(times, "step"),
        "speed_up": statistics.ratio(plain_seconds, seconds, np.random.default_rng(0)),
        "phases": {phase.name: _mean(times, phase.name) for phase in fields(StepTime)},
    }


def _mean(records: Sequence[object], attribute_path: str) -> float:
    return float(np.mean([*map(attrgetter(attribute_path), records)]))


# --- tables ----------------------------------------------------------------------------------------------------------


def _marked(row: ReplaySummary) -> str:
    return f"{row.name} (MODEL)" if row.model else row.name


def _speed_up(row: ReplaySummary) -> str:
    return "1" if row.name == PLAIN else format(row.speed_up, ".2f")


def _gap(row: ReplaySummary) -> str:
    return number(row.gap_closed, ".0%")


COLUMNS: Mapping[str, Callable[[ReplaySummary], object]] = {
    "GPUs": lambda row: row.gpus,
    "strategy": _marked,
    "s a step": lambda row: f"{row.step_s:.1f}",
    "speed-up": _speed_up,
    "rollout s": lambda row: f"{row.rollout_s:.1f}",
    "bound s": lambda row: f"{row.bound_s:.1f}",
    "gap closed": _gap,
    "tokens generated": lambda row: f"{row.generated:,.0f}",
    "kept": lambda row: f"{row.kept:,.0f}",
    "thrown away": lambda row: f"{row.thrown_away:.0%}",
    "bubble": lambda row: number(row.bubble, ".0%"),
    "M' mean": lambda row: f"{row.per_prompt:.1f}",
    "saturated": lambda row: number(row.saturated, ".0%"),
    "left": lambda row: row.left,
}


def markdown(summaries: Sequence[ReplaySummary]) -> str:
    """One table, a row for each strategy and cluster."""
    return table([*COLUMNS], [[cell_of(row) for cell_of in COLUMNS.values()] for row in summaries])


def speed_ups(summaries: Sequence[ReplaySummary]) -> str:
    """The speed-ups alone, a row for each strategy, a column for each cluster."""
    return _by_gpus(summaries, _speed_up)


def gaps(summaries: Sequence[ReplaySummary]) -> str:
    """The shares of the gap that are closed, a row for each strategy, a column for each cluster."""
    return _by_gpus(summaries, _gap)


def _by_gpus(summaries: Sequence[ReplaySummary], cell_of: Callable[[ReplaySummary], str]) -> str:
    cluster_sizes = sorted({row.gpus for row in summaries})
    cells_by_name: dict[str, dict[int, str]] = {}
    for row in summaries:
        cells_by_name.setdefault(_marked(row), {})[row.gpus] = cell_of(row)
    columns = ["strategy", *(f"{gpus:,} GPUs" for gpus in cluster_sizes)]
    return table(columns, [[name, *(cells[gpus] for gpus in cluster_sizes)] for name, cells in cells_by_name.items()])
