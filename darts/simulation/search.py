"""Which strategy and settings to take on a cluster: `python -m darts.simulation plan`.

Contract: pure. A grid of M_up, L and lambda for `darts`, and every other strategy as it stands, are replayed on the
same draws. What is recommended (our choice): the fastest `darts` that keeps a longest response (L >= 1), as the
paper does; beside it the fastest of all. Replay knows nothing of shaping, for which L is there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darts.simulation.comparison import PLAIN, ReplaySummary, compare
from darts.simulation.replay import ReplayArm, Setting
from darts.simulation.trace import LengthTrace

HIGHS = (1.25, 1.5, 2.0)
"""M_up over M."""
LONGS = (0, 1, 2)
COST_WEIGHTS = (1.0, 0.3, 0.1, 0.0)
"""Lambda; from careful with time to none. Those that lead to the same rollouts as one before are left out."""
MOSTLY = 0.5
OTHERS = ("bypass", "shortest_k", "tail_batching", "sorted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What the search found; summaries from the fastest to the slowest, without plain verl and the oracle."""

    recommended: ReplaySummary
    fastest: ReplaySummary
    plain: ReplaySummary
    oracles: Sequence[ReplaySummary]  # with plain verl's batches, and with its own
    ranked: Sequence[ReplaySummary]
    settings: Mapping[str, Mapping[str, Any]]  # by name of the arm, its block `darts:`

    def lines(self) -> list[str]:
        """For a person: what to set, what to expect, and what this cannot know."""
        chosen, fastest = self.recommended, self.fastest
        lines = [
            f"Recommended: {flags(self.settings[chosen.name])}",
            f"  {_expected(chosen, self.plain)}",
            f"Fastest in this replay: {flags(self.settings[fastest.name])}",
            f"  {_expected(fastest, self.plain)}",
            *(
                f"The {oracle_row.name}: {oracle_row.step_s:.1f} s a step, {oracle_row.speed_up.value:.2f} times."
                for oracle_row in self.oracles
            ),
        ]
        if chosen.speed_up.high < 1:
            lines.append(
                "At once, the recommended settings are slower than plain verl: a group that keeps its longest waits "
                "for the longest of more candidates. They pay only if shaping shortens later steps."
            )
        elif chosen.speed_up.low < 1 < chosen.speed_up.high or chosen.speed_up.value == 1:
            lines.append("At once, the recommended settings are no faster than plain verl; the rest is up to shaping.")
        if chosen.saturated > MOSTLY:
            lines.append(
                f"{chosen.saturated:.0%} of the groups of the recommended settings are saturated, so shortest-only: "
                "L hardly acts. Raise lambda, or set darts.allocation.mean_candidates, if more shall keep a longest."
            )
        if fastest.left:
            lines.append(f"{fastest.name} leaves {fastest.left} long prompts for later at the end of this replay.")
        lines.append(
            "Caveat: lengths are replayed as recorded. Replay knows nothing of shaping, which is what L longest and "
            "redundancy are for, and nothing of accuracy: shortest-only selection (L = 0, shortest_k) favours short "
            "answers for every prompt. Train a few dozen steps before you believe the ranking."
        )
        return lines


def grid(group_size: int, block: Mapping[str, Any]) -> list[ReplayArm]:
    """What is tried; `block` is what all have in common."""
    arms = []
    for most_candidates in dict.fromkeys(math.ceil(high_factor * group_size) for high_factor in HIGHS):
        for num_long in [num_longest for num_longest in LONGS if num_longest < group_size]:
            for cost_weight in COST_WEIGHTS:
                arm_block = {
                    "strategy": "darts",
                    "allocation": {"high": most_candidates, "cost_weight": cost_weight},
                    "selection": {"num_long": num_long},
                }
                arm_name = f"darts M_up={most_candidates} L={num_long} lambda={cost_weight:g}"
                arms.append(ReplayArm(name=arm_name, block=merged(block, arm_block)))
    return [*arms, *(ReplayArm(name=arm_name, block=merged(block, {"strategy": arm_name})) for arm_name in OTHERS)]


def advise(
    trace: LengthTrace,
    setting: Setting,
    steps: int,
    block: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Replays the grid.

    Raises:
        ConfigError: settings that cannot work.
    """
    tried_arms = grid(setting.group_size, block)
    arm_blocks = {arm.name: arm.block for arm in tried_arms} | {PLAIN: {"strategy": PLAIN}}
    summary_rows = compare(trace, tried_arms, setting, steps, say=say)
    plain_row, *other_rows = summary_rows
    different_rows = {(arm_blocks[row.name]["strategy"], row.step_s, row.generated): row for row in other_rows[-3::-1]}
    ranked_rows = sorted(different_rows.values(), key=lambda row: row.step_s)
    shaping_rows = [
        row
        for row in ranked_rows
        if arm_blocks[row.name]["strategy"] == "darts" and arm_blocks[row.name]["selection"]["num_long"] > 0
    ]
    return Advice(
        recommended=shaping_rows[0],
        fastest=min(ranked_rows[0], plain_row, key=lambda row: row.step_s),
        plain=plain_row,
        oracles=other_rows[-2:],
        ranked=ranked_rows,
        settings=arm_blocks,
    )


def merged(block: Mapping[str, Any], winning_block: Mapping[str, Any]) -> dict[str, Any]:
    """Two blocks `darts:` as one; what stands in the second wins."""
    merged_block = dict(block)
    for key, value in winning_block.items():
        both_blocks = isinstance(value, Mapping) and isinstance(merged_block.get(key), Mapping)
        merged_block[key] = merged(merged_block[key], value) if both_blocks else value
    return merged_block


def nested(key: str, value: Any) -> Any:
    """A value by its path as a block: `nested("selection.num_long", 2)` is `{"selection": {"num_long": 2}}`."""
    for key_part in reversed(key.split(".")):
        value = {key_part: value}
    return value


def flags(block: Mapping[str, Any], prefix: str = "darts") -> str:
    """The block as overrides: `darts.strategy=darts darts.allocation.high=16`."""
    flag_parts = []
    for key, value in block.items():
        flag_name = f"{prefix}.{key}"
        flag_parts.append(flags(value, flag_name) if isinstance(value, Mapping) else f"{flag_name}={value}")
    return " ".join(flag_parts)


def _expected(row: ReplaySummary, plain_row: ReplaySummary) -> str:
    return (
        f"{row.step_s:.1f} s a step ({plain_row.step_s:.1f} s plain): {row.speed_up:.2f} times as fast; rollout "
        f"{row.phases['rollout']:.1f} s ({plain_row.phases['rollout']:.1f}); {row.generated:,.0f} tokens generated "
        f"({plain_row.generated:,.0f}), {row.thrown_away:.0%} of them thrown away; {row.per_prompt:.1f} candidates a "
        "prompt."
    )
