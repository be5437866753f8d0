"""Which strategy and settings to take on a cluster: `python -m darts.simulation plan`.

Contract: pure. Both presets of `darts`, a grid of M_up, L and lambda by the utility, and every other strategy as it
stands, are replayed on the same draws. What is recommended (our choice): the fastest `darts` that keeps a longest
response (L >= 1), as the paper does; beside it the fastest of all. Replay knows nothing of shaping, for which L is
there.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from darts.config import PRESETS, STRATEGIES
from darts.simulation.comparison import PLAIN, ReplaySummary, compare
from darts.simulation.replay import ReplayArm, Setting
from darts.simulation.trace import LengthTrace

HIGHS = (1.25, 1.5, 2.0)
"""M_up over M."""
LONGS = (0, 1, 2)
COST_WEIGHTS = (1.0, 0.3, 0.1, 0.0)
"""Lambda; from careful with time to none. Those that lead to the same rollouts as one before are left out."""
MOSTLY, LEVEL = 0.5, 0.99


def grid(group_size: int, block: Mapping[str, Any]) -> list[ReplayArm]:
    """What is tried; `block` is what all have in common."""
    presets = {name: {**block, "strategy": "darts", "preset": name} for name in PRESETS}
    arms = [ReplayArm(name=f"darts preset={name}", block=preset_block) for name, preset_block in presets.items()]
    highs = dict.fromkeys(math.ceil(high_factor * group_size) for high_factor in HIGHS)
    longs = [num_long for num_long in LONGS if num_long < group_size]
    for most_candidates, num_long, cost_weight in product(highs, longs, COST_WEIGHTS):
        arm_settings = {
            "strategy": "darts",
            "allocation": {"high": most_candidates, "mean_candidates": "utility", "cost_weight": cost_weight},
            "selection.num_long": num_long,
        }
        arm_name = f"darts M_up={most_candidates} L={num_long} lambda={cost_weight:g}"
        arms.append(ReplayArm(name=arm_name, block=with_settings(block, arm_settings)))
    others = [name for name in STRATEGIES if name not in (PLAIN, "darts")]
    return [*arms, *(ReplayArm(name=name, block={**block, "strategy": name}) for name in others)]


def advise(
    trace: LengthTrace, setting: Setting, steps: int, tried_arms: Sequence[ReplayArm]
) -> tuple[list[ReplaySummary], Mapping[str, Any], list[str]]:
    """Replays the grid.

    Returns:
        `none`, the arms that differ, from the fastest to the slowest, and the two oracles; the block `darts:` that is
        recommended; for a person what to set, what to expect, and what this cannot know.

    Raises:
        ConfigError: settings that cannot work.
    """
    arm_blocks = {arm.name: arm.block for arm in tried_arms} | {PLAIN: {"strategy": PLAIN}}
    plain_row, *arm_rows, oracle_row, free_oracle_row = compare(trace, tried_arms, setting, steps)
    different_rows = {(arm_blocks[row.name]["strategy"], row.step_s, row.generated): row for row in arm_rows[::-1]}
    ranked_rows = sorted(different_rows.values(), key=lambda row: row.step_s)
    chosen = next(
        row
        for row in ranked_rows
        if arm_blocks[row.name]["strategy"] == "darts"
        and arm_blocks[row.name].get("selection", {}).get("num_long", 1) > 0
    )
    fastest = min(ranked_rows[0], plain_row, key=lambda row: row.step_s)
    lines = []
    for title, row in (("Recommended", chosen), ("Fastest in this replay", fastest)):
        lines += [
            f"{title}: {flags(arm_blocks[row.name])}",
            f"  {row.step_s:.1f} s a step ({plain_row.step_s:.1f} s plain): {row.speed_up:.2f} times as fast; rollout "
            f"{row.rollout_s:.1f} s ({plain_row.rollout_s:.1f}); {row.generated:,.0f} tokens generated "
            f"({plain_row.generated:,.0f}), {row.thrown_away:.0%} of them thrown away; {row.per_prompt:.1f} candidates "
            "a prompt.",
        ]
    speed_ups = {row.name: row.speed_up.value for row in arm_rows}
    for name in PRESETS:
        if (speed_up := speed_ups.get(f"darts preset={name}")) is not None:
            slower_text = ", slower than plain verl until shaping pays" if speed_up < LEVEL else ""
            lines.append(f"darts.preset={name}: {speed_up:.2f} times as fast as plain verl{slower_text}.")
    for row in (oracle_row, free_oracle_row):
        lines.append(f"The {row.name}: {row.step_s:.1f} s a step, {row.speed_up.value:.2f} times.")
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
    return [plain_row, *ranked_rows, oracle_row, free_oracle_row], arm_blocks[chosen.name], lines


def with_settings(block: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The block `darts:` with settings that win, by their paths, e.g. `{"selection.num_long": 2}`, or as a block."""
    changed_block = dict(block)
    for path, value in settings.items():
        key, _, inner_path = path.partition(".")
        inner = {inner_path: value} if inner_path else value
        if isinstance(inner, Mapping):
            present = changed_block.get(key)
            inner = with_settings(present if isinstance(present, Mapping) else {}, inner)
        changed_block[key] = inner
    return changed_block


def flags(block: Mapping[str, Any], prefix: str = "darts") -> str:
    """The block as overrides: `darts.strategy=darts darts.allocation.high=16`."""
    flag_parts = [
        flags(value, f"{prefix}.{key}") if isinstance(value, Mapping) else f"{prefix}.{key}={value}"
        for key, value in block.items()
    ]
    return " ".join(flag_parts)
