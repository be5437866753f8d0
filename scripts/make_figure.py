"""Draws docs/figures/waits.png: what a step waits for, with the same prompts under three sets of rules. From the
repository's root:

    .venv/bin/python scripts/make_figure.py [--out FILE]

Real lengths (step 103 of darts/simulation/data, cut at 2,048 tokens), replayed by the project's own groups on one
engine that runs all candidates at once. The batch is the first prompts of that step and, among them, the first hard
one, of whose first eight responses two or more reach the limit. Budgets by `paper` follow the spread of these lengths.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from darts.allocation import allocate, rounded_total
from darts.config import DartsConfig
from darts.evidence.figures import BLACK, BLUE, GREEN, ORANGE, PINK, STYLE
from darts.latency import LatencyCurve
from darts.pool import State
from darts.simulation.costs import Cluster
from darts.simulation.rollout import Outcome, SimulatedRollout
from darts.simulation.trace import PromptLengths, read_trace

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "darts" / "simulation" / "data" / "rollout_lengths.csv.gz"
STEP, LIMIT, NUM_PROMPTS, GROUP_SIZE = 103, 2048, 6, 8
GAP = 2.0
"""Between the groups, in bars."""
PLAIN = {"allocation": {"mode": "off"}, "selection": {"mode": "shortest_only"}, "early_stop": "off"}
FAST = {"preset": "fast", "allocation": {"mean_candidates": 9}, "spare_prompts": 1 / NUM_PROMPTS}
PANELS = (  # title, the block `darts:`, spare prompts
    ("plain verl: 8 candidates,\nall kept", PLAIN, 0),
    ("paper: 10.4 candidates in the mean,\n7 shortest and the longest kept", {"preset": "paper"}, 0),
    ("fast: 9 candidates, one spare prompt,\n7 shortest and the longest, maybe cut", FAST, 1),
)
FATES = {
    "kept: all, or among the shortest": BLUE, "kept: the longest": GREEN, "kept: the longest, cut": BLACK,
    "ended, dropped": "#BBBBBB", "stopped, dropped": ORANGE, "of a prompt that came late": PINK,
}  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "waits.png", metavar="FILE")
    out_path = parser.parse_args().out
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 8.6))
        for axes, (title, block, num_spare) in zip(figure.subplots(1, len(PANELS), sharex=True), PANELS, strict=True):
            draw(axes, title, rollout(DartsConfig.from_block(block, GROUP_SIZE), num_spare))
        for label, color in FATES.items():
            figure.axes[0].barh(0, 0, color=color, label=label)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FATES))
        figure.savefig(out_path, format="png", metadata={"Software": None})


def batch(num_prompts: int) -> list[PromptLengths]:
    """The first prompts of the step, and in the second place the first hard one."""
    prompts = read_trace(DATA).between(STEP, STEP).limited(LIMIT).prompts
    hard_prompt = next(prompt for prompt in prompts if prompt.truncated[:GROUP_SIZE].sum() >= 2)
    others = [prompt for prompt in prompts if prompt is not hard_prompt][: num_prompts - 1]
    return [others[0], hard_prompt, *others[1:]]


def rollout(darts: DartsConfig, num_spare: int) -> Outcome:
    """One rollout of the batch and so many spare prompts."""
    prompts = batch(NUM_PROMPTS + num_spare)
    allocation = darts.allocation
    budgets = np.full(len(prompts), GROUP_SIZE)
    if allocation.mode != "off":
        spreads = [prompt.lengths.std() for prompt in prompts]
        weights = np.array(spreads) if allocation.mode == "adaptive" else np.ones(len(prompts))
        total_budget = rounded_total(len(prompts), allocation.fallback_mean)
        budgets = allocate(weights, total_budget, allocation.low, allocation.high)
    return SimulatedRollout(
        np.concatenate([prompt.lengths[:budget] for prompt, budget in zip(prompts, budgets, strict=True)]),
        np.concatenate([prompt.truncated[:budget] for prompt, budget in zip(prompts, budgets, strict=True)]),
        budgets,
        darts,
        Cluster(gpus=1),
        LatencyCurve([1, 1024], [1.0, 1.0]),
        harvest=NUM_PROMPTS if num_spare else None,
    ).run()


def fate_of(outcome: Outcome, candidate: int, longest: set[int]) -> str:
    """What became of a candidate; `longest` are the kept long ends."""
    pool = outcome.pool
    if pool.prompt[candidate] not in outcome.complete:
        return "of a prompt that came late"
    if not pool.kept[candidate]:
        return "stopped, dropped" if pool.state[candidate] == State.STOPPED.value else "ended, dropped"
    if candidate not in longest:
        return "kept: all, or among the shortest"
    return "kept: the longest, cut" if pool.state[candidate] == State.CUT.value else "kept: the longest"


def draw(axes: Axes, title: str, outcome: Outcome) -> None:
    """A bar for each candidate, from the start of the rollout to its end."""
    pool, top, ticks = outcome.pool, 0.0, {}
    for prompt in range(pool.prompt.max() + 1):
        candidates = np.flatnonzero(pool.prompt == prompt)
        candidates = candidates[np.argsort(pool.length[candidates], kind="stable")]
        kept_candidates = candidates[pool.kept[candidates]].tolist()
        longest = set(kept_candidates[len(kept_candidates) - pool.num_long[candidates[0]] :])
        colors = [FATES[fate_of(outcome, candidate, longest)] for candidate in candidates.tolist()]
        axes.barh(top + np.arange(len(candidates)), pool.length[candidates], height=0.8, color=colors)
        ticks[top + (len(candidates) - 1) / 2] = f"prompt {prompt + 1}"
        top += len(candidates) + GAP
    axes.axvline(outcome.seconds, color=BLACK, linestyle="--", linewidth=1)
    axes.set(xlabel="decoding steps", xlim=(0, LIMIT * 1.02), yticks=list(ticks), yticklabels=list(ticks.values()))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_title(f"{title}\nends after {outcome.seconds:,.0f} steps; {pool.length.sum():,} tokens")


if __name__ == "__main__":
    main()
