"""How a step's rows reach the ranks that train: what verl's batch sizes and token limits ask of each other.

Contract: `check_batches` and `check_token_limits` raise one `ConfigError` (key, value, rule, fix) for what would
end a run in its first update, once all models are loaded, or hours later with the first long response.
"""

from omegaconf import DictConfig, OmegaConf

from darts.checks import ACTOR, REFERENCE, ROLLOUT
from darts.checks.placement import has_adapter, pools
from darts.config import ConfigError
from darts.strategy import BYPASS_MODE

DYNAMIC = "log_prob_use_dynamic_bsz"


def check_batches(config: DictConfig) -> None:
    """Refuses batches that do not split evenly between the ranks, into mini-batches and micro-batches."""
    actor, batch_size = config.actor_rollout_ref.actor, config.data.train_batch_size
    if batch_size % actor.ppo_mini_batch_size:
        rule = f"must divide data.train_batch_size={batch_size}: verl would stop in the first update."
        fix = "set data.train_batch_size to a multiple of it."
        raise ConfigError(f"{ACTOR}.ppo_mini_batch_size", actor.ppo_mini_batch_size, rule, fix)
    if actor.strategy == "megatron" and "megatron" in actor:
        _check_megatron(config)
    if not actor.strategy.startswith("fsdp"):
        return  # verl knows their ranks
    key, ulysses = _ulysses(ACTOR, actor)
    num_gpus = pools(config).train
    if ulysses < 1 or num_gpus % ulysses:
        rule = f"must divide the {num_gpus} GPUs that train (trainer.nnodes x n_gpus_per_node)."
        raise ConfigError(key, ulysses, rule, f"set {key}=1, or change the number of GPUs.")
    _check_split(config, num_gpus // ulysses, f"{num_gpus} GPUs, Ulysses {ulysses}")


def check_token_limits(config: DictConfig) -> None:
    """Refuses micro-batches, filled by tokens, that do not take the longest row: verl asserts it of each it gets."""
    if not config.actor_rollout_ref.actor.strategy.startswith("fsdp"):
        return
    actor, rollout, reference = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    longest = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len:
        longest = min(longest, rollout.max_model_len)
    is_bypassed = OmegaConf.select(config, BYPASS_MODE, default=False)
    (_, at_actor), (_, at_reference) = _ulysses(ACTOR, actor), _ulysses(REFERENCE, reference)
    token_limits = {
        f"{ACTOR}.ppo_max_token_len_per_gpu": (actor.use_dynamic_bsz, at_actor),
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": (rollout[DYNAMIC] and not is_bypassed, at_actor),
        f"{REFERENCE}.log_prob_max_token_len_per_gpu": (_uses_reference(config) and reference[DYNAMIC], at_reference),
    }
    for key, (is_used, ulysses) in token_limits.items():
        token_limit = OmegaConf.select(config, key)
        if is_used and token_limit and token_limit * ulysses < longest:
            rule = (
                f"times Ulysses {ulysses} must be at least {longest}, the longest prompt and response together: verl "
                "would stop at the first that is longer."
            )
            fix = f"set {key}={-(-longest // ulysses)} or more, or lower data.max_response_length."
            raise ConfigError(key, token_limit, rule, fix)


def _ulysses(path: str, section: DictConfig) -> tuple[str, int]:
    """The key of the actor's or the reference's ranks that share a row, and their number."""
    name = "ulysses_sequence_parallel_size"
    if section.get(name, 1) > 1:
        return f"{path}.{name}", section[name]
    return f"{path}.fsdp_config.{name}", section.fsdp_config.get(name, 1)


def _uses_reference(config: DictConfig) -> bool:
    """Whether there is a reference of its own; with an adapter it is the actor without it."""
    kl_used = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    return bool(kl_used) and not has_adapter(config.actor_rollout_ref.model)


def _check_split(config: DictConfig, ranks: int, made_of: str) -> None:
    """All ranks get the same number of rows, in whole micro-batches where these have a fixed size."""
    actor, rollout, reference = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    if actor.use_dynamic_bsz != rollout[DYNAMIC]:
        rule = f"must be what {ACTOR}.use_dynamic_bsz={actor.use_dynamic_bsz} is: verl asserts it, once models load."
        raise ConfigError(f"{ROLLOUT}.{DYNAMIC}", rollout[DYNAMIC], rule, "leave it out.")
    # Key of the micro-batches -> whether they are filled by tokens.
    log_probs = {f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": actor.use_dynamic_bsz}
    same_ranks = _ulysses(REFERENCE, reference)[1] == _ulysses(ACTOR, actor)[1]
    if _uses_reference(config) and same_ranks:
        log_probs[f"{REFERENCE}.log_prob_micro_batch_size_per_gpu"] = reference[DYNAMIC]
    update = {f"{ACTOR}.ppo_micro_batch_size_per_gpu": actor.use_dynamic_bsz}
    for key, micro_batches in {"data.train_batch_size": log_probs, f"{ACTOR}.ppo_mini_batch_size": update}.items():
        prompts = OmegaConf.select(config, key)
        responses = prompts * rollout.n
        if responses % ranks:
            rule = (
                f"times {ROLLOUT}.n={rollout.n} are {responses} responses, which must split evenly between {ranks} "
                f"training ranks ({made_of})."
            )
            fix = f"set {key} to a multiple of {ranks}, or change the number of GPUs."
            raise ConfigError(key, prompts, rule, fix)
        for micro_key, is_dynamic in micro_batches.items():
            micro_size, of_rank = OmegaConf.select(config, micro_key), responses // ranks
            if micro_size and not is_dynamic and of_rank % micro_size:
                rule = (
                    f"must divide the {of_rank} responses of a training rank ({key}={prompts} times "
                    f"{ROLLOUT}.n={rollout.n}, between {ranks})."
                )
                raise ConfigError(micro_key, micro_size, rule, f"set {micro_key}={of_rank} or a divisor of it.")


def _check_megatron(config: DictConfig) -> None:
    """Parallel sizes divide the GPUs; Megatron says so once all workers have started."""
    sizes, num_gpus = config.actor_rollout_ref.actor.megatron, pools(config).train
    pipeline_size = sizes.pipeline_model_parallel_size
    tensor_size = sizes.tensor_model_parallel_size
    expert_gpus = sizes.expert_model_parallel_size * (sizes.expert_tensor_parallel_size or tensor_size) * pipeline_size
    gpu_products = {
        "tensor_model_parallel_size": tensor_size * pipeline_size * sizes.context_parallel_size,
        "expert_model_parallel_size": expert_gpus,
    }
    for name, product in gpu_products.items():
        if product < 1 or num_gpus % product:
            rule = (
                f"a replica takes {product} GPUs (with pipeline, and context or expert-tensor parallel), which must "
                f"divide the {num_gpus} GPUs that train (trainer.nnodes x n_gpus_per_node)."
            )
            fix = "choose parallel sizes whose product divides the number of GPUs."
            raise ConfigError(f"{ACTOR}.megatron.{name}", sizes[name], rule, fix)
