"""The arms of a bench, as data: a name, a strategy, and changes to the block `darts:` of the configuration.

Contract: pure. Whatever an arm does not say is as in the configuration that all arms share, so an arm is read off its
own line. `BenchArm.config` checks the whole block; an arm from the command line that cannot work is one `ConfigError`.
"""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darts.config import STRATEGIES, ConfigError, DartsConfig, refuse_unknown_keys
from darts.strategy import BYPASS_MODE

SHARED = ("enable", "trace", "placement", "allocation.ema_weight", "latency", "state", "overlap.kv_cache_gib")
"""What no arm can have of its own: it is made once, with the trainer and its engines."""
FORM = "--arm NAME=STRATEGY[,darts.KEY=VALUE...], as --arm 'two long=darts,darts.selection.num_long=2'."


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArm:
    """One of the things that are compared.

    Example: `BenchArm(name="two long", strategy="darts", changes={"selection.num_long": 2}, overlap="token")`.
    """

    name: str
    strategy: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # by path within `darts:`
    overlap: str | None = None  # `darts.overlap.mode`; None: as in the configuration
    bypass: bool = False  # with verl's `BYPASS_MODE`: the one setting outside of `darts:` that arms may differ in
    about: str = ""  # what it shows, for people

    def block(self, darts_block: Mapping[str, Any] | None) -> dict[str, Any]:
        """The block `darts:` of this arm; `darts_block` is that of the configuration, and stays as it is."""
        made_block = copy.deepcopy(dict(darts_block or {})) | {"enable": True, "strategy": self.strategy}
        changed_settings = dict(self.changes) | ({} if self.overlap is None else {"overlap.mode": self.overlap})
        for setting_path, setting_value in changed_settings.items():
            *section_names, last_key = setting_path.split(".")
            inner_block = made_block
            for section_name in section_names:
                if not isinstance(inner_block.get(section_name), dict):
                    inner_block[section_name] = {}
                inner_block = inner_block[section_name]
            inner_block[last_key] = setting_value
        return made_block

    def config(self, darts_block: Mapping[str, Any] | None, group_size: int) -> DartsConfig:
        """The settings of this arm.

        Raises:
            ConfigError: its changes do not fit the configuration.
        """
        arm_settings = DartsConfig.from_block(self.block(darts_block), group_size)
        if self.bypass and arm_settings.overlap.mode != "off":
            broken_rule = f"there are no log-probs to overlap (darts.overlap.mode={arm_settings.overlap.mode})."
            raise ConfigError(BYPASS_MODE, True, broken_rule, "choose one of the two.")
        return arm_settings


def _arm(name: str, strategy: str, about: str, **given: Any) -> BenchArm:
    """An arm with `overlap`, `bypass`, and changes, whose paths have `__` for the dot."""
    fields = {key: given.pop(key) for key in ("overlap", "bypass") if key in given}
    changes = {path.replace("__", "."): value for path, value in given.items()}
    return BenchArm(name=name, strategy=strategy, changes=changes, about=about, **fields)


def _deadline(arm_name: str, arm_about: str, **arm_fields: Any) -> BenchArm:
    """1.5 M candidates for every prompt, one longest of those that end before the deadline."""
    return _arm(arm_name, "darts", arm_about, allocation__mode="uniform", allocation__mean_candidates=None,
                allocation__low=None, allocation__high=None, selection__mode="dual_end",
                selection__long_wait="deadline", **arm_fields)  # fmt: skip


NONE = _arm("none", "none", "plain verl", overlap="off")
DARTS = _arm("darts", "darts", "the method, as configured")
TAIL_BATCHING = _arm("tail_batching", "tail_batching", "long responses put together into few rounds (RollPacker)")
BYPASS = _arm("bypass", "bypass", "plain verl, the servers' log-probs as the old ones", overlap="off")
DEADLINE = _deadline("deadline", "dual-end groups; none waits once all have M valid of 1.5 M candidates")
STRATEGY_ARMS = (
    NONE,
    BYPASS,
    _arm("shortest_k", "shortest_k", "more candidates, the M shortest kept, nothing stopped (GFPO)"),
    DARTS,
    TAIL_BATCHING,
    _arm("sorted", "sorted", "many prompts cached, short ones trained on first (SortedRL)"),
)
# The paper's order, each with what the arm before has. M of M candidates, all kept: nothing but the overlap.
ABLATION = (
    NONE,
    _arm("+ streaming", "darts", "log-probs during generation, M of M candidates", overlap="token",
         allocation__mode="off", allocation__mean_candidates=None, selection__mode="dual_end"),
    _arm("+ dual-end", "darts", "K shortest and L longest of equally many candidates", overlap="token",
         allocation__mode="uniform", selection__mode="dual_end"),
    _arm("+ adaptive", "darts", "candidates by spread; saturated groups shortest-only, stopped early", overlap="token",
         allocation__mode="adaptive", selection__mode="auto", early_stop="eager"),
)  # fmt: skip
COMPONENTS = (
    DARTS,
    _arm("uniform", "darts", "without adaptive allocation, so that no group is saturated and stopped early",
         allocation__mode="uniform"),
    _arm("dual-end only", "darts", "without tail pruning: saturated groups keep their longest too",
         selection__mode="dual_end"),
    _arm("no early stop", "darts", "shortest-only groups run to their end", early_stop="off"),
    _arm("no longest", "darts", "without the L longest: every group is shortest-only", selection__num_long=0),
    _arm("overlap off", "darts", "log-probs after generation", overlap="off"),
    _arm("overlap sequence", "darts", "log-probs of complete responses during generation", overlap="sequence"),
    _arm("overlap token", "darts", "log-probs of growing responses too", overlap="token"),
)  # fmt: skip
BEYOND = (
    DARTS,
    DEADLINE,
    _arm("exact", "darts", "only those are stopped that have grown past the M-th shortest", early_stop="exact"),
)  # fmt: skip

