"""Checks of a whole run's configuration, before Ray starts and before any model is loaded.

Contract: `check_run` raises one `ConfigError` (key, value, rule, fix) for what cannot work, and warns about what can
work but is outside the method's theory. It reads the configuration and versions, nothing else.
"""

import os
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from darts.checks import ACTOR, MODEL, ROLLOUT
from darts.checks.batches import check_batches, check_token_limits
from darts.checks.model import model_config, model_id
from darts.checks.paths import check_paths
from darts.checks.placement import check_placement
from darts.config import ConfigError, DartsConfig, refuse_unknown_keys
from darts.evidence.profile import LatencyProfile
from darts.messages import RankAbility
from darts.strategy import BYPASS_MODE, Plain, strategy_class
from verl_patches.device import is_cpu_only

VERL_VERSION = "0.9.1"
ALLOW_OTHER_VERL = "DARTS_ALLOW_OTHER_VERL"
WITHOUT_GROUP_BASELINE = ("gae", "reinforce_plus_plus")
GIB = 1 << 30
FLASH_ATTENTION = "flash_attention_2"  # with which verl's actor attends unless model.override_config says otherwise
MANAGER = "darts.rollout.manager.DartsAgentLoopManager"
MOVED = {
    "darts.rollout.DartsAgentLoopManager": MANAGER,
    "darts.worker.DartsAgentLoopWorker": "darts.rollout.worker.DartsAgentLoopWorker",
    "darts.trainer.RayDartsTrainer": "darts.training.trainer.RayDartsTrainer",
    "verl_patches.gloo_checkpoint_engine": "verl_patches.weights.gloo",
}
"""What a configuration may name, by the path that it once had."""


def darts_config(config: DictConfig) -> DartsConfig:
    """The typed `darts:` block of a run; `ConfigError` as `DartsConfig.from_block`, or where the block is missing."""
    if not isinstance(config.get("darts"), DictConfig):
        rule = "the block `darts:` is missing."
        raise ConfigError("darts", config.get("darts"), rule, "start from configs/darts_trainer.yaml.")
    darts_block: Any = OmegaConf.to_container(config.darts, resolve=True)
    overlap_block = darts_block.get("overlap") or {}
    if isinstance(overlap_block, dict) and overlap_block.get("mode") in (None, "auto") and without_overlap(config):
        darts_block["overlap"] = overlap_block | {"mode": "off"}
    return DartsConfig.from_block(darts_block, group_size=config.actor_rollout_ref.rollout.n)


def check_run(config: DictConfig) -> DartsConfig:
    """Checks everything that DARTS needs of verl's configuration and version. Returns the typed block."""
    # 1. What every run needs, plain verl's too.
    _check_verl_version()
    _refuse_old_paths(OmegaConf.to_container(config))
    darts = darts_config(config)
    if config.trainer.get("use_v1", True):
        rule = "RayDartsTrainer is a RayPPOTrainer; verl's V1 trainers do not run it."
        fix = "set trainer.use_v1=False, or start verl.trainer.main_ppo for plain verl's V1 trainer."
        raise ConfigError("trainer.use_v1", True, rule, fix)
    if not config.actor_rollout_ref.hybrid_engine:
        rule = "RayPPOTrainer wants it true; which GPUs serve is what darts.placement says."
        fix = "set actor_rollout_ref.hybrid_engine=True, and darts.placement=disaggregated for servers of their own."
        raise ConfigError("actor_rollout_ref.hybrid_engine", False, rule, fix)
    check_paths(config)
    _check_attention(config)
    _warn_of_legacy_rewards(config)
    check_placement(config)
    check_batches(config)
    if not darts.enable or issubclass(strategy_class(darts.strategy), Plain):
        _check_plain_rows(config)
    if not darts.enable:
        return darts
    # 2. What DARTS needs.
    check_token_limits(config)
    _check_servers(config, darts)
    _check_estimator(str(config.algorithm.adv_estimator).lower())
    chunk_tokens, limit = darts.streaming.chunk_tokens, config.actor_rollout_ref.rollout.response_length
    if darts.early_stop == "exact" and chunk_tokens >= limit:
        warnings.warn(
            f"darts.early_stop=exact with darts.streaming.chunk_tokens={chunk_tokens} and responses of at most {limit} "
            "tokens: no response reports its growth, so nothing is aborted before its end. Set "
            "darts.streaming.chunk_tokens to about a tenth of the mean length.",
            stacklevel=2,
        )
    if darts.reward.pool and _rewarded_after_generation(config):
        rule = "a colocated reward model scores after generation, when only the kept are left."
        fix = "set darts.reward.pool=false, or give the reward model a pool of its own."
        raise ConfigError("darts.reward.pool", True, rule, fix)
    _check_strategy(config, darts)
    overlap_refusal = without_overlap(config) if darts.overlap.mode != "off" else None
    if overlap_refusal is not None:
        raise ConfigError("darts.overlap.mode", darts.overlap.mode, *overlap_refusal)
    latency_profile(config, darts)
    return darts


