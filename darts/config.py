"""The block `darts:`: every key with its type, default, bounds, help and the paper's name for it, once.

Contract: pure; a mapping in, frozen dataclasses out. `DartsConfig.from_block` refuses unknown keys, wrong types and
values outside their bounds with one `ConfigError` that names the key, the value, the rule and the fix. Its words come
from the definition, as do configs/darts_base.yaml and docs/configuration.md (scripts/make_docs.py). What must hold
between this block and the rest of verl's configuration is checked in `darts.checks`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from darts.group import EARLY_STOP, LONG_WAIT, GroupRules
from darts.selection import LONG_END

STRATEGIES = ("none", "bypass", "shortest_k", "darts", "tail_batching", "sorted")

RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""No integer from a truth value or a text; the text below a key is its help."""
PLANNED = "plan"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "spare_prompts": 0.0,
        "bypass": False,
        "allocation.mode": "adaptive",
        "selection.mode": "auto",
        "selection.long_end": "finished",
    },
    "fast": {
        "spare_prompts": PLANNED,
        "bypass": True,
        "allocation.mode": "uniform",
        "allocation.mean_candidates": PLANNED,
        "selection.mode": "dual_end",
        "selection.long_end": "cut",
    },
}
"""What `darts.preset` gives to keys that are null."""
PAPERS_MEAN = 1.3
"""Candidates over M at which some 5 % of the prompts are saturated, as in the paper, if M_up is 2 M (our choice: on
real lengths 5.5 to 7.8 %)."""
TRACE = "${trainer.default_local_dir}/darts.jsonl"
KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}
BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most"}


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value, the rule and the fix."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(f"{key}={value!r}: {rule} Fix: {fix}")
        self.key = key
        self._parts = key, value, rule, fix

    def __reduce__(self) -> Any:
        """Ray carries it from the trainer's process to the user's."""
        return type(self), self._parts


