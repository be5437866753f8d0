"""How a step's rows reach the ranks that train: what verl's batch sizes and token limits ask of each other.

Contract: `check_batches` and `check_token_limits` raise one `ConfigError` (key, value, rule, fix) for what would
end a run in its first update, once all models are loaded, or hours later with the first long response.
"""

from omegaconf import DictConfig, OmegaConf

from darts.checks.cluster import pools
from darts.checks.placement import has_adapter
from darts.config import ConfigError
from darts.strategy import BYPASS_MODE

ACTOR, ROLLOUT, REFERENCE = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


def check_batches(config: DictConfig) -> None:
    """Checks that batches split evenly between the ranks, into mini-batches and micro-batches.

    Raises:
        ConfigError: see the module's contract.
    """
    actor = config.actor_rollout_ref.actor
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"{ACTOR}.ppo_mini_batch_size",
            actor.ppo_mini_batch_size,
            f"must divide data.train_batch_size={config.data.train_batch_size}: verl would stop in the first update.",
            "set data.train_batch_size to a multiple of it.",
        )
    if actor.strategy == "megatron" and "megatron" in actor:
        _check_megatron(config)
    if not actor.strategy.startswith("fsdp"):
        return  # verl knows their ranks
    key, ulysses = _ulysses(ACTOR, actor)
    train = pools(config).train
    if ulysses < 1 or train % ulysses:
        raise ConfigError(
            key,
            ulysses,
            f"must divide the {train} GPUs that train (trainer.nnodes x n_gpus_per_node).",
            f"set {key}=1, or change the number of GPUs.",
        )
    _check_split(config, train // ulysses, f"{train} GPUs, Ulysses {ulysses}")


def check_token_limits(config: DictConfig) -> None:
    """Checks that micro-batches which are filled by tokens take the longest row: verl asserts it of each that it gets.

    Raises:
        ConfigError: see the module's contract.
    """
    if not config.actor_rollout_ref.actor.strategy.startswith("fsdp"):
        return
    actor, rollout, reference = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    longest = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len:
        longest = min(longest, rollout.max_model_len)
    bypass = OmegaConf.select(config, BYPASS_MODE, default=False)
    of_actor, of_reference = _ulysses(ACTOR, actor)[1], _ulysses(REFERENCE, reference)[1]
    limits = {
        f"{ACTOR}.ppo_max_token_len_per_gpu": (actor.use_dynamic_bsz, of_actor),
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": (rollout.log_prob_use_dynamic_bsz and not bypass, of_actor),
        f"{REFERENCE}.log_prob_max_token_len_per_gpu": (
            _uses_reference(config) and reference.log_prob_use_dynamic_bsz,
            of_reference,
        ),
    }
    for key, (applies, ulysses) in limits.items():
        limit = OmegaConf.select(config, key)
        if applies and limit and limit * ulysses < longest:
            raise ConfigError(
                key,
                limit,
                f"times Ulysses {ulysses} must be at least {longest}, the longest prompt and response together: verl "
                "would stop at the first that is longer.",
                f"set {key}={-(-longest // ulysses)} or more, or lower data.max_response_length.",
            )


def _ulysses(path: str, section: DictConfig) -> tuple[str, int]:
    """The key of the actor's or the reference's ranks that share a row, and their number."""
    size = section.get("ulysses_sequence_parallel_size", 1)
    if size > 1:
        return f"{path}.ulysses_sequence_parallel_size", size
    nested = "fsdp_config.ulysses_sequence_parallel_size"
    return f"{path}.{nested}", section.fsdp_config.get("ulysses_sequence_parallel_size", 1)


def _uses_reference(config: DictConfig) -> bool:
    """Whether there is a reference of its own; with an adapter it is the actor without it."""
    kl = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    return bool(kl) and not has_adapter(config.actor_rollout_ref.model)


def _check_split(config: DictConfig, ranks: int, of: str) -> None:
    """All ranks get the same number of rows, in whole micro-batches where these have a fixed size."""
    actor, rollout, reference = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        raise ConfigError(
            f"{ROLLOUT}.log_prob_use_dynamic_bsz",
            rollout.log_prob_use_dynamic_bsz,
            f"must be what {ACTOR}.use_dynamic_bsz={actor.use_dynamic_bsz} is: verl asserts it, once models load.",
            "leave it out.",
        )
    log_probs = {f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": actor.use_dynamic_bsz}
    same_ranks = _ulysses(REFERENCE, reference)[1] == _ulysses(ACTOR, actor)[1]
    if _uses_reference(config) and same_ranks:
        log_probs[f"{REFERENCE}.log_prob_micro_batch_size_per_gpu"] = reference.log_prob_use_dynamic_bsz
    sizes = {
        "data.train_batch_size": (config.data.train_batch_size, log_probs),
        f"{ACTOR}.ppo_mini_batch_size": (
            actor.ppo_mini_batch_size,
            {f"{ACTOR}.ppo_micro_batch_size_per_gpu": actor.use_dynamic_bsz},
        ),
    }
    for key, (prompts, micro_batches) in sizes.items():
        responses = prompts * rollout.n
        if responses % ranks:
            raise ConfigError(
                key,
                prompts,
                f"times {ROLLOUT}.n={rollout.n} are {responses} responses, which must split evenly between {ranks} "
                f"training ranks ({of}).",
                f"set {key} to a multiple of {ranks}, or change the number of GPUs.",
            )
        for micro_key, dynamic in micro_batches.items():
            size = OmegaConf.select(config, micro_key)
            if size and not dynamic and responses // ranks % size:
                raise ConfigError(
                    micro_key,
                    size,
                    f"must divide the {responses // ranks} responses of a training rank ({key}={prompts} times "
                    f"{ROLLOUT}.n={rollout.n}, between {ranks}).",
                    f"set {micro_key}={responses // ranks} or a divisor of it.",
                )


def _check_megatron(config: DictConfig) -> None:
    """Parallel sizes divide the GPUs; Megatron says so once all workers have started."""
    sizes, train = config.actor_rollout_ref.actor.megatron, pools(config).train
    pipeline = sizes.pipeline_model_parallel_size
    tensor = sizes.tensor_model_parallel_size
    experts = sizes.expert_model_parallel_size * (sizes.expert_tensor_parallel_size or tensor) * pipeline
    products = {
        "tensor_model_parallel_size": tensor * pipeline * sizes.context_parallel_size,
        "expert_model_parallel_size": experts,
    }
    for name, product in products.items():
        if product < 1 or train % product:
            raise ConfigError(
                f"actor_rollout_ref.actor.megatron.{name}",
                sizes[name],
                f"a replica takes {product} GPUs (with pipeline, and context or expert-tensor parallel), which must "
                f"divide the {train} GPUs that train (trainer.nnodes x n_gpus_per_node).",
                "choose parallel sizes whose product divides the number of GPUs.",
            )