def _refuse_old_paths(value: Any, key: str = "") -> None:
    """Refuses module and class names of before the folders of `darts` and `verl_patches`, wherever they stand."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_old_paths(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and value in MOVED:
        raise ConfigError(key, value, f"it is called {MOVED[value]} now.", f"set {key}={MOVED[value]}.")


def _check_servers(config: DictConfig, darts: DartsConfig) -> None:
    """Candidates are generated by our manager, on verl's vLLM servers of the usual class."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        rule = "DARTS drives verl's vLLM servers; other backends are not supported."
        raise ConfigError(f"{ROLLOUT}.name", rollout.name, rule, f"set {ROLLOUT}.name=vllm.")
    if rollout.get("disaggregation", {}).get("enabled", False):
        key = f"{ROLLOUT}.disaggregation.enabled"
        rule = "verl runs prefill and decoding on servers of another class, which cannot stream or stop a request."
        raise ConfigError(key, True, rule, f"set {key}=False.")
    if darts.routing == "group" and rollout.get("router_config_path"):
        key = f"{ROLLOUT}.router_config_path"
        rule = f"needs verl's own balancer, but {key}={rollout.router_config_path!r} replaces it."
        raise ConfigError("darts.routing", "group", rule, f"set darts.routing=balanced, or {key}=null.")
    if not rollout.agent.get("agent_loop_manager_class"):
        key = f"{ROLLOUT}.agent.agent_loop_manager_class"
        rule = f"candidates are generated by {MANAGER} or a subclass of it (RayDartsTrainer checks the class)."
        fix = "start from configs/darts_trainer.yaml, or set the key to that class."
        raise ConfigError(key, rollout.agent.get("agent_loop_manager_class"), rule, fix)


def _check_estimator(estimator: str) -> None:
    """Advantages are of the kept responses, and relative to their group."""
    if estimator == "remax":
        rule = "REMAX adds a greedy response to each prompt's group, which selection by length would drop."
        fix = "set algorithm.adv_estimator=grpo (or rloo, reinforce_plus_plus_baseline)."
        raise ConfigError("algorithm.adv_estimator", estimator, rule, fix)
    if estimator in WITHOUT_GROUP_BASELINE:
        warnings.warn(
            f"algorithm.adv_estimator={estimator}: DARTS shapes lengths through the group's mean reward (a group "
            "baseline, as in GRPO); without one the kept responses are a length-biased sample without that effect.",
            stacklevel=3,
        )


def _rewarded_after_generation(config: DictConfig) -> bool:
    """Whether there is a reward model on the training GPUs."""
    reward_model = config.reward.reward_model
    return reward_model.enable and not reward_model.enable_resource_pool


def latency_profile(config: DictConfig, darts: DartsConfig) -> LatencyProfile | None:
    """The profile that `darts.latency.profile` names; None for `auto` and `off`. Raises `ConfigError` for a file that
    cannot be read, or is of another model or tensor-parallel size."""
    profile_path = darts.latency.profile
    if profile_path in ("auto", "off"):
        return None
    profile = LatencyProfile.load(profile_path)
    tensor_parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    profile.require(profile_path, model_id(config.actor_rollout_ref.model.path), tensor_parallel)
    return profile


def check_memory(darts: DartsConfig, abilities: list[RankAbility], *, logit_bytes: int, server_share: float) -> None:
    """Raises `ConfigError` where actor and server work on one device, as plain verl never has them do, and do not fit.

    Args:
        darts: the settings.
        abilities: of the ranks, with the servers asleep.
        logit_bytes: of the largest forward.
        server_share: of the device that an awake server takes, `rollout.gpu_memory_utilization`; 0 where it never
            sleeps, and so holds its memory already.
    """
    if darts.placement != "colocated" or darts.overlap.mode == "off":
        return
    for ability in abilities:
        cache_gib = darts.overlap.kv_cache_gib if darts.overlap.mode == "token" and ability.refusal is None else 0.0
        size_parts = {
            "in use with the servers asleep": (ability.device_bytes - ability.free_bytes) / GIB,
            "the servers (rollout.gpu_memory_utilization)": server_share * ability.device_bytes / GIB,
            "gathered parameters": ability.gathered_bytes / GIB,
            "the optimizer's state, once there is one": ability.optimizer_bytes / GIB,
            "prefixes (darts.overlap.kv_cache_gib)": cache_gib,
            "logits of one forward": logit_bytes / GIB,
        }
        needed, there = sum(size_parts.values()), ability.device_bytes / GIB
        if needed > there:
            parts_text = " + ".join(f"{name} {size:.1f}" for name, size in size_parts.items())
            rule = f"actor and servers work at the same time, and need {needed:.1f} GiB of the device's {there:.1f}: "
            fix = (
                f"lower {ROLLOUT}.gpu_memory_utilization or darts.overlap.kv_cache_gib, or set darts.overlap.mode=off, "
                "or darts.placement=disaggregated."
            )
            raise ConfigError("darts.overlap.mode", darts.overlap.mode, f"{rule}{parts_text}.", fix)


