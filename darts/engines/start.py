"""Real vLLM servers on a testbed's trained model, without a trainer: for benchmarks and tests.

Contract: `engine_config` composes a configuration, the quickstart's by default, for standalone servers; `start_servers`
starts verl's own servers in the Ray that is running (`local_ray` starts one), and ends them with every process that
they started. A server is ready when it is handed out. verl and vLLM are imported when they are needed, not before.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from omegaconf import DictConfig, OmegaConf

ENGINE = "actor_rollout_ref.rollout.engine_kwargs.vllm"
"""Where vLLM's own arguments stand in the configuration."""
RESPONSE_LENGTH = 1024
MAX_MODEL_LEN = 1536


def engine_config(
    *overrides: str,
    replicas: int = 1,
    response_length: int | None = RESPONSE_LENGTH,
    max_model_len: int | None = MAX_MODEL_LEN,
    config_name: str = "quickstart",
    config_dir: str | Path | None = None,
) -> DictConfig:
    """A configuration for standalone servers on one node, with the model's own weights.

    Args:
        overrides: Hydra's; they come last, so they win.
        replicas: Servers, with `gpus_per_engine` logical GPUs each.
        response_length: Longest response, tokens. None: the configuration's.
        max_model_len: Longest prompt and response together. None: the configuration's.
        config_name: What is composed.
        config_dir: Folder of `config_name`; None: the project's.
    """
    from hydra import compose, initialize_config_dir

    import verl_patches.register
    from darts import CONFIG_DIR
    from darts.testbed import register_resolver

    verl_patches.register.assert_active()
    register_resolver()
    rollout = "actor_rollout_ref.rollout"
    limits = {
        "data.max_response_length": response_length,
        f"{rollout}.max_model_len": max_model_len,
        # Most were made for 512 tokens, but RoPE has no end. verl reads the first, vLLM the second.
        "+actor_rollout_ref.model.override_config.max_position_embeddings": max_model_len,
        f"+{ENGINE}.hf_overrides.max_position_embeddings": max_model_len,
    }
    default_overrides = [f"{rollout}.nnodes=1", f"{rollout}.load_format=auto"]  # no trainer sends weights
    default_overrides += [f"{key}={tokens}" for key, tokens in limits.items() if tokens is not None]
    config_folder = CONFIG_DIR if config_dir is None else Path(config_dir).resolve()
    with initialize_config_dir(str(config_folder), version_base=None):
        config = compose(config_name, overrides=[*default_overrides, *overrides])
    config.actor_rollout_ref.rollout.n_gpus_per_node = replicas * gpus_per_engine(config)
    OmegaConf.resolve(config)
    return config


def gpus_per_engine(config: DictConfig) -> int:
    """(Logical) GPUs of one server."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size


@contextmanager
def local_ray(
    num_gpus: int = 3, environment: Mapping[str, str] | None = None, log_to_driver: bool = False
) -> Iterator[None]:
    """One local Ray, the only one of this process.

    Args:
        num_gpus: Logical; each server takes one.
        environment: Variables of the workers.
        log_to_driver: Whether the workers' output comes here.
    """
    ray.shutdown()  # what was left running
    ray.init(
        "local",  # also where the environment names a cluster
        num_cpus=16,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=log_to_driver,
        runtime_env={"env_vars": {"VLLM_LOGGING_LEVEL": "WARN", **(environment or {})}},
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def start_servers(
    config: DictConfig,
    replica_class: type | None = None,
    start_rank: int = 0,
    load_balancer_class: type | None = None,
) -> Iterator[Any]:
    """verl's `LLMServerManager` with `rollout.n_gpus_per_node` running servers, in the Ray that is running.

    Args:
        config: As `engine_config` gives it.
        replica_class: Started instead of what verl's registry says for `rollout.name`.
        start_rank: Rank of the first server; servers that live in one Ray at a time need different ranks.
        load_balancer_class: Started instead of verl's.
    """
    from verl.workers.rollout.llm_server import LLMServerManager

    class_members = {} if replica_class is None else {"rollout_replica_class": replica_class}
    manager = type("EngineManager", (LLMServerManager,), class_members).create(
        config, start_rank=start_rank, load_balancer_cls=load_balancer_class
    )
    engines: list[psutil.Process] = []
    try:
        for server in manager.server_handles:
            engines += engine_processes(server)
        # The load balancer starts in the background, for seconds of a core.
        ray.get(manager.global_load_balancer.require_acquire_fields.remote(), timeout=60)
        yield manager
    finally:  # ends the actors, and the engine processes that do not end with them
        for replica in manager.rollout_replicas:
            for actor in [*replica.servers, *replica.workers]:
                ray.kill(actor)
            for group in replica.resource_pool.pgs or []:
                ray.util.remove_placement_group(group)
        ray.kill(manager.global_load_balancer)
        for engine in psutil.wait_procs(engines, timeout=5)[1]:
            engine.kill()
        psutil.wait_procs(engines, timeout=5)


def process_of(actor: Any) -> psutil.Process:
    """The process that an actor of this machine runs in."""
    return psutil.Process(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=300))


def engine_processes(server: Any) -> list[psutil.Process]:
    """The processes that a server has started: its engine's."""
    return process_of(server).children(recursive=True)