# No log-probs after generation: hidden, or the servers' own ones. What competes has the same.
FAST = (
    NONE,
    BYPASS,
    DEADLINE,
    _deadline("deadline + overlap", "and log-probs during generation", overlap="token"),
    _deadline("deadline + bypass", "and the servers' log-probs as the old ones", overlap="off", bypass=True),
    _arm("tail + bypass", "tail_batching", "tail batching, the servers' log-probs as the old ones", overlap="off",
         bypass=True),
)  # fmt: skip


def _distinct(bench_arms: Iterable[BenchArm]) -> tuple[BenchArm, ...]:
    return tuple({bench_arm.name: bench_arm for bench_arm in bench_arms}.values())


PRESETS: dict[str, tuple[BenchArm, ...]] = {
    "strategies": STRATEGY_ARMS,
    "ablation": ABLATION,
    "components": _distinct((NONE, *COMPONENTS)),
    "beyond": _distinct((NONE, *BEYOND)),
    "fast": FAST,
    "all": _distinct((*STRATEGY_ARMS, *ABLATION, *COMPONENTS, *BEYOND, *FAST)),
    "quick": (NONE, DARTS, TAIL_BATCHING),
}


def chosen(names: Sequence[str], written: Sequence[str] = ()) -> tuple[BenchArm, ...]:
    """The arms of a command, in its order, each once.

    Args:
        names: of presets and of arms that presets have.
        written: as `parse_arm`.

    Raises:
        ConfigError: an unknown name, a name that is given to two different arms, or as `parse_arm`.
    """
    known = {arm.name: (arm,) for arm in PRESETS["all"]}
    found: dict[str, BenchArm] = {}
    for name in names:
        if name not in PRESETS and name not in known:
            near = difflib.get_close_matches(name, [*PRESETS, *known], n=1)
            rule = f"must be a preset ({', '.join(PRESETS)}) or an arm ({', '.join(known)})."
            raise ConfigError(
                "--arms", name, rule, f"did you mean {near[0]!r}?" if near else f"write your own as {FORM}"
            )
        found |= {arm.name: arm for arm in (PRESETS.get(name) or known[name])}
    for line in written:
        arm = parse_arm(line)
        if arm.name in found:
            raise ConfigError("--arm", line, f"there is an arm {arm.name!r} already.", "give it another name.")
        found[arm.name] = arm
    return tuple(found.values())


def parse_arm(arm_line: str) -> BenchArm:
    """An arm from the command line.

    Example:
        >>> parse_arm("two long=darts,darts.selection.num_long=2").changes
        {'selection.num_long': 2}

    Raises:
        ConfigError: not of this form, an unknown strategy or key, or a key that is given twice.
    """
    name, equals, line_rest = arm_line.partition("=")
    strategy, *arm_settings = (line_part.strip() for line_part in line_rest.split(","))
    if not (name.strip() and equals and strategy):
        raise ConfigError("--arm", arm_line, "needs a name and a strategy.", f"write {FORM}")
    if strategy not in STRATEGIES and "." not in strategy.strip("."):
        broken_rule = f"strategy {strategy!r} must be one of {', '.join(STRATEGIES)}, or package.module.Class."
        raise ConfigError("--arm", arm_line, broken_rule, "choose one of them.")
    changed_settings: dict[str, Any] = {}
    bypass = False
    for setting in arm_settings:
        setting_path, equals, setting_value = setting.partition("=")
        if setting_path == BYPASS_MODE and setting_value.lower() in ("true", "false"):
            bypass = setting_value.lower() == "true"
            continue
        if not (setting_path.startswith("darts.") and equals):
            broken_rule = f"{setting!r} is not darts.KEY=VALUE, nor {BYPASS_MODE}=true."
            raise ConfigError("--arm", arm_line, broken_rule, f"write {FORM}")
        setting_path = setting_path.removeprefix("darts.")
        refusal_text = (
            "is given twice" if setting_path in changed_settings
            else "is the word behind the arm's name" if setting_path == "strategy"
            else "is shared by all arms: set it by --override" if setting_path.startswith(SHARED)
            else None
        )  # fmt: skip
        if refusal_text is not None:
            raise ConfigError("--arm", arm_line, f"darts.{setting_path} {refusal_text}.", "remove it.")
        changed_settings[setting_path] = _value(setting_value)
    overlap = changed_settings.pop("overlap.mode", None)
    arm = BenchArm(name=name.strip(), strategy=strategy, changes=changed_settings, overlap=overlap, bypass=bypass)
    refuse_unknown_keys(arm.block({}))
    return arm


def _value(value_text: str) -> Any:
    """What the text is in JSON, else the text itself."""
    try:
        return json.loads(value_text)
    except ValueError:
        return value_text