def refuse_unknown_overrides(arguments: list[str]) -> None:
    """Refuses (`ConfigError`) overrides of unknown `darts.*` keys, which Hydra would advise to append with `+`."""
    for argument in arguments:
        key, has_value, value = argument.lstrip("+").partition("=")
        if has_value and key.startswith("darts."):
            block: Any = value
            for name in reversed(key.split(".")[1:]):
                block = {name: block}
            refuse_unknown_keys(block)


def _check_strategy(config: DictConfig, darts: DartsConfig) -> None:
    """Checks what strategies need of verl's configuration."""
    strategy_type, strategy_text = strategy_class(darts.strategy), f"darts.strategy={darts.strategy}"
    strategy = strategy_type(darts, config.data.train_batch_size)
    is_bypassed = strategy_type.overrides.get(BYPASS_MODE) or OmegaConf.select(config, BYPASS_MODE)
    if is_bypassed and not darts.bypass and not config.actor_rollout_ref.rollout.calculate_log_probs:
        key = f"{ROLLOUT}.calculate_log_probs"
        rule = f"{BYPASS_MODE} (set by itself, or by darts.strategy=bypass) trains with the servers' log-probs."
        raise ConfigError(key, False, rule, f"set {key}=True.")
    for key in strategy.settings:
        section = key.rpartition(".")[0]
        if not isinstance(OmegaConf.select(config, section), DictConfig):
            raise ConfigError(section, None, f"{strategy_text} sets {key}.", f"leave {section} as verl has it.")
    if not strategy.chooses_prompts:
        return
    if OmegaConf.select(config, "skip.rollout.enable", default=False):
        rule = f"{strategy_text} decides during a rollout which prompts are trained on, so none can be replayed."
        fix = "set skip.rollout.enable=False, or darts.strategy=darts."
        raise ConfigError("skip.rollout.enable", True, rule, fix)
    batch_size = config.data.get("gen_batch_size")
    if batch_size not in (None, config.data.train_batch_size):
        rule = f"{strategy_text} decides how many prompts a rollout launches."
        raise ConfigError("data.gen_batch_size", batch_size, rule, "set data.gen_batch_size=null.")


def without_overlap(config: DictConfig) -> tuple[str, str] | None:
    """Why verl's settings exclude overlapped log-probs, and what to change; None where they do not."""
    strategy = OmegaConf.select(config, "darts.strategy")
    if isinstance(strategy, str) and issubclass(strategy_class(strategy), Plain):
        rule = f"darts.strategy={strategy} generates as plain verl does, whose servers do not stream."
        return rule, "set darts.overlap.mode=off; darts.allocation.mode=off overlaps without redundancy."
    if OmegaConf.select(config, BYPASS_MODE, default=False):
        return (
            f"with {BYPASS_MODE}=True the servers' own log-probs are the old log-probs, so there is nothing to compute "
            "while generation runs.",
            f"set darts.overlap.mode=off, or {BYPASS_MODE}=False.",
        )
    if _rewarded_after_generation(config):
        return (
            "a reward model on the training GPUs (reward.reward_model.enable_resource_pool=False) wakes up right after "
            "generation, when the overlapped actor still holds its memory.",
            "set darts.overlap.mode=off, or give the reward model a pool of its own.",
        )
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in ("fsdp", "fsdp2"):
        rule = f"the overlapped actor is verl's FSDP engine; {ACTOR}.strategy={strategy!r} is not."
        return rule, f"set darts.overlap.mode=off, or {ACTOR}.strategy=fsdp2."
    return None


