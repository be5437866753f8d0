"""The typed form of the Hydra block `darts:`.

Contract: pure; a mapping in, frozen dataclasses out. Every field states its rule; `DartsConfig.from_block` refuses
unknown keys, wrong types and values outside their rule with one `ConfigError` that names the key, the value, the rule
and the fix. What must hold between this block and the rest of verl's configuration is checked in `darts.checks`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from darts.config_rules import ConfigError, check_choice, check_seconds, is_int, or_default, refuse_unknown, require
from darts.config_sections import (
    AllocationConfig,
    LatencyConfig,
    OverlapConfig,
    RewardConfig,
    SelectionConfig,
    SortedConfig,
    StateConfig,
    StreamingConfig,
    TailBatchingConfig,
    parse_allocation,
    parse_latency,
    parse_overlap,
    parse_reward,
    parse_selection,
    parse_sorted,
    parse_state,
    parse_streaming,
    parse_tail_batching,
)
from darts.group import EARLY_STOP, GroupRules

__all__ = ["ConfigError", "DartsConfig", "refuse_unknown_keys"]

STRATEGIES = ("none", "bypass", "shortest_k", "darts", "tail_batching", "sorted")
ROUTINGS = ("balanced", "group")
PLACEMENTS = ("colocated", "disaggregated")

SECTIONS = {
    "allocation": AllocationConfig,
    "selection": SelectionConfig,
    "reward": RewardConfig,
    "streaming": StreamingConfig,
    "latency": LatencyConfig,
    "state": StateConfig,
    "overlap": OverlapConfig,
    "tail_batching": TailBatchingConfig,
    "sorted": SortedConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DartsConfig:
    """The block `darts:`, complete and valid for one group size.

    Example:
        >>> DartsConfig.from_block({"selection": {"num_long": 2}}, group_size=8).num_short
        6
    """

    group_size: int = field(metadata={"help": "actor_rollout_ref.rollout.n; not a key of this block", "paper": "M"})
    enable: bool = field(default=True, metadata={"help": "false: plain verl"})
    placement: str = field(
        default="colocated",
        metadata={
            "help": "colocated: servers on the trainer's GPUs; disaggregated: on GPUs of their own",
            "paper": "disaggregated",
        },
    )
    strategy: str = field(
        default="darts",
        metadata={
            "help": "darts, or what it is compared with: none (plain verl), bypass, shortest_k, tail_batching, sorted; "
            "or package.module.Class"
        },
    )
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    early_stop: str = field(
        default="eager",
        metadata={
            "help": "shortest-only: abort the rest once M valid have finished (eager), the hopeless alone (exact); off",
            "paper": "early stopping",
        },
    )
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    state: StateConfig = field(default_factory=StateConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    tail_batching: TailBatchingConfig = field(default_factory=TailBatchingConfig)
    sorted: SortedConfig = field(default_factory=SortedConfig)
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

    def group_rules(self, budget: int) -> GroupRules:
        """The rules of a group of `budget` candidates; without DARTS all M are kept."""
        if not self.enable:
            return GroupRules(num_keep=self.group_size)
        selection = self.selection
        saturated = selection.mode == "auto" and budget >= self.allocation.high
        shortest_only = saturated or selection.mode == "shortest_only"
        return GroupRules(
            num_keep=self.group_size,
            num_long=0 if shortest_only else selection.num_long,
            early_stop=self.early_stop,
            long_wait=selection.long_wait,
        )

    @property
    def some_shortest_only(self) -> bool:
        """Whether some group of a batch may be shortest-only, so that early stop can act."""
        if self.allocation.mode == "adaptive":
            most = self.allocation.high
        elif self.allocation.mode == "uniform":
            most = math.ceil(self.allocation.fallback_mean)
        else:
            most = self.group_size
        return self.group_rules(most).num_long == 0

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
        require("darts.enable", enable, isinstance(enable, bool), "must be true or false.", "set darts.enable=true.")
        placement = check_choice("darts.placement", block.get("placement"), "colocated", PLACEMENTS)
        if not enable:
            return cls(group_size=group_size, enable=False, placement=placement)
        require(
            "actor_rollout_ref.rollout.n",
            group_size,
            is_int(group_size) and group_size >= 2,
            "DARTS compares the candidates of a prompt, so a group needs at least 2 responses.",
            "set actor_rollout_ref.rollout.n=8.",
        )
        return cls(
            group_size=group_size,
            placement=placement,
            strategy=_strategy(block.get("strategy")),
            allocation=parse_allocation(_section(block, "allocation"), group_size),
            selection=parse_selection(_section(block, "selection"), group_size),
            reward=parse_reward(_section(block, "reward")),
            early_stop=check_choice("darts.early_stop", block.get("early_stop"), "eager", EARLY_STOP),
            streaming=parse_streaming(_section(block, "streaming")),
            latency=parse_latency(_section(block, "latency")),
            state=parse_state(_section(block, "state")),
            overlap=parse_overlap(_section(block, "overlap"), placement),
            tail_batching=parse_tail_batching(_section(block, "tail_batching")),
            sorted=parse_sorted(_section(block, "sorted")),
            trace=_trace(block.get("trace")),
            routing=check_choice("darts.routing", block.get("routing"), "balanced", ROUTINGS),
            seed=_seed(block.get("seed")),
            timeout_s=check_seconds("darts.timeout_s", block.get("timeout_s"), 3600.0, positive=True),
            progress_s=check_seconds("darts.progress_s", block.get("progress_s"), 30.0, positive=False),
        )


def refuse_unknown_keys(block: Mapping[str, Any]) -> None:
    """Checks the names of a block `darts:`, complete or not, and of its sections.

    Raises:
        ConfigError: an unknown key; with the nearest known one.
    """
    refuse_unknown("darts", block, [f.name for f in fields(DartsConfig) if f.name != "group_size"])
    for name, section_type in SECTIONS.items():
        if isinstance(block.get(name), Mapping):
            refuse_unknown(f"darts.{name}", block[name], [f.name for f in fields(section_type)])


def _strategy(name: object) -> str:
    name = or_default(name, "darts")
    require(
        "darts.strategy",
        name,
        name in STRATEGIES or (isinstance(name, str) and "." in name.strip(".")),
        f"must be one of {', '.join(STRATEGIES)}, or package.module.Class of a subclass of darts.strategy.Strategy.",
        "set darts.strategy=darts.",
    )
    return name


def _trace(path: object) -> str | None:
    require(
        "darts.trace",
        path,
        path is None or (isinstance(path, str) and path != ""),
        "must be the path of a file, or null.",
        "set darts.trace=null for no trace.",
    )
    return path


def _seed(seed: object) -> int | None:
    require(
        "darts.seed",
        seed,
        seed is None or (is_int(seed) and seed >= 0),
        "must be null or an integer that is not negative.",
        "set darts.seed=0, or null for the engine's own random stream.",
    )
    return seed


def _section(block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = or_default(block.get(name), {})
    names = [f.name for f in fields(SECTIONS[name])]
    require(
        f"darts.{name}",
        section,
        isinstance(section, Mapping),
        f"must be a block with the keys {', '.join(names)}.",
        f"write darts.{name}.{names[0]}=...",
    )
    return section
