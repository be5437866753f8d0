"""What a replay assumes in favour of some of the arms that it compares: lines for tables and documents.

Contract: pure. What no arm gains by is not told.
"""

from collections.abc import Sequence

from darts.simulation.replay import ReplayArm, Setting, bypasses, width
from darts.strategy import make_strategy

SHOWN = 6
"""Names of arms in a line."""


def assumptions(arms: Sequence[ReplayArm], setting: Setting) -> list[str]:
    """One line for each assumption, with the arms that it favours."""
    costs, cluster = setting.costs, setting.cluster
    same_gpus = f", and make generation {costs.contention:g} s longer for each hidden second (contention)"
    slower_engines = same_gpus if cluster.placement == "colocated" else ", and generation is none the slower"
    more_candidates = "candidate_s=0, so the prefill and the requests of more candidates take no time, which favours"
    prompt_aborts = "abort_s=0, so aborts arrive at once, which favours"
    ranks = "training scales perfectly with the GPUs, although rows are not balanced over ranks, which favours"
    hidden = f"log-probs during generation hide {costs.hidden_share:.0%} of that phase (hidden_share){slower_engines}:"
    favoured: dict[str, list[str]] = {more_candidates: [], prompt_aborts: [], ranks: [], hidden: []}
    for arm in arms:
        strategy = make_strategy(arm.config(setting.group_size, cluster.placement), setting.num_prompts)
        round_ = strategy.next_round()
        rules, most_candidates = round_.rules, width(arm, setting)
        has_surplus = most_candidates > setting.group_size
        early = has_surplus and rules.group_rules(most_candidates).stops_early
        has_aborts = round_.harvest is not None or (rules.enable and (early or rules.selection.long_wait == "deadline"))
        if costs.candidate_s == 0 and (has_surplus or len(round_.queued) + round_.new > setting.num_prompts):
            favoured[more_candidates].append(arm.name)
        if cluster.abort_s == 0 and has_aborts:
            favoured[prompt_aborts].append(arm.name)
        if cluster.train_gpus > 1 and strategy.overrides.get("trainer.balance_batch") is False:
            favoured[ranks].append(arm.name)
        if rules.enable and rules.overlap.mode != "off" and not bypasses(arm, strategy):
            favoured[hidden].append(arm.name)
    return [f"{assumption} {_names(arm_names)}" for assumption, arm_names in favoured.items() if arm_names]


def _names(arm_names: Sequence[str]) -> str:
    num_others = len(arm_names) - SHOWN
    return ", ".join(arm_names[:SHOWN]) + (f" and {num_others} others" if num_others > 0 else "")