def check_model(config: DictConfig) -> None:
    """Refuses (`ConfigError`) a model whose own configuration, which a hub may have to be asked for, cannot be read;
    one made for fewer positions than are to be served; a vision model whose rows verl packs without flash-attn."""
    actor, max_model_len = config.actor_rollout_ref, config.actor_rollout_ref.rollout.max_model_len
    made_for = model_config(actor.model.path)
    text_config = made_for.get("text_config") or made_for
    positions = actor.model.override_config.get("max_position_embeddings", text_config.get("max_position_embeddings"))
    if positions and max_model_len and max_model_len > positions:
        rule = f"{actor.model.path} is made for {positions} positions (max_position_embeddings)."
        fix = (
            f"lower it, or set +{MODEL}.override_config.max_position_embeddings and "
            f"+{ROLLOUT}.engine_kwargs.vllm.hf_overrides.max_position_embeddings to it."
        )
        raise ConfigError(f"{ROLLOUT}.max_model_len", max_model_len, rule, fix)
    packs_rows = actor.model.use_remove_padding and actor.actor.strategy in ("fsdp", "fsdp2")
    if made_for.get("vision_config") and packs_rows and find_spec("flash_attn") is None and not is_cpu_only():
        rule = "verl packs the rows of vision models with flash-attn whatever attn_implementation says; it is missing."
        fix = "set it to False, with sdpa, or install flash-attn (docs/smoke.md)."
        raise ConfigError(f"{MODEL}.use_remove_padding", True, rule, fix)


def _check_attention(config: DictConfig) -> None:
    """The actor's attention is installed, and right for how an FSDP actor's rows are packed and split."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if actor.strategy == "megatron" and not is_cpu_only():
        missing_packages = [package for package in ("megatron", "flash_attn") if find_spec(package) is None]
        if missing_packages:
            rule = f"needs {' and '.join(missing_packages)}, not installed: verl would say so in every worker."
            fix = "install what verl's Megatron engine needs (recipe/darts/README.md), or take model_engine=dp."
            raise ConfigError(f"{ACTOR}.strategy", "megatron", rule, fix)
    if actor.strategy not in ("fsdp", "fsdp2"):
        return
    attention = model.override_config.get("attn_implementation", FLASH_ATTENTION)
    key = f"{MODEL}.override_config.attn_implementation"
    # transformers takes it from the package `kernels` too, which loads it from the hub.
    has_flash = find_spec("flash_attn") is not None or find_spec("kernels") is not None
    if attention == FLASH_ATTENTION and not has_flash and not is_cpu_only():
        rule = "verl's default needs the package flash-attn, which is not installed."
        fix = f"install it (docs/smoke.md), or set +{key}=sdpa and Ulysses to 1: right, but slow when packed."
        raise ConfigError(key, attention, rule, fix)
    ulysses = max(actor.get("ulysses_sequence_parallel_size", 1), actor.fsdp_config.ulysses_sequence_parallel_size)
    if attention != FLASH_ATTENTION and ulysses > 1:
        rule = (
            f"with Ulysses {ulysses} verl 0.9.1 exchanges heads within flash attention alone: each rank would attend "
            "to its own slice, and log-probs would be wrong by nats."
        )
        fix = f"set {ACTOR}.ulysses_sequence_parallel_size=1, or use flash_attention_2."
        raise ConfigError(key, attention, rule, fix)


def _check_plain_rows(config: DictConfig) -> None:
    """Plain verl deals rows and not groups to the agent-loop workers, in equal parts."""
    rollout, prompts = config.actor_rollout_ref.rollout, config.data.train_batch_size
    num_rows, num_workers = prompts * rollout.n, rollout.agent.num_workers
    if num_rows % num_workers:
        rule = (
            f"must divide the {num_rows} responses of a step (data.train_batch_size={prompts} times "
            f"{ROLLOUT}.n={rollout.n}), where plain verl generates."
        )
        fix = "choose a divisor, or another data.train_batch_size."
        raise ConfigError(f"{ROLLOUT}.agent.num_workers", num_workers, rule, fix)


def _warn_of_legacy_rewards(config: DictConfig) -> None:
    """verl 0.9.1 still composes `reward_model.*`, and reads `reward.*` alone."""
    legacy_block = OmegaConf.to_container(config.get("reward_model") or OmegaConf.create(), resolve=True)
    names = [name for name, value in dict(legacy_block).items() if value is not None and not isinstance(value, dict)]
    names += [name for name in ("reward_kwargs",) if legacy_block.get(name)]
    if names:
        warnings.warn(
            f"reward_model.{names[0]} is read by nothing in verl {VERL_VERSION}: write reward.* "
            "(reward.reward_manager.name, reward.reward_kwargs, reward.num_workers).",
            stacklevel=2,
        )


def _check_verl_version() -> None:
    installed_version = version("verl")
    if installed_version != VERL_VERSION and os.environ.get(ALLOW_OTHER_VERL) != "1":
        rule = f"this plugin is written and tested against verl {VERL_VERSION}."
        fix = f"install verl=={VERL_VERSION}, or set {ALLOW_OTHER_VERL}=1 to try (run scripts/test.sh first)."
        raise ConfigError("verl", installed_version, rule, fix)