def setting(default: Any, *, paper: str = "", takes: str = "", yaml: str = "", **bounds: Any) -> Any:
    """Defines a key; the bounds are those of pydantic's `Field`.

    `paper` is the paper's name for it, `takes` what it takes where type and bounds do not say so, `yaml` its value in
    darts_base.yaml where that refers to the rest of verl's configuration.
    """
    return Field(default, json_schema_extra={"paper": paper, "takes": takes, "yaml": yaml}, **bounds)


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class AllocationConfig:
    """How many candidates a prompt gets."""

    mode: Literal["adaptive", "uniform", "off"] | None = setting(None)
    """How the candidates are divided. adaptive: more for prompts whose response lengths vary more (the paper); uniform:
    the same number for every prompt; off: exactly rollout.n, no redundancy. null: as the preset says."""
    mean_candidates: float | Literal["utility", "plan"] | None = setting(None, paper="mean of M'_i")
    """Mean number of candidates per prompt, in [low, high]. Uniform 10.5 gives half of the prompts 10 and half 11.
    utility: what maximises the paper's utility by the latency model, as long as not more than a tenth of the prompts
    are saturated; plan: what makes rollouts fastest by that model, of rollout.n to 1.5 times as many. null: as the
    preset says; 1.3 rollout.n if adaptive (the paper's mix), else the middle of the bounds."""
    low: int | None = setting(None, paper="M_low")
    """Fewest candidates of a prompt, at least rollout.n. null: rollout.n."""
    high: int | None = setting(None, paper="M_up")
    """Most candidates of a prompt, at least low. A prompt that has as many is saturated. null: twice rollout.n."""
    cost_weight: float = setting(1.0, paper="lambda", ge=0)
    """Weight of time against shaping in the utility. Larger: fewer candidates; 0 launches as many as allowed."""
    warmup_steps: int = setting(1, ge=0)
    """First rollouts, with uniform budgets, while nothing is known about lengths."""
    ema_weight: float = setting(0.3, gt=0, le=1)
    """Weight of a new observation in the moving variance of a prompt's lengths; 1 keeps the last observation alone."""

    @property
    def fallback_mean(self) -> float:
        """Mean of M'_i; where it is not known yet (our choice) the middle of the bounds, or, if it is to be planned,
        one more than M_low."""
        if isinstance(self.mean_candidates, str):
            middle = (self.low + self.high) / 2
            return middle if self.mean_candidates == "utility" else float(min(self.low + 1, self.high))
        return self.mean_candidates

    @property
    def needs_cost_model(self) -> bool:
        """Whether the number of candidates depends on how long rollouts take."""
        return self.mode == "adaptive" or (self.mode != "off" and isinstance(self.mean_candidates, str))

    def settled(self, group_size: int) -> "AllocationConfig":
        """The same for groups of M, with the bounds as numbers.

        Raises:
            ConfigError: bounds that exclude each other, or a mean outside them.
        """
        low = group_size if self.low is None else self.low
        if low < group_size:
            rule = f"M_low must be an integer of at least rollout.n={group_size}, or a group could not be filled."
            fix = f"set darts.allocation.low={group_size}, or null for rollout.n."
            raise ConfigError("darts.allocation.low", low, rule, fix)
        default_high = max(2 * group_size, low)
        high = default_high if self.high is None else self.high
        if high < low:
            fix = f"set darts.allocation.high={default_high}, or null for twice rollout.n."
            raise ConfigError("darts.allocation.high", high, f"M_up must be an integer of at least M_low={low}.", fix)
        mean_budget, middle_budget = self.mean_candidates, (low + high) / 2
        if mean_budget is None:
            papers_mean = min(max(PAPERS_MEAN * group_size, low), high)
            mean_budget = papers_mean if self.mode == "adaptive" else middle_budget
        if not isinstance(mean_budget, str) and not low <= mean_budget <= high:
            rule = f"the mean number of candidates must lie in [low={low}, high={high}]."
            fix = f"set darts.allocation.mean_candidates={middle_budget:g}, or widen darts.allocation.low and .high."
            raise ConfigError("darts.allocation.mean_candidates", mean_budget, rule, fix)
        return replace(self, low=low, high=high, mean_candidates=mean_budget)


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class SelectionConfig:
    """Which rollout.n candidates of a prompt are trained on."""

    mode: Literal["auto", "dual_end", "shortest_only"] | None = setting(None, paper="tail pruning")
    """Which lengths are kept. auto: the K shortest and the L longest, but the rollout.n shortest for saturated prompts;
    dual_end, shortest_only: for all prompts. null: as the preset says."""
    num_long: int = setting(1, paper="L = M - K")
    """How many of the kept responses are the longest, in [0, rollout.n). K = rollout.n - L are the shortest."""
    long_end: Literal[LONG_END] | None = setting(None)
    """What the L longest may be. finished: responses that ended by themselves, as in the paper; truncated: also those
    at the length limit, which count as longer; cut: also those that run when their group stops waiting, which are
    stopped and trained on with what they have. A group then needs K valid responses, and waits for no long one. null:
    as the preset says."""
    long_wait: Literal[LONG_WAIT] | None = setting(None)
    """What a dual-end group waits for. all: every candidate, as in the paper; deadline: until 95 % of the groups of the
    batch (all but one, of few) have rollout.n responses that may be kept, or are complete; what runs then is aborted,
    and a group that is not so far goes on alone until it is, so that no hard prompt holds up the others; none: each
    group until it has them itself. null: deadline where long_end is cut, else all."""
    on_no_valid: Literal["fill", "fail"] = setting("fill")
    """What happens where all candidates of a prompt hit the length limit. fill: they fill its group; fail: an error."""

    def settled(self) -> "SelectionConfig":
        """The same with the wait that null stands for.

        Raises:
            ConfigError: a long end that is cut, and a wait for every candidate.
        """
        wait = self.long_wait or ("deadline" if self.long_end == "cut" else "all")
        if self.long_end == "cut" and wait == "all":
            rule = "with darts.selection.long_end=cut a group stops what it does not wait for; it would wait for all."
            raise ConfigError("darts.selection.long_wait", wait, rule, "set it to deadline, none or null.")
        return replace(self, long_wait=wait)


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class StreamingConfig:
    """How the lengths of running responses are followed."""

    chunk_tokens: int = setting(256, paper="streaming", ge=1)
    """Tokens after which a server reports how far a response is. Smaller: exact stops sooner, for more CPU work."""
    abort_timeout_s: float = setting(60.0, gt=0)
    """Seconds after which an aborted request that has not stopped fails the rollout. Most stop within milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class OverlapConfig:
    """Which log-probs, of the actor and of the reference where one is used, are computed while generation runs."""

    mode: Literal["auto", "off", "sequence", "token"] = setting("auto", paper="streaming")
    """When log-probs are computed. sequence: as each response completes; token: of the prefixes of growing responses
    too; off: after generation, as plain verl; auto: token where disaggregated, else off."""
    kv_cache_gib: float = setting(8.0, ge=0)
    """GiB on each actor rank for the keys and values of prefixes (token). What does not fit is computed in the end."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class LatencyConfig:
    """How long a decoding step takes with so many running sequences, for the utility and for forecasts."""

    profile: str = setting("auto", paper="PTL", takes="auto, off, or the path of a profile", min_length=1)
    """Where the latency model comes from. auto: the engines are measured before the first step, if allocation.mode is
    adaptive, or something is left to `plan`; a path: a file that `python -m darts.engines profile` wrote; off: no
    model: `utility` is the middle of the bounds, `plan` rollout.n + 1 candidates and 5 % spare prompts."""
    profile_s: float = setting(60.0, gt=0)
    """Seconds that the measurement may take; it stops at the batch size it has reached."""
    refine: bool = setting(True)
    """Whether the model follows what the running engines show."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class StateConfig:
    """What was learnt about lengths, which is saved in verl's checkpoints."""

    strict: bool = setting(False)
    """What a checkpoint without usable state is. false: a warning and a cold start; true: an error."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class RewardConfig:
    """Which candidates are scored."""

    pool: bool = setting(False)
    """Whether every candidate is scored as soon as it ends, so that the reward of the kept can be compared with the
    pool's. Also the better choice for slow rewards: the kept alone are scored only when their group is complete."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class TailBatchingConfig:
    """The strategy tail_batching."""

    prompts: float = setting(1.25, ge=1)
    """A short round launches so many times the prompts that it keeps. Those that were stopped wait for a long round."""
    candidates: float = setting(1.25, ge=1)
    """A short round launches so many times rollout.n candidates. It keeps the first to finish; a long one keeps all."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class SortedConfig:
    """The strategy sorted."""

    prompts: int = setting(4, ge=1)
    """So many batches of prompts are cached and run at once. No new ones come before the cached are consumed."""


@dataclass(frozen=True, slots=True, kw_only=True, config=RULES)
class DartsConfig:
    """The block `darts:`, complete and valid for one group size.

    Example:
        >>> DartsConfig.from_block({"selection": {"num_long": 2}}, group_size=8).num_short
        6
    """

    group_size: int
    """M, `actor_rollout_ref.rollout.n`; not a key of this block."""
    enable: bool = setting(True)
    """Whether DARTS is used. false: plain verl (the same batches, metrics and weights as verl's RayPPOTrainer)."""
    strategy: str = setting(
        "darts",
        takes=f"one of {', '.join(STRATEGIES)}, or package.module.Class of a subclass of darts.strategy.Strategy",
        pattern=rf"^({'|'.join(STRATEGIES)})$|[^.]\..*[^.]",
    )
    """The method, or what it is compared with on the same trainer, manager and servers. none: plain verl; bypass: plain
    verl with rollout_correction.bypass_mode; shortest_k: more candidates, the shortest kept, nothing stopped (GFPO);
    tail_batching: RollPacker; sorted: SortedRL, on-policy; package.module.Class: your own."""
    placement: Literal["colocated", "disaggregated"] = setting("colocated", paper="disaggregated")
    """Which GPUs serve. colocated: the trainer's, and one of the two works at a time; disaggregated:
    actor_rollout_ref.rollout.nnodes x n_gpus_per_node of their own, and trainer.nnodes x n_gpus_per_node train."""
    preset: Literal["paper", "fast"] = setting("paper")
    """What keys are that are null. paper: the paper's rules, adaptive budgets of 1.3 rollout.n candidates in the mean;
    fast: for the shortest step, by simulations alone as yet (docs/tuning.md): the same few candidates for all prompts,
    the K shortest and a cut long end, spare prompts, and the servers' log-probs as the old ones. Only for
    strategy=darts: others have rules of their own."""
    spare_prompts: Annotated[float, Field(ge=0, le=4)] | Literal["plan"] | None = setting(
        None, takes="a number in [0, 4], plan"
    )
    """Prompts that a step of the strategy darts launches beyond data.train_batch_size, as a share of it. The rollout
    ends with the first data.train_batch_size prompts whose groups are settled; the others are stopped and wait until
    they fill a step of their own, which waits for all of them. 0: none, and a step waits for its slowest group; plan:
    of 0 to 0.2 what makes rollouts fastest by the latency model; null: as the preset says."""
    bypass: bool | None = setting(None)
    """Whether the servers' log-probs are the old ones, and none are computed (verl's
    algorithm.rollout_correction.bypass_mode, which the trainer then sets, and rollout.calculate_log_probs). False
    leaves both as they are set. null: as the preset says."""
    allocation: AllocationConfig = AllocationConfig()
    selection: SelectionConfig = SelectionConfig()
    early_stop: Literal[EARLY_STOP] = setting("eager", paper="early stopping")
    """What a shortest-only group aborts. eager: the rest, once rollout.n valid candidates have finished (the paper);
    exact: those that have grown past the rollout.n-th shortest, so that the kept are those of a run without early stop;
    off: none."""
    streaming: StreamingConfig = StreamingConfig()
    overlap: OverlapConfig = OverlapConfig()
    latency: LatencyConfig = LatencyConfig()
    state: StateConfig = StateConfig()
    reward: RewardConfig = RewardConfig()
    tail_batching: TailBatchingConfig = TailBatchingConfig()
    sorted: SortedConfig = SortedConfig()
    routing: Literal["balanced", "group"] = setting("balanced")
    """Which server a candidate goes to. balanced: the one with the fewest requests; group: one for all candidates of a
    prompt, which then computes the prompt once. group is expected to pay for long prompts and many servers
    (docs/early_stop.md)."""
    trace: str | None = setting(None, takes="the path of a file", yaml=TRACE, min_length=1)
    """File of one JSON line per step, for `python -m darts.report`. A line has the step's metrics and the length of
    every candidate: 20 to 30 kB with 2,048 candidates. null: none."""
    seed: int | None = setting(None, ge=0)
    """Gives every candidate a sampling seed of its own. Reproducible, but vLLM draws the noise of seeded requests one
    by one. null: the engine's stream, which differs between candidates anyway."""
    timeout_s: float = setting(3600.0, gt=0)
    """Seconds in which no response grows or ends, after which a rollout fails with the uids that wait. Plain verl has
    no such limit; raise it for tools or rewards that take longer."""
    progress_s: float = setting(30.0, ge=0)
    """Seconds between progress lines of a rollout; 0 for none."""

    def __post_init__(self) -> None:
        """Settles what depends on the group size or on the placement."""
        size, num_long = self.group_size, self.selection.num_long
        object.__setattr__(self, "allocation", self.allocation.settled(size))
        object.__setattr__(self, "selection", self.selection.settled())
        if self.overlap.mode == "auto":
            overlap_mode = "token" if self.placement == "disaggregated" and not self.bypass else "off"
            object.__setattr__(self, "overlap", replace(self.overlap, mode=overlap_mode))
        if self.enable and not 0 <= num_long < size:
            rule = f"L must be an integer in [0, rollout.n={size}), because K = rollout.n - L >= 1 shortest are kept."
            fix = "set darts.selection.num_long=1 (the paper's choice for groups of 8)."
            raise ConfigError("darts.selection.num_long", num_long, rule, fix)
        if self.enable and self.bypass and self.overlap.mode != "off":
            rule = "with darts.bypass the servers' log-probs are the old ones, so none are computed meanwhile."
            fix = "set darts.overlap.mode=off (or auto), or darts.bypass=false."
            raise ConfigError("darts.overlap.mode", self.overlap.mode, rule, fix)

    @property
    def num_short(self) -> int:
        """K = M - L."""
        return self.group_size - self.selection.num_long

    def group_rules(self, budget: int) -> GroupRules:
        """The rules of a group of `budget` candidates: shortest-only where it is saturated, or the mode says so.

        Without DARTS all M are kept.
        """
        if not self.enable:
            return GroupRules(num_keep=self.group_size)
        is_saturated = self.selection.mode == "auto" and budget >= self.allocation.high
        shortest_only = is_saturated or self.selection.mode == "shortest_only"
        return GroupRules(
            num_keep=self.group_size,
            num_long=0 if shortest_only else self.selection.num_long,
            early_stop=self.early_stop,
            long_wait=self.selection.long_wait,
            long_end=self.selection.long_end,
        )

    @property
    def some_shortest_only(self) -> bool:
        """Whether some group of a batch may be shortest-only, so that early stop can act."""
        allocation = self.allocation
        if self.allocation.mean_candidates == PLANNED:
            return self.selection.mode == "shortest_only"
        largest = {"adaptive": allocation.high, "uniform": math.ceil(allocation.fallback_mean), "off": self.group_size}
        return self.group_rules(largest[allocation.mode]).num_long == 0

    @classmethod
    def from_block(cls, block: Mapping[str, Any] | None, group_size: int) -> "DartsConfig":
        """Builds and checks the configuration.

        Args:
            block: the content of `darts:`; nested mappings, missing and null keys take their default. With `enable:
                false` only `placement` is read: plain verl takes any group size.
            group_size: M, `actor_rollout_ref.rollout.n`.

        Raises:
            ConfigError: see the module's contract.
        """
        block = {} if block is None else block
        refuse_unknown_keys(block)
        if block.get("enable") is False:
            block = {name: block.get(name) for name in ("enable", "placement")}
        elif type(group_size) is not int or group_size < 2:
            rule = "DARTS compares the candidates of a prompt, so a group needs at least 2 responses."
            raise ConfigError("actor_rollout_ref.rollout.n", group_size, rule, "set actor_rollout_ref.rollout.n=8.")
        return _build(cls, "darts", _with_preset(block), group_size=group_size)


def _with_preset(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block with what its preset gives to keys that are null; an unknown preset is left to the checks."""
    preset, strategy = block.get("preset") or "paper", block.get("strategy") or "darts"
    given_values = PRESETS.get(str(preset), {})
    if strategy != "darts":  # others have rules of their own
        given_values = PRESETS["paper"] | ({"allocation.mode": "uniform"} if strategy in STRATEGIES else {})
    for path, value in given_values.items():
        section, _, name = path.rpartition(".")
        keys = (block.get(section) or {}) if section else block
        if isinstance(keys, Mapping) and keys.get(name) is None:
            block = {**block, section: {**keys, name: value}} if section else {**block, name: value}
    return block


def keys_of(kind: Any) -> dict[str, FieldInfo]:
    """The definitions of a block's keys; `kind` is its class."""
    return {name: info for name, info in kind.__pydantic_fields__.items() if name != "group_size"}


SECTIONS = {name: info.annotation for name, info in keys_of(DartsConfig).items() if is_dataclass(info.annotation)}


def taken_by(info: FieldInfo) -> str:
    """What a key takes, for people: `an integer of at least 1`."""
    is_union = get_origin(info.annotation) in (UnionType, Union)
    parts = get_args(info.annotation) if is_union else (info.annotation,)
    or_null = ", or null" if type(None) in parts else ""
    words = [word for part in parts for word in get_args(part)]
    if get_origin(parts[0]) is Literal:
        return f"one of {', '.join(words)}{or_null}"
    named_limits = [(words, getattr(bound, name, None)) for bound in info.metadata for name, words in BOUNDS.items()]
    bounds_text = " and".join(f" {words} {limit}" for words, limit in named_limits if limit is not None)
    accepted_text = info.json_schema_extra["takes"] or ", ".join([KINDS[parts[0]] + bounds_text, *words])
    return accepted_text + or_null


def help_of(info: FieldInfo) -> str:
    """What a key means, behind the paper's name for it; the first sentence says it in short."""
    paper = info.json_schema_extra["paper"]
    return " ".join([*([f"[{paper}]"] if paper else []), *info.description.split()])


def shown(value: object) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_unknown_keys(block: Mapping[str, Any], path: str = "darts", kind: Any = DartsConfig) -> None:
    """Checks the names of a block `darts:`, complete or not, and of its sections.

    Raises:
        ConfigError: an unknown key; with the nearest known one.
    """
    known_keys = keys_of(kind)
    for key, value in block.items():
        if key not in known_keys:
            nearest_keys = difflib.get_close_matches(str(key), known_keys, n=1)
            fix = f"did you mean {path}.{nearest_keys[0]}?" if nearest_keys else "remove it."
            raise ConfigError(f"{path}.{key}", value, f"unknown key; known are {', '.join(known_keys)}.", fix)
        if key in SECTIONS and isinstance(value, Mapping):
            refuse_unknown_keys(value, f"{path}.{key}", SECTIONS[key])


def _build(kind: Any, path: str, block: Any, **known: Any) -> Any:
    """The settings of class `kind` from the block at `path`, and from what is known besides."""
    keys = keys_of(kind)
    if not isinstance(block, Mapping):
        rule = f"must be a block with the keys {', '.join(keys)}."
        raise ConfigError(path, block, rule, f"write {path}.{next(iter(keys))}=...")
    values = {name: block[name] for name in keys if block.get(name) is not None}
    for name, value in values.items():
        if is_dataclass(keys[name].annotation):
            values[name] = _build(keys[name].annotation, f"{path}.{name}", value)
        elif value is False and bool not in get_args(keys[name].annotation) and "off" in taken_by(keys[name]):
            values[name] = "off"  # YAML reads a bare `off` as false
    try:
        return kind(**known, **values)
    except ValidationError as error:
        first_error = error.errors()[0]
        raised_error = first_error.get("ctx", {}).get("error")
        if isinstance(raised_error, ConfigError):  # raised by `__post_init__`
            raise raised_error from None
        name, value = first_error["loc"][0], first_error["input"]
        info = keys[name]
        rule = f"must be {taken_by(info)}: {help_of(info).split('. ')[0].rstrip('.')}."
        raise ConfigError(f"{path}.{name}", value, rule, f"set {path}.{name}={shown(info.default)}.") from None
