"""Strategies side by side: the same prompts and draws for all, tables and JSON out.

Contract: pure. Every figure is a mean over all steps of all seeds; no step is left out. `none` is always replayed:
the others are compared with it. The oracles are no strategies (`darts.simulation.bound`): they train on plain verl's
prompts, keep the M shortest of all candidates that any strategy could have drawn, know all lengths before, and compute
no log-probs. One has plain verl's batches, the other chooses which prompts come together, as `tail_batching` and
`sorted` may.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from darts.evidence import statistics
from darts.evidence.statistics import Estimate
from darts.evidence.tables import table
from darts.simulation.bound import Throughput
from darts.simulation.costs import StepTime
from darts.simulation.draws import Dataset
from darts.simulation.replay import Arm, Reshape, Setting, Step, replay, width
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
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
    bubble: float
    gap_closed: float  # NaN where there is no gap
    per_prompt: float  # candidates launched
    saturated: float  # share of the prompts with M_up of them
    left: int
    reward_kept: float
    reward_pool: float
    longest_kept: float
    model: bool = False  # lengths were moved by a model of shaping

    @property
    def thrown_away(self) -> float:
        """Share of the generated tokens."""
        return 1 - self.kept / self.generated

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes null."""
        state = asdict(self) | {"rollout_s": self.phases["rollout"], "thrown_away": self.thrown_away}
        return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in state.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Summary":
        """What `to_dict` gave."""
        values = {field.name: math.nan if state[field.name] is None else state[field.name] for field in fields(cls)}
        return cls(**values | {"speed_up": Estimate(**state["speed_up"])})


