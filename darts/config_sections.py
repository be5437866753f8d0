"""The sections of the block `darts:`, each with the parser that checks it; see `darts.config`.

Contract: pure. A parser takes the section's mapping, missing and null keys take their default, and raises a
`ConfigError` for the first value outside its rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from darts.config_rules import check_choice, check_flag, check_seconds, is_int, is_number, or_default, require
from darts.group import LONG_WAIT

ALLOCATION_MODES = ("adaptive", "uniform", "off")
SELECTION_MODES = ("auto", "dual_end", "shortest_only")
NO_VALID_POLICIES = ("fill", "fail")
OVERLAP_MODES = ("auto", "off", "sequence", "token")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationConfig:
    """How many candidates M'_i a prompt gets."""

    mode: str = field(
        default="adaptive",
        metadata={"help": "adaptive: more where lengths vary more; uniform: the same number; off: exactly M"},
    )
    mean_candidates: float | None = field(
        default=None,
        metadata={
            "help": "over the batch, in [low, high]; null: what maximises the utility (adaptive), the middle (uniform)",
            "paper": "mean of M'_i",
        },
    )
    low: int = field(
        default=8, metadata={"help": "fewest candidates of a prompt, at least M; null: M", "paper": "M_low"}
    )
    high: int = field(
        default=16, metadata={"help": "most candidates of a prompt, at least low; null: 2 M", "paper": "M_up"}
    )
    cost_weight: float = field(
        default=1.0,
        metadata={"help": "weight of time against shaping, at least 0; larger: fewer candidates", "paper": "lambda"},
    )
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
        metadata={"help": "auto: measured at start where needed; a path: that file; off: no model", "paper": "PTL"},
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
        metadata={
            "help": "auto: dual-end, shortest-only where M'_i = high; dual_end, shortest_only: for all prompts",
            "paper": "tail pruning",
        },
    )
    num_long: int = field(default=1, metadata={"help": "longest kept per prompt, in [0, M)", "paper": "L = M - K"})
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

    chunk_tokens: int = field(
        default=256, metadata={"help": "tokens after which a server reports a response's growth", "paper": "streaming"}
    )
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
            "default): token where disaggregated, else off",
            "paper": "streaming",
        },
    )
    kv_cache_gib: float = field(
        default=8.0, metadata={"help": "memory per actor rank for the prefixes of growing responses (token)"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TailBatchingConfig:
    """The strategy `tail_batching`."""

    prompts: float = field(default=1.25, metadata={"help": "prompts that a short round launches, over those it keeps"})
    candidates: float = field(default=1.25, metadata={"help": "candidates that a short round launches, over M"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedConfig:
    """The strategy `sorted`."""

    prompts: int = field(default=4, metadata={"help": "prompts that are cached at once, in batches, at least 1"})


def parse_allocation(section: Mapping[str, Any], group_size: int) -> AllocationConfig:
    """The block `darts.allocation:`, checked."""
    mode = check_choice("darts.allocation.mode", section.get("mode"), "adaptive", ALLOCATION_MODES)
    low = or_default(section.get("low"), group_size)
    require(
        "darts.allocation.low",
        low,
        is_int(low) and low >= group_size,
        f"M_low must be an integer of at least rollout.n={group_size}, or a group could not be filled.",
        f"set darts.allocation.low={group_size}, or null for rollout.n.",
    )
    high = or_default(section.get("high"), max(2 * group_size, low))
    require(
        "darts.allocation.high",
        high,
        is_int(high) and high >= low,
        f"M_up must be an integer of at least M_low={low}.",
        f"set darts.allocation.high={max(2 * group_size, low)}, or null for twice rollout.n.",
    )
    mean = section.get("mean_candidates")
    if mean is None and mode == "uniform":
        mean = (low + high) / 2
    require(
        "darts.allocation.mean_candidates",
        mean,
        mean is None or (is_number(mean) and low <= mean <= high),
        f"the mean number of candidates must lie in [low={low}, high={high}].",
        f"set darts.allocation.mean_candidates={(low + high) / 2:g}, or widen darts.allocation.low and .high.",
    )
    cost_weight = or_default(section.get("cost_weight"), 1.0)
    require(
        "darts.allocation.cost_weight",
        cost_weight,
        is_number(cost_weight) and cost_weight >= 0,
        "lambda must be a finite number of at least 0.",
        "set darts.allocation.cost_weight=1; larger is more careful with time.",
    )
    warmup_steps = or_default(section.get("warmup_steps"), 1)
    require(
        "darts.allocation.warmup_steps",
        warmup_steps,
        is_int(warmup_steps) and warmup_steps >= 0,
        "must be an integer of at least 0.",
        "set darts.allocation.warmup_steps=1.",
    )
    ema_weight = or_default(section.get("ema_weight"), 0.3)
    require(
        "darts.allocation.ema_weight",
        ema_weight,
        is_number(ema_weight) and 0 < ema_weight <= 1,
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


def parse_latency(section: Mapping[str, Any]) -> LatencyConfig:
    """The block `darts.latency:`, checked."""
    # YAML reads a bare `off` as false.
    profile = section.get("profile")
    profile = "off" if profile is False else or_default(profile, "auto")
    require(
        "darts.latency.profile",
        profile,
        isinstance(profile, str) and profile != "",
        "must be auto, off, or the path of a file that `python -m darts.engines profile` wrote.",
        "set darts.latency.profile=auto.",
    )
    profile_s = check_seconds("darts.latency.profile_s", section.get("profile_s"), 60.0, positive=True)
    return LatencyConfig(
        profile=profile, profile_s=profile_s, refine=check_flag("darts.latency.refine", section.get("refine"), True)
    )


def parse_state(section: Mapping[str, Any]) -> StateConfig:
    """The block `darts.state:`, checked."""
    return StateConfig(strict=check_flag("darts.state.strict", section.get("strict"), False))


def parse_overlap(section: Mapping[str, Any], placement: str) -> OverlapConfig:
    """The block `darts.overlap:`, checked."""
    mode = check_choice("darts.overlap.mode", section.get("mode"), "auto", OVERLAP_MODES)
    if mode == "auto":
        mode = "token" if placement == "disaggregated" else "off"
    kv_cache_gib = or_default(section.get("kv_cache_gib"), 8.0)
    require(
        "darts.overlap.kv_cache_gib",
        kv_cache_gib,
        is_number(kv_cache_gib) and kv_cache_gib >= 0,
        "must be a finite number of GiB of at least 0.",
        "set darts.overlap.kv_cache_gib=8.",
    )
    return OverlapConfig(mode=mode, kv_cache_gib=float(kv_cache_gib))


def parse_tail_batching(section: Mapping[str, Any]) -> TailBatchingConfig:
    """The block `darts.tail_batching:`, checked."""
    factors = {name: or_default(section.get(name), 1.25) for name in ("prompts", "candidates")}
    for name, factor in factors.items():
        require(
            f"darts.tail_batching.{name}",
            factor,
            is_number(factor) and factor >= 1,
            "must be a finite number of at least 1: a short round launches so many times what it keeps.",
            f"set darts.tail_batching.{name}=1.25.",
        )
    return TailBatchingConfig(**{name: float(factor) for name, factor in factors.items()})


def parse_sorted(section: Mapping[str, Any]) -> SortedConfig:
    """The block `darts.sorted:`, checked."""
    prompts = or_default(section.get("prompts"), 4)
    require(
        "darts.sorted.prompts",
        prompts,
        is_int(prompts) and prompts >= 1,
        "must be an integer of at least 1: so many batches of prompts are cached at once.",
        "set darts.sorted.prompts=4.",
    )
    return SortedConfig(prompts=prompts)


def parse_selection(section: Mapping[str, Any], group_size: int) -> SelectionConfig:
    """The block `darts.selection:`, checked."""
    num_long = or_default(section.get("num_long"), 1)
    require(
        "darts.selection.num_long",
        num_long,
        is_int(num_long) and 0 <= num_long < group_size,
        f"L must be an integer in [0, rollout.n={group_size}), because K = rollout.n - L shortest are kept and K >= 1.",
        "set darts.selection.num_long=1 (the paper's choice for groups of 8).",
    )
    return SelectionConfig(
        mode=check_choice("darts.selection.mode", section.get("mode"), "auto", SELECTION_MODES),
        num_long=num_long,
        long_wait=check_choice("darts.selection.long_wait", section.get("long_wait"), "all", LONG_WAIT),
        on_no_valid=check_choice("darts.selection.on_no_valid", section.get("on_no_valid"), "fill", NO_VALID_POLICIES),
    )


def parse_reward(section: Mapping[str, Any]) -> RewardConfig:
    """The block `darts.reward:`, checked."""
    return RewardConfig(pool=check_flag("darts.reward.pool", section.get("pool"), False))


def parse_streaming(section: Mapping[str, Any]) -> StreamingConfig:
    """The block `darts.streaming:`, checked."""
    chunk_tokens = or_default(section.get("chunk_tokens"), 256)
    require(
        "darts.streaming.chunk_tokens",
        chunk_tokens,
        is_int(chunk_tokens) and chunk_tokens >= 1,
        "must be an integer of at least 1.",
        "set darts.streaming.chunk_tokens=256.",
    )
    abort_timeout_s = section.get("abort_timeout_s")
    return StreamingConfig(
        chunk_tokens=chunk_tokens,
        abort_timeout_s=check_seconds("darts.streaming.abort_timeout_s", abort_timeout_s, 60.0, positive=True),
    )
