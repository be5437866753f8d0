"""What a run says of itself: one line when it starts, one line a step."""

from typing import Any

from omegaconf import DictConfig

from darts.checks.placement import pools
from darts.checks.run import without_overlap
from darts.config import PLANNED, DartsConfig

COUNTS = {"utility": "as many candidates as pay", PLANNED: "candidates as planned"}
"""What stands for a number of candidates."""


def banner(config: DictConfig, darts: DartsConfig, cache_tokens: int = 0) -> str:
    """Whether DARTS is on, and with which settings; `cache_tokens`: of prefixes that a rank of the actor can hold."""
    placement_text = f"; {pools(config)}" if darts.placement == "disaggregated" else ""
    if not darts.enable:
        return f"plugin active, darts.enable=false: plain verl{placement_text}"
    if darts.strategy != "darts":
        return f"plugin active: strategy {darts.strategy}, M={darts.group_size}{placement_text}"
    allocation, selection = darts.allocation, darts.selection
    mean_budget = darts.group_size if allocation.mode == "off" else allocation.mean_candidates
    count_text = COUNTS.get(mean_budget) or f"{mean_budget:g} candidates"
    spare_prompts = darts.spare_prompts
    spare_text = "as planned" if spare_prompts == PLANNED else f"{spare_prompts:.0%}"
    return (
        f"plugin active: M={darts.group_size} of {count_text} ({allocation.mode}, {allocation.low} to "
        f"{allocation.high}), selection {selection.mode}: K={darts.num_short} shortest and L={selection.num_long} "
        f"longest ({selection.long_end}, wait: {selection.long_wait}), early stop {darts.early_stop}"
        f"{'' if darts.some_shortest_only else ' (no group is shortest-only: it never acts)'}"
        f"{f', spare prompts {spare_text}' if spare_prompts else ''}{placement_text}"
        f"; log-probs {_when_computed(config, darts, cache_tokens)}"
    )


def _when_computed(config: DictConfig, darts: DartsConfig, cache_tokens: int) -> str:
    if darts.overlap.mode == "off":
        off_reason = without_overlap(config)
        return f"after generation{'' if off_reason is None else f' ({off_reason[0]})'}"
    cache_text = f", prefixes of up to {cache_tokens:,} tokens on a rank" if cache_tokens else ""
    return f"during generation (overlap {darts.overlap.mode}{cache_text})"


def progress_line(metrics: dict[str, Any], step: int, total: int) -> str:
    """One readable line about a step; a figure that the step did not measure is left out."""
    is_pool_scored = "darts/reward/pool_mean" in metrics
    figures = (
        ("timing_s/step", "{:.1f} s"),
        ("timing_s/gen", "rollout {:.1f} s"),
        ("darts/length/pool_mean", "mean length {:.0f}"),
        ("darts/length/kept_mean", "of the kept {:.0f}"),
        ("darts/length/pool_max", "longest {:.0f}"),
        ("darts/reward/pool_mean", "reward {:.2f}"),
        ("darts/reward/kept_mean", "of the kept {:.2f}" if is_pool_scored else "reward of the kept {:.2f}"),
        ("darts/allocation/total", "{:.0f} candidates"),
        ("darts/candidates/dropped", "dropped {:.0f}"),
        ("darts/candidates/aborted", "of them aborted {:.0f}"),
    )
    return f"step {step}/{total}: " + ", ".join(text.format(metrics[key]) for key, text in figures if key in metrics)
