"""The arms of a bench, as data: a name, a strategy, and changes to the block `darts:` of the configuration.

Contract: no verl import. Whatever an arm does not say is as in the configuration that all arms share, so an arm is read
off its own line. Outside of `darts:` it may have verl's bypass mode, and limits on length (`darts.bench.limits`).
`BenchArm.config` checks the whole block; an arm that cannot work is one `ConfigError`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from darts.bench.limits import BUFFER, LIMIT_KEYS, RESPONSE, LengthLimits
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
    bypass: bool = False  # with verl's `BYPASS_MODE`
    limits: LengthLimits = field(default_factory=LengthLimits)
    about: str = ""  # what it shows, for people

    def block(self, darts_block: Mapping[str, Any] | None) -> dict[str, Any]:
        """The block `darts:` of this arm; `darts_block` is that of the configuration, and stays as it is."""
        made_block = OmegaConf.create(dict(darts_block or {}) | {"enable": True, "strategy": self.strategy})
        changed_settings = dict(self.changes) | ({} if self.overlap is None else {"overlap.mode": self.overlap})
        for setting_path, setting_value in changed_settings.items():
            OmegaConf.update(made_block, setting_path, setting_value, merge=False, force_add=True)
        return OmegaConf.to_container(made_block)

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
    length_limits: dict[str, float] = {}
    bypass = False
    for setting in arm_settings:
        setting_path, equals, setting_value = setting.partition("=")
        if setting_path == BYPASS_MODE and setting_value.lower() in ("true", "false"):
            bypass = setting_value.lower() == "true"
            continue
        if setting_path in LIMIT_KEYS:
            length_limits[LIMIT_KEYS[setting_path]] = _number(arm_line, setting_path, setting_value)
            continue
        if not (setting_path.startswith("darts.") and equals):
            broken_rule = f"{setting!r} is not darts.KEY=VALUE, nor {BYPASS_MODE}=true, nor of {', '.join(LIMIT_KEYS)}."
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
    arm = BenchArm(
        name=name.strip(),
        strategy=strategy,
        changes=changed_settings,
        overlap=overlap,
        bypass=bypass,
        limits=LengthLimits(**length_limits),
    )
    refuse_unknown_keys(arm.block({}))
    return arm


def _number(arm_line: str, setting_path: str, value_text: str) -> float:
    """The number that stands there; a `ConfigError` where none does."""
    try:
        return float(value_text)
    except ValueError:
        broken_rule = f"{setting_path}={value_text} is not a number."
        raise ConfigError("--arm", arm_line, broken_rule, "write tokens, or a share below 1.") from None


def _value(value_text: str) -> Any:
    """What the text is in JSON, else the text itself."""
    try:
        return json.loads(value_text)
    except ValueError:
        return value_text


# 1.5 M candidates for every prompt, one longest of those that end before the deadline.
_DEADLINE = (
    "darts,darts.allocation.mode=uniform,darts.allocation.mean_candidates=null,darts.allocation.low=null,"
    "darts.allocation.high=null,darts.selection.mode=dual_end,darts.selection.long_wait=deadline"
)
_BYPASS = f"darts.overlap.mode=off,{BYPASS_MODE}=true"
# What a preset decides is left to it, whatever the configuration of the bench has.
_BY_PRESET = "darts.overlap.mode=off," + ",".join(
    f"darts.{setting_path}=null"
    for setting_path in (
        "spare_prompts", "bypass", "allocation.mode", "allocation.mean_candidates", "allocation.low", "allocation.high",
        "selection.mode", "selection.long_end", "selection.long_wait",
    )
)  # fmt: skip
_PARTS = (2, 4, 8)
_ARMS = {
    "none=none,darts.overlap.mode=off": "plain verl",
    "bypass=bypass,darts.overlap.mode=off": "plain verl, the servers' log-probs as the old ones",
    "shortest_k=shortest_k": "more candidates, the M shortest kept, nothing stopped (GFPO)",
    "darts=darts": "the method, as configured",
    "tail_batching=tail_batching": "long responses put together into few rounds (RollPacker)",
    "sorted=sorted": "many prompts cached, short ones trained on first (SortedRL)",
    # The paper's order, each with what the arm before has. M of M candidates, all kept: nothing but the overlap.
    "+ streaming=darts,darts.overlap.mode=token,darts.allocation.mode=off,darts.allocation.mean_candidates=null,"
    "darts.selection.mode=dual_end": "log-probs during generation, M of M candidates",
    "+ dual-end=darts,darts.overlap.mode=token,darts.allocation.mode=uniform,darts.selection.mode=dual_end":
        "K shortest and L longest of equally many candidates",
    "+ adaptive=darts,darts.overlap.mode=token,darts.allocation.mode=adaptive,darts.selection.mode=auto,"
    "darts.early_stop=eager": "candidates by spread; saturated groups shortest-only, stopped early",
    "uniform=darts,darts.allocation.mode=uniform":
        "without adaptive allocation, so that no group is saturated and stopped early",
    "dual-end only=darts,darts.selection.mode=dual_end":
        "without tail pruning: saturated groups keep their longest too",
    "no early stop=darts,darts.early_stop=off": "shortest-only groups run to their end",
    "no longest=darts,darts.selection.num_long=0": "without the L longest: every group is shortest-only",
    "overlap off=darts,darts.overlap.mode=off": "log-probs after generation",
    "overlap sequence=darts,darts.overlap.mode=sequence": "log-probs of complete responses during generation",
    "overlap token=darts,darts.overlap.mode=token": "log-probs of growing responses too",
    f"deadline={_DEADLINE}": "dual-end groups; none waits once all have M valid of 1.5 M candidates",
    "exact=darts,darts.early_stop=exact": "only those are stopped that have grown past the M-th shortest",
    f"deadline + overlap={_DEADLINE},darts.overlap.mode=token": "and log-probs during generation",
    f"deadline + bypass={_DEADLINE},{_BYPASS}": "and the servers' log-probs as the old ones",
    f"tail + bypass=tail_batching,{_BYPASS}": "tail batching, the servers' log-probs as the old ones",
    f"shortest_k + bypass=shortest_k,{_BYPASS}": "GFPO's filter, the servers' log-probs as the old ones",
    f"sorted + bypass=sorted,{_BYPASS}": "SortedRL, the servers' log-probs as the old ones",
    # What a doubter tries first.
    **{
        f"limit 1/{part} + bypass=bypass,darts.overlap.mode=off,{RESPONSE}={1 / part}":
            f"plain verl with bypass mode, training responses of at most 1/{part} of the limit"
        for part in _PARTS
    },
    f"overlong + bypass=bypass,darts.overlap.mode=off,{BUFFER}=0.5":
        "plain verl with bypass mode and DAPO's overlong penalty over the last half of the limit",
    f"paper=darts,darts.preset=paper,{_BY_PRESET}": "darts.preset=paper: the paper's rules and mix of budgets",
    f"paper, truncated=darts,darts.preset=paper,{_BY_PRESET.replace('long_end=null', 'long_end=truncated')}":
        "and a truncated response may be one of the longest",
    f"fast=darts,darts.preset=fast,{_BY_PRESET}":
        "darts.preset=fast: the cut long end, spare prompts, the servers' log-probs as the old ones",
}  # fmt: skip
"""What arms are, in the form of `--arm`, and what they show."""
ARMS = {arm.name: arm for arm in (replace(parse_arm(line), about=about) for line, about in _ARMS.items())}
_STRATEGIES = ("none", "bypass", "shortest_k", "darts", "tail_batching", "sorted")
_COMPONENTS = (
    "darts", "uniform", "dual-end only", "no early stop", "no longest", "overlap off", "overlap sequence",
    "overlap token",
)  # fmt: skip
_LIMITED = tuple(f"limit 1/{part} + bypass" for part in _PARTS)
_BYPASSED = ("none", "bypass", "tail + bypass", "shortest_k + bypass")
PRESETS: dict[str, tuple[BenchArm, ...]] = {
    preset_name: tuple(ARMS[arm_name] for arm_name in arm_names)
    for preset_name, arm_names in {
        "strategies": _STRATEGIES,
        "ablation": ("none", "+ streaming", "+ dual-end", "+ adaptive"),
        "components": ("none", *_COMPONENTS),
        "beyond": ("none", "darts", "deadline", "exact"),
        # Nothing waits for log-probs: they are hidden, or the servers' own ones. What competes has the same.
        "no_log_probs": ("none", "bypass", "deadline", "deadline + overlap", "deadline + bypass", "tail + bypass"),
        # The presets of `darts:` against what does as much against the tail, or does it more simply.
        "presets": ("none", "bypass", "tail + bypass", "paper", "fast"),
        "doubts": (*_BYPASSED, *_LIMITED, "paper", "paper, truncated", "fast"),
        "baselines": (*_BYPASSED, "sorted + bypass", *_LIMITED, "overlong + bypass"),
        "all": tuple(ARMS),
        "quick": ("none", "darts", "tail_batching"),
    }.items()
}


def chosen(names: Sequence[str], written: Sequence[str] = ()) -> tuple[BenchArm, ...]:
    """The arms of a command, in its order, each once.

    Args:
        names: of presets and of arms that presets have.
        written: as `parse_arm`.

    Raises:
        ConfigError: an unknown name, a name that is given to two different arms, or as `parse_arm`.
    """
    found: dict[str, BenchArm] = {}
    for name in names:
        if name not in PRESETS and name not in ARMS:
            near = difflib.get_close_matches(name, [*PRESETS, *ARMS], n=1)
            rule = f"must be a preset ({', '.join(PRESETS)}) or an arm ({', '.join(ARMS)})."
            fix = f"did you mean {near[0]!r}?" if near else f"write your own as {FORM}"
            raise ConfigError("--arms", name, rule, fix)
        found |= {arm.name: arm for arm in (PRESETS.get(name) or (ARMS[name],))}
    for line in written:
        arm = parse_arm(line)
        if arm.name in found:
            raise ConfigError("--arm", line, f"there is an arm {arm.name!r} already.", "give it another name.")
        found[arm.name] = arm
    return tuple(found.values())
