"""The typed form of the Hydra block `darts:`.

Contract: pure; a mapping in, frozen dataclasses out. Every field states its rule; `DartsConfig.from_block` refuses
unknown keys, wrong types and values outside their rule with one `ConfigError` that names the key, the value, the rule
and the fix. What must hold between this block and the rest of verl's configuration is checked in `darts.checks`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from darts.group import EARLY_STOP, LONG_WAIT

ALLOCATION_MODES = ("adaptive", "uniform", "off")
SELECTION_MODES = ("auto", "dual_end", "shortest_only")
NO_VALID_POLICIES = ("fill", "fail")
ROUTINGS = ("balanced", "group")
PLACEMENTS = ("colocated", "disaggregated")
OVERLAP_MODES = ("auto", "off", "sequence", "token")


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value, the rule and the fix."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(f"{key}={value!r}: {rule} Fix: {fix}")
        self.key = key
        self._given = key, value, rule, fix

    def __reduce__(self) -> Any:
        """Ray carries it from the trainer's process to the user's."""
        return type(self), self._given


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationConfig:
    """How many candidates M'_i a prompt gets."""

    mode: str = field(
        default="adaptive",
        metadata={"help": "adaptive: more where lengths vary more; uniform: the same number; off: exactly M"},
    )
    mean_candidates: float | None = field(
        default=None,
        metadata={"help": "mean of M'_i over the batch, in [low, high]; None: what maximises the utility (adaptive)"},
    )
    low: int = field(default=8, metadata={"help": "M_low, fewest candidates of a prompt, at least rollout.n"})
    high: int = field(default=16, metadata={"help": "M_up, most candidates of a prompt, at least low"})
    cost_weight: float = field(default=1.0, metadata={"help": "lambda, weight of time against shaping, at least 0"})
    warmup_steps: int = field(default=1, metadata={"help": "first rollouts, with uniform budgets"})
    ema_weight: float = field(default=0.3, metadata={"help": "weight of a new observation in a prompt's variance"})

    @property
    def fallback_mean(self) -> float:
        """Mean of M'_i where none is set and the utility is not known: the middle of the bounds (our choice)."""
        return (self.low + self.high) / 2 if self.mean_candidates is None else self.mean_candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyConfig:
    """Where the cost model of the rollout comes from."""

    profile: str = field(
        default="auto",
        metadata={"help": "auto: measured at start where needed; a path: that file; off: no model"},
    )
    profile_s: float = field(default=60.0, metadata={"help": "seconds that the measurement at start may take"})
    refine: bool = field(default=True, metadata={"help": "follow what the running engines show"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StateConfig:
    """What is kept in verl's checkpoints."""

    strict: bool = field(
        default=False, metadata={"help": "a checkpoint without usable state: an error instead of a warning"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """Which M candidates of a prompt are trained on."""

    mode: str = field(
        default="auto",
        metadata={"help": "auto: dual-end, shortest-only where M'_i = high; dual_end, shortest_only: for all prompts"},
    )
    num_long: int = field(default=1, metadata={"help": "L, longest kept per prompt, in [0, rollout.n)"})
    long_wait: str = field(
        default="all",
        metadata={"help": "dual-end waits for all candidates; deadline: until every group of the batch has M valid"},
    )
    on_no_valid: str = field(
        default="fill",
        metadata={"help": "a prompt whose candidates were all truncated: fill its group with them, or fail the step"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Which candidates are scored."""

    pool: bool = field(default=False, metadata={"help": "score every finished candidate, not the kept alone"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingConfig:
    """How the lengths of running responses are followed."""

    chunk_tokens: int = field(default=256, metadata={"help": "tokens after which a server reports a response's growth"})
    abort_timeout_s: float = field(
        default=60.0, metadata={"help": "seconds after which an aborted request that did not stop fails the rollout"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapConfig:
    """Which log-probs are computed while generation runs."""

    mode: str = field(
        default="off",
        metadata={
            "help": "sequence: of complete responses; token: of growing ones too; off: none; auto (the setting's "
            "default): token where disaggregated, else off"
        },
    )
    kv_cache_gib: float = field(
        default=8.0, metadata={"help": "memory per actor rank for the prefixes of growing responses (token)"}
    )


SECTIONS = {
    "allocation": AllocationConfig,
    "selection": SelectionConfig,
    "reward": RewardConfig,
    "streaming": StreamingConfig,
    "latency": LatencyConfig,
    "state": StateConfig,
    "overlap": OverlapConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DartsConfig:
    """The block `darts:`, complete and valid for one group size.

    Example:
        >>> DartsConfig.from_block({"selection": {"num_long": 2}}, group_size=8).num_short
        6
    """

    group_size: int = field(metadata={"help": "M = actor_rollout_ref.rollout.n; not a key of this block"})
    enable: bool = field(default=True, metadata={"help": "false: plain verl"})
    placement: str = field(
        default="colocated",
        metadata={"help": "colocated: servers on the trainer's GPUs; disaggregated: on GPUs of their own"},
    )
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    early_stop: str = field(
        default="eager",
        metadata={"help": "shortest-only: abort the rest once M valid have finished; exact: hopeless ones alone; off"},
    )
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    state: StateConfig = field(default_factory=StateConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    trace: str | None = field(
        default=None,
        metadata={"help": "JSONL file with every step's metrics and lengths, for darts.report"},
    )
    routing: str = field(
        default="balanced", metadata={"help": "balanced: each candidate to the idlest server; group: siblings together"}
    )
    seed: int | None = field(
        default=None, metadata={"help": "an integer gives every candidate a seed of its own; null: the engine's stream"}
    )
    timeout_s: float = field(default=3600.0, metadata={"help": "seconds after which a rollout fails"})
    progress_s: float = field(default=30.0, metadata={"help": "seconds between progress lines of a rollout; 0: none"})

    @property
    def num_short(self) -> int:
        """K = M - L."""
        return self.group_size - self.selection.num_long

    def num_long_for(self, budget: int) -> int:
        """L for a prompt with `budget` candidates; 0 where it is shortest-only (saturated, or forced by the mode)."""
        saturated = self.selection.mode == "auto" and budget >= self.allocation.high
        if saturated or self.selection.mode == "shortest_only":
            return 0
        return self.selection.num_long

    @property
    def some_shortest_only(self) -> bool:
        """Whether some group of a batch may be shortest-only, so that early stop can act."""
        if self.allocation.mode == "adaptive":
            most = self.allocation.high
        elif self.allocation.mode == "uniform":
            most = math.ceil(self.allocation.fallback_mean)
        else:
            most = self.group_size
        return self.num_long_for(most) == 0

    @classmethod
    def from_block(cls, block: Mapping[str, Any] | None, group_size: int) -> "DartsConfig":
        """Builds and checks the configuration.

        Args:
            block: the content of `darts:`; nested mappings, missing keys take their default. `low` and `high` default
                to M and 2 M, `mean_candidates` of a uniform allocation to the middle of the two. With `enable: false`
                only `placement` is read: plain verl takes any group size.
            group_size: M, `actor_rollout_ref.rollout.n`.

        Raises:
            ConfigError: see the module's contract.
        """
        block = {} if block is None else block
        refuse_unknown_keys(block)
        enable = block.get("enable", True)
        _require("darts.enable", enable, isinstance(enable, bool), "must be true or false.", "set darts.enable=true.")
        placement = _choice("darts.placement", block.get("placement"), "colocated", PLACEMENTS)
        if not enable:
            return cls(group_size=group_size, enable=False, placement=placement)
        _require(
            "actor_rollout_ref.rollout.n",
            group_size,
            _is_int(group_size) and group_size >= 2,
            "DARTS compares the candidates of a prompt, so a group needs at least 2 responses.",
            "set actor_rollout_ref.rollout.n=8.",
        )
        return cls(
            group_size=group_size,
            placement=placement,
            allocation=_allocation(_section(block, "allocation"), group_size),
            selection=_selection(_section(block, "selection"), group_size),
            reward=_reward(_section(block, "reward")),
            early_stop=_choice("darts.early_stop", block.get("early_stop"), "eager", EARLY_STOP),
            streaming=_streaming(_section(block, "streaming")),
            latency=_latency(_section(block, "latency")),
            state=_state(_section(block, "state")),
            overlap=_overlap(_section(block, "overlap"), placement),
            trace=_trace(block.get("trace")),
            routing=_choice("darts.routing", block.get("routing"), "balanced", ROUTINGS),
            seed=_seed(block.get("seed")),
            timeout_s=_seconds("darts.timeout_s", block.get("timeout_s"), 3600.0, positive=True),
            progress_s=_seconds("darts.progress_s", block.get("progress_s"), 30.0, positive=False),
        )


def refuse_unknown_keys(block: Mapping[str, Any]) -> None:
    """Checks the names of a block `darts:`, complete or not, and of its sections.

    Raises:
        ConfigError: an unknown key; with the nearest known one.
    """
    _refuse_unknown("darts", block, [f.name for f in fields(DartsConfig) if f.name != "group_size"])
    for name, section_type in SECTIONS.items():
        if isinstance(block.get(name), Mapping):
            _refuse_unknown(f"darts.{name}", block[name], [f.name for f in fields(section_type)])


def _allocation(section: Mapping[str, Any], group_size: int) -> AllocationConfig:
    mode = _choice("darts.allocation.mode", section.get("mode"), "adaptive", ALLOCATION_MODES)
    low = _default(section.get("low"), group_size)
    _require(
        "darts.allocation.low",
        low,
        _is_int(low) and low >= group_size,
        f"M_low must be an integer of at least rollout.n={group_size}, or a group could not be filled.",
        f"set darts.allocation.low={group_size}, or null for rollout.n.",
    )
    high = _default(section.get("high"), max(2 * group_size, low))
    _require(
        "darts.allocation.high",
        high,
        _is_int(high) and high >= low,
        f"M_up must be an integer of at least M_low={low}.",
        f"set darts.allocation.high={max(2 * group_size, low)}, or null for twice rollout.n.",
    )
    mean = section.get("mean_candidates")
    if mean is None and mode == "uniform":
        mean = (low + high) / 2
    _require(
        "darts.allocation.mean_candidates",
        mean,
        mean is None or (_is_number(mean) and low <= mean <= high),
        f"the mean number of candidates must lie in [low={low}, high={high}].",
        f"set darts.allocation.mean_candidates={(low + high) / 2:g}, or widen darts.allocation.low and .high.",
    )
    cost_weight = _default(section.get("cost_weight"), 1.0)
    _require(
        "darts.allocation.cost_weight",
        cost_weight,
        _is_number(cost_weight) and cost_weight >= 0,
        "lambda must be a finite number of at least 0.",
        "set darts.allocation.cost_weight=1; larger is more careful with time.",
    )
    warmup_steps = _default(section.get("warmup_steps"), 1)
    _require(
        "darts.allocation.warmup_steps",
        warmup_steps,
        _is_int(warmup_steps) and warmup_steps >= 0,
        "must be an integer of at least 0.",
        "set darts.allocation.warmup_steps=1.",
    )
    ema_weight = _default(section.get("ema_weight"), 0.3)
    _require(
        "darts.allocation.ema_weight",
        ema_weight,
        _is_number(ema_weight) and 0 < ema_weight <= 1,
        "the weight of a new observation must lie in (0, 1].",
        "set darts.allocation.ema_weight=0.3; 1 keeps the last observation alone.",
    )
    return AllocationConfig(
        mode=mode,
        mean_candidates=None if mean is None else float(mean),
        low=low,
        high=high,
        cost_weight=float(cost_weight),
        warmup_steps=warmup_steps,
        ema_weight=float(ema_weight),
    )


def _latency(section: Mapping[str, Any]) -> LatencyConfig:
    # YAML reads a bare `off` as false.
    profile = section.get("profile")
    profile = "off" if profile is False else _default(profile, "auto")
    _require(
        "darts.latency.profile",
        profile,
        isinstance(profile, str) and profile != "",
        "must be auto, off, or the path of a file that `python -m darts.latency profile` wrote.",
        "set darts.latency.profile=auto.",
    )
    profile_s = _seconds("darts.latency.profile_s", section.get("profile_s"), 60.0, positive=True)
    return LatencyConfig(
        profile=profile, profile_s=profile_s, refine=_flag("darts.latency.refine", section.get("refine"), True)
    )


def _state(section: Mapping[str, Any]) -> StateConfig:
    return StateConfig(strict=_flag("darts.state.strict", section.get("strict"), False))


def _overlap(section: Mapping[str, Any], placement: str) -> OverlapConfig:
    mode = _choice("darts.overlap.mode", section.get("mode"), "auto", OVERLAP_MODES)
    if mode == "auto":
        mode = "token" if placement == "disaggregated" else "off"
    kv_cache_gib = _default(section.get("kv_cache_gib"), 8.0)
    _require(
        "darts.overlap.kv_cache_gib",
        kv_cache_gib,
        _is_number(kv_cache_gib) and kv_cache_gib >= 0,
        "must be a finite number of GiB of at least 0.",
        "set darts.overlap.kv_cache_gib=8.",
    )
    return OverlapConfig(mode=mode, kv_cache_gib=float(kv_cache_gib))


def _trace(path: object) -> str | None:
    _require(
        "darts.trace",
        path,
        path is None or (isinstance(path, str) and path != ""),
        "must be the path of a file, or null.",
        "set darts.trace=null for no trace.",
    )
    return path


def _selection(section: Mapping[str, Any], group_size: int) -> SelectionConfig:
    num_long = _default(section.get("num_long"), 1)
    _require(
        "darts.selection.num_long",
        num_long,
        _is_int(num_long) and 0 <= num_long < group_size,
        f"L must be an integer in [0, rollout.n={group_size}), because K = rollout.n - L shortest are kept and K >= 1.",
        "set darts.selection.num_long=1 (the paper's choice for groups of 8).",
    )
    return SelectionConfig(
        mode=_choice("darts.selection.mode", section.get("mode"), "auto", SELECTION_MODES),
        num_long=num_long,
        long_wait=_choice("darts.selection.long_wait", section.get("long_wait"), "all", LONG_WAIT),
        on_no_valid=_choice("darts.selection.on_no_valid", section.get("on_no_valid"), "fill", NO_VALID_POLICIES),
    )


def _reward(section: Mapping[str, Any]) -> RewardConfig:
    return RewardConfig(pool=_flag("darts.reward.pool", section.get("pool"), False))


def _streaming(section: Mapping[str, Any]) -> StreamingConfig:
    chunk_tokens = _default(section.get("chunk_tokens"), 256)
    _require(
        "darts.streaming.chunk_tokens",
        chunk_tokens,
        _is_int(chunk_tokens) and chunk_tokens >= 1,
        "must be an integer of at least 1.",
        "set darts.streaming.chunk_tokens=256.",
    )
    abort_timeout_s = section.get("abort_timeout_s")
    return StreamingConfig(
        chunk_tokens=chunk_tokens,
        abort_timeout_s=_seconds("darts.streaming.abort_timeout_s", abort_timeout_s, 60.0, positive=True),
    )


def _flag(key: str, value: object, default: bool) -> bool:
    flag = _default(value, default)
    _require(key, flag, isinstance(flag, bool), "must be true or false.", f"set {key}={str(default).lower()}.")
    return flag


def _seed(seed: object) -> int | None:
    _require(
        "darts.seed",
        seed,
        seed is None or (_is_int(seed) and seed >= 0),
        "must be null or an integer that is not negative.",
        "set darts.seed=0, or null for the engine's own random stream.",
    )
    return seed


def _seconds(key: str, value: object, default: float, *, positive: bool) -> float:
    seconds = _default(value, default)
    _require(
        key,
        seconds,
        _is_number(seconds) and (seconds > 0 if positive else seconds >= 0),
        f"must be a finite number of seconds {'above 0' if positive else 'of at least 0'}.",
        f"set {key}={default:g}.",
    )
    return float(seconds)


def _section(block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = _default(block.get(name), {})
    names = [f.name for f in fields(SECTIONS[name])]
    _require(
        f"darts.{name}",
        section,
        isinstance(section, Mapping),
        f"must be a block with the keys {', '.join(names)}.",
        f"write darts.{name}.{names[0]}=...",
    )
    return section


def _refuse_unknown(prefix: str, block: Mapping[str, Any], known: list[str]) -> None:
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {prefix}.{near[0]}?" if near else "remove it."
            raise ConfigError(f"{prefix}.{key}", block[key], f"unknown key; known are {', '.join(known)}.", fix)


def _choice(key: str, value: object, default: str, choices: tuple[str, ...]) -> str:
    # YAML reads a bare `off` as false.
    choice = "off" if value is False and "off" in choices else _default(value, default)
    _require(key, choice, choice in choices, f"must be one of {', '.join(choices)}.", f"set {key}={default}.")
    return choice


def _require(key: str, value: object, holds: bool, rule: str, fix: str) -> None:
    if not holds:
        raise ConfigError(key, value, rule, fix)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
