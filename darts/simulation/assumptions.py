"""What a replay assumes in favour of some of the arms that it compares: lines for tables and documents.

Contract: pure. What no arm gains by is not told.
"""

from collections.abc import Sequence

from darts.simulation.replay import Arm, Setting, bypasses, width
from darts.strategy import make_strategy

SHOWN = 6
"""Names of arms in a line."""


def assumptions(arms: Sequence[Arm], setting: Setting) -> list[str]:
    """One line for each assumption, with the arms that it favours."""
    costs, cluster = setting.costs, setting.cluster
    shared = f", and make generation {costs.contention:g} s longer for each hidden second (contention)"
    slower = shared if cluster.placement == "colocated" else ", and generation is none the slower"
    more = "candidate_s=0, so the prefill and the requests of more candidates take no time, which favours"
    stopped = "abort_s=0, so aborts arrive at once, which favours"
    ranks = "training scales perfectly with the GPUs, although rows are not balanced over ranks, which favours"
    hidden = f"log-probs during generation hide {costs.hidden_share:.0%} of that phase (hidden_share){slower}:"
    favoured: dict[str, list[str]] = {more: [], stopped: [], ranks: [], hidden: []}
    for arm in arms:
        strategy = make_strategy(arm.config(setting.group_size, cluster.placement), setting.num_prompts)
        round_ = strategy.next_round()
        rules, most = round_.rules, width(arm, setting)
        surplus = most > setting.group_size
        early = surplus and rules.group_rules(most).stops_early
        stops = round_.harvest is not None or (rules.enable and (early or rules.selection.long_wait == "deadline"))
        if costs.candidate_s == 0 and (surplus or len(round_.queued) + round_.new > setting.num_prompts):
            favoured[more].append(arm.name)
        if cluster.abort_s == 0 and stops:
            favoured[stopped].append(arm.name)
        if cluster.train_gpus > 1 and strategy.overrides.get("trainer.balance_batch") is False:
            favoured[ranks].append(arm.name)
        if rules.enable and rules.overlap.mode != "off" and not bypasses(arm, strategy):
            favoured[hidden].append(arm.name)
    return [f"{assumption} {_names(names)}" for assumption, names in favoured.items() if names]


def _names(names: Sequence[str]) -> str:
    others = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {others} others" if others > 0 else "")
