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
    more, stopped, unbalanced, overlapped = [], [], [], []
    for arm in arms:
        strategy = make_strategy(arm.config(setting.group_size, setting.cluster.placement), setting.num_prompts)
        round_ = strategy.next_round()
        rules, most = round_.rules, width(arm, setting)
        if most > setting.group_size or len(round_.queued) + round_.new > setting.num_prompts:
            more.append(arm.name)
        early = most > setting.group_size and rules.group_rules(most).stops_early
        deadline = rules.selection.long_wait == "deadline"
        if round_.harvest is not None or (rules.enable and (early or deadline)):
            stopped.append(arm.name)
        if strategy.overrides.get("trainer.balance_batch") is False:
            unbalanced.append(arm.name)
        if rules.enable and rules.overlap.mode != "off" and not bypasses(arm, strategy):
            overlapped.append(arm.name)
    costs, cluster = setting.costs, setting.cluster
    lines = []
    if more and costs.candidate_s == 0:
        lines.append(
            f"candidate_s=0, so the prefill and the requests of more candidates take no time, which favours "
            f"{_names(more)}"
        )
    if stopped and cluster.abort_s == 0:
        lines.append(f"abort_s=0, so aborts arrive at once, which favours {_names(stopped)}")
    if unbalanced and cluster.train_gpus > 1:
        lines.append(
            f"training scales perfectly with the GPUs, although rows are not balanced over ranks, which favours "
            f"{_names(unbalanced)}"
        )
    if overlapped:
        shared = f", and make generation {costs.contention:g} s longer for each hidden second (contention)"
        lines.append(
            f"log-probs during generation hide {costs.hidden_share:.0%} of that phase (hidden_share)"
            f"{shared if cluster.placement == 'colocated' else ', and generation is none the slower'}: "
            f"{_names(overlapped)}"
        )
    return lines


def _names(arms: Sequence[str]) -> str:
    rest = len(arms) - SHOWN
    return ", ".join(arms[:SHOWN]) + (f" and {rest} others" if rest > 0 else "")
