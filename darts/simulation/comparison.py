"""Strategies side by side: the same prompts and draws for all, tables and JSON out.

Contract: every figure is a mean over all steps of all seeds; no step is left out. `none` is always replayed: the others
are compared with it. The oracles are no strategies (`darts.simulation.bound`): they train on plain verl's
prompts, keep the M shortest of all candidates that any strategy could have drawn, know all lengths before, and compute
no log-probs. One has plain verl's batches, the other chooses which prompts come together, as `tail_batching` and
`sorted` may.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter

import numpy as np

from darts.evidence import statistics
from darts.evidence.statistics import Estimate
from darts.evidence.tables import number, table
from darts.simulation.costs import StepTime
from darts.simulation.draws import Dataset
from darts.simulation.replay import ReplayArm, Reshape, Setting, SimulatedStep, replay
from darts.simulation.trace import LengthTrace

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
SHOWN = 6
"""Names of arms in a line of `assumptions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySummary:
    """One strategy on one cluster; means over steps. Of an oracle some is not known: NaN."""

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
    left: int
    bubble: float
    saturated: float  # share of the prompts with M_up candidates
    reward_kept: float
    reward_pool: float
    model: bool  # lengths were moved by a model of shaping

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
) -> list[ReplaySummary]:
    """Replays `none` and the arms on one cluster.

    Args:
        steps: of each arm and seed.
        seeds: replays with other draws.
        reshape: models of shaping by arm.

    Returns:
        `none`, the arms in their order, the oracle, the oracle with its own batches.

    Raises:
        ConfigError: an arm whose settings cannot work.
    """
    reshape = reshape or {}
    arms = [ReplayArm(name=PLAIN, block={"strategy": PLAIN}), *(arm for arm in arms if arm.name != PLAIN)]
    steps_by_name: dict[str, list[SimulatedStep]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        dataset = Dataset(trace, setting.width(*arms), seed)
        for arm in arms:
            steps_by_name[arm.name] += replay(arm, setting, dataset, steps, reshape.get(arm.name))
    chooses_prompts = {arm.name: setting.strategy(arm).chooses_prompts for arm in arms}
    steps_by_name[ORACLE] = [step.of_oracle() for step in steps_by_name[PLAIN]]
    steps_by_name[FREE_ORACLE] = _own_batches(steps_by_name[ORACLE], setting, steps)
    rollout_s = {name: _mean(arm_steps, "time.rollout") for name, arm_steps in steps_by_name.items()}
    plain_seconds = np.array([step.time.step for step in steps_by_name[PLAIN]])
    rows = []
    for name, arm_steps in steps_by_name.items():
        gap_s = rollout_s[PLAIN] - rollout_s[FREE_ORACLE if chooses_prompts.get(name, name == FREE_ORACLE) else ORACLE]
        step_seconds = np.array([step.time.step for step in arm_steps])
        rows.append(
            ReplaySummary(
                name=name,
                gpus=setting.cluster.gpus,
                steps=len(arm_steps),
                step_s=_mean(arm_steps, "time.step"),
                speed_up=statistics.ratio(plain_seconds, step_seconds, np.random.default_rng(0)),
                phases={phase.name: _mean(arm_steps, f"time.{phase.name}") for phase in fields(StepTime)},
                bound_s=_mean(arm_steps, "bound.rollout"),
                bubble=1 - sum(step.slot_s for step in arm_steps) / sum(step.slot_capacity_s for step in arm_steps),
                gap_closed=(rollout_s[PLAIN] - rollout_s[name]) / gap_s if gap_s > 0 else math.nan,
                per_prompt=sum(step.launched for step in arm_steps) / sum(step.prompts for step in arm_steps),
                left=arm_steps[-1].queue,
                model=name in reshape,
                **{mean_name: _mean(arm_steps, mean_name) for mean_name in MEANS},
            )
        )
    return rows


def _own_batches(oracle_steps: Sequence[SimulatedStep], setting: Setting, num_steps: int) -> list[SimulatedStep]:
    """The oracle that chooses its batches among the prompts of a replay; every step has the mean time."""
    free_steps = []
    for first_step in range(0, len(oracle_steps), num_steps):
        replayed_steps = oracle_steps[first_step : first_step + num_steps]
        kept = np.concatenate([step.oracle for step in replayed_steps])
        decode_s = setting.throughput().least_seconds_of(kept, setting.num_prompts) / num_steps
        num_launched, num_tokens = setting.num_prompts * setting.group_size, round(kept.sum() / num_steps)
        step_time = setting.costs.time(setting.cluster, decode_s, num_launched, num_tokens, bypass=True, overlap=False)
        free_steps += [replace(step, time=step_time, bound=step_time) for step in replayed_steps]
    return free_steps


def _mean(records: Sequence[object], attribute_path: str) -> float:
    return float(np.mean([*map(attrgetter(attribute_path), records)]))


def assumptions(arms: Sequence[ReplayArm], setting: Setting) -> list[str]:
    """What a replay assumes in favour of some of the arms: one line for each assumption, with their names."""
    costs, cluster = setting.costs, setting.cluster
    same_gpus = f", and make generation {costs.contention:g} s longer for each hidden second (contention)"
    slower_engines = same_gpus if cluster.placement == "colocated" else ", and generation is none the slower"
    hidden = f"log-probs during generation hide {costs.hidden_share:.0%} of that phase (hidden_share){slower_engines}:"
    favoured: dict[str, list[str]] = {}
    for arm in arms:
        strategy, most_candidates = setting.strategy(arm), setting.width(arm)
        round_ = strategy.next_round()
        rules = round_.rules
        has_surplus = most_candidates > setting.group_size
        early = has_surplus and rules.group_rules(most_candidates).stops_early
        has_aborts = round_.harvest is not None or (rules.enable and (early or rules.selection.long_wait == "deadline"))
        has_more = has_surplus or len(round_.queued) + round_.new > setting.num_prompts
        gains = {
            "candidate_s=0, so the prefill and the requests of more candidates take no time, which favours": (
                costs.candidate_s == 0 and has_more
            ),
            "abort_s=0, so aborts arrive at once, which favours": cluster.abort_s == 0 and has_aborts,
            "training scales perfectly with the GPUs, although rows are not balanced over ranks, which favours": (
                cluster.train_gpus > 1 and strategy.overrides.get("trainer.balance_batch") is False
            ),
            hidden: rules.enable and rules.overlap.mode != "off" and not arm.bypasses(strategy),
        }
        for assumption, is_gain in gains.items():
            favoured.setdefault(assumption, [])
            if is_gain:
                favoured[assumption].append(arm.name)
    lines = []
    for assumption, names in favoured.items():
        others = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
        lines += [f"{assumption} {', '.join(names[:SHOWN])}{others}"] if names else []
    return lines


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS: Mapping[str, Callable[[ReplaySummary], object]] = {
    "GPUs": lambda row: row.gpus,
    "strategy": lambda row: f"{row.name} (MODEL)" if row.model else row.name,
    "s a step": lambda row: f"{row.step_s:.1f}",
    "speed-up": lambda row: "1" if row.name == PLAIN else format(row.speed_up, ".2f"),
    "rollout s": lambda row: f"{row.rollout_s:.1f}",
    "bound s": lambda row: f"{row.bound_s:.1f}",
    "gap closed": lambda row: number(row.gap_closed, ".0%"),
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


def by_gpus(summaries: Sequence[ReplaySummary], column: str) -> str:
    """One of `COLUMNS` alone: a row for each strategy, a column for each cluster."""
    cluster_sizes = sorted({row.gpus for row in summaries})
    cells_by_name: dict[object, dict[int, object]] = {}
    for row in summaries:
        cells_by_name.setdefault(COLUMNS["strategy"](row), {})[row.gpus] = COLUMNS[column](row)
    columns = ["strategy", *(f"{gpus:,} GPUs" for gpus in cluster_sizes)]
    return table(columns, [[name, *(cells[gpus] for gpus in cluster_sizes)] for name, cells in cells_by_name.items()])