def compare(
    trace: LengthTrace,
    arms: Sequence[Arm],
    setting: Setting,
    steps: int,
    *,
    seeds: int = 1,
    reshape: Mapping[str, Reshape] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Summary]:
    """Replays arms on one cluster.

    Args:
        trace: lengths.
        arms: with or without `none`, which is replayed in any case.
        setting: what they have in common.
        steps: of each.
        seeds: replays with other draws.
        reshape: models of shaping by arm.
        say: hears how far it is.

    Returns:
        `none`, the arms in their order, the oracle, the oracle with its own batches.

    Raises:
        ConfigError: an arm whose settings cannot work.
    """
    arms = [Arm(name=PLAIN, block={"strategy": PLAIN}), *(arm for arm in arms if arm.name != PLAIN)]
    most = max(width(arm, setting) for arm in arms)
    done: dict[str, list[Step]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        dataset = Dataset(trace, most, seed)
        for arm in arms:
            for number, step in enumerate(replay(arm, setting, dataset, steps, (reshape or {}).get(arm.name)), 1):
                done[arm.name].append(step)
                say(f"{setting.cluster.gpus} GPUs, {arm.name}: seed {seed + 1}/{seeds}, step {number}/{steps}")
    plain = done[PLAIN]
    oracles = [[step.bound for step in plain], _own_batches(plain, setting, steps)]
    rows = [_summary(arm, done[arm.name], plain, setting, oracles, arm.name in (reshape or {})) for arm in arms]
    return [*rows, *(_oracle(*pair, plain, setting) for pair in zip((ORACLE, FREE_ORACLE), oracles, strict=True))]


def _own_batches(plain: Sequence[Step], setting: Setting, steps: int) -> list[StepTime]:
    """The oracle that chooses its batches among the prompts of a replay; every step has the mean time."""
    cluster, size = setting.cluster, setting.group_size
    throughput = Throughput(setting.curve, cluster.engines, cluster.max_num_seqs)
    times = []
    for first in range(0, len(plain), steps):
        kept = np.concatenate([step.oracle for step in plain[first : first + steps]])
        decode_s = throughput.least_seconds_of(kept.max(axis=1), int(kept.sum()), setting.num_prompts, size) / steps
        tokens = round(kept.sum() / steps)
        launched = setting.num_prompts * size
        time = setting.costs.time(
            decode_s=decode_s, launched=launched, tokens=tokens, cluster=cluster, bypass=True, overlap=False
        )
        times += [time] * steps
    return times


def _summary(
    arm: Arm,
    steps: Sequence[Step],
    plain: Sequence[Step],
    setting: Setting,
    oracles: Sequence[Sequence[StepTime]],
    model: bool,
) -> Summary:
    times = [step.time for step in steps]
    strategy = strategy_class(arm.config(setting.group_size, setting.cluster.placement).strategy)
    own, base, oracle = (
        float(np.mean([time.rollout for time in some]))
        for some in (times, [step.time for step in plain], oracles[strategy.chooses_prompts])
    )
    return Summary(
        name=arm.name,
        gpus=setting.cluster.gpus,
        steps=len(steps),
        step_s=float(np.mean([time.step for time in times])),
        speed_up=_speed_up(plain, times),
        phases=_phases(times),
        bound_s=float(np.mean([step.bound.rollout for step in steps])),
        generated=float(np.mean([step.generated for step in steps])),
        kept=float(np.mean([step.kept for step in steps])),
        bubble=1 - sum(step.slot_s for step in steps) / sum(step.slot_capacity_s for step in steps),
        gap_closed=(base - own) / (base - oracle) if base > oracle else float("nan"),
        per_prompt=sum(step.launched for step in steps) / sum(step.prompts for step in steps),
        saturated=float(np.mean([step.saturated for step in steps])),
        left=steps[-1].queue,
        reward_kept=float(np.mean([step.reward_kept for step in steps])),
        reward_pool=float(np.mean([step.reward_pool for step in steps])),
        longest_kept=float(np.mean([step.longest_kept for step in steps])),
        model=model,
    )


def _oracle(name: str, times: Sequence[StepTime], plain: Sequence[Step], setting: Setting) -> Summary:
    kept, unknown = float(np.mean([step.oracle.sum() for step in plain])), float("nan")
    phases = _phases(times)
    return Summary(
        name=name,
        gpus=setting.cluster.gpus,
        steps=len(plain),
        step_s=float(np.mean([time.step for time in times])),
        speed_up=_speed_up(plain, times),
        phases=phases,
        bound_s=phases["rollout"],
        generated=kept,
        kept=kept,
        bubble=unknown,
        gap_closed=1.0,
        per_prompt=float(setting.group_size),
        saturated=unknown,
        left=0,
        reward_kept=unknown,
        reward_pool=unknown,
        longest_kept=float(np.mean([step.oracle.max() for step in plain])),
    )


def _speed_up(plain: Sequence[Step], times: Sequence[StepTime]) -> Estimate:
    above, below = (np.array([time.step for time in some]) for some in ([step.time for step in plain], times))
    return statistics.ratio(above, below, np.random.default_rng(0))


def _phases(times: Sequence[StepTime]) -> dict[str, float]:
    names = ("rollout", "log_prob", "update", "sync", "other")
    return {name: float(np.mean([getattr(time, name) for time in times])) for name in names}


def markdown(summaries: Sequence[Summary]) -> str:
    """One table, a row for each strategy and cluster."""
    rows = []
    for row in summaries:

        def known(value: float, form: str) -> str:
            return "-" if np.isnan(value) else format(value, form)

        rows.append(
            [
                row.gpus,
                f"{row.name} (MODEL)" if row.model else row.name,
                f"{row.step_s:.1f}",
                "1" if row.name == PLAIN else format(row.speed_up, ".2f"),
                f"{row.phases['rollout']:.1f}",
                f"{row.bound_s:.1f}",
                known(row.gap_closed, ".0%"),
                f"{row.generated:,.0f}",
                f"{row.kept:,.0f}",
                f"{row.thrown_away:.0%}",
                known(row.bubble, ".0%"),
                f"{row.per_prompt:.1f}",
                known(row.saturated, ".0%"),
                row.left,
            ]
        )
    columns = [
        "GPUs", "strategy", "s a step", "speed-up", "rollout s", "bound s", "gap closed", "tokens generated", "kept",
        "thrown away", "bubble", "M' mean", "saturated", "left",
    ]  # fmt: skip
    return table(columns, rows)
