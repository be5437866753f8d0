"""Runs verl's PPO with `RayDartsTrainer`: the task runner, and how a running Ray is joined."""

import os
import socket
from collections.abc import Mapping
from copy import deepcopy
from pprint import pprint

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.main_ppo_v0 import BaseTaskRunner
from verl.trainer.ppo.ray_trainer import Role
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler, need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.device import get_resource_name

from darts.checks.placement import check_cluster, is_disaggregated, pools
from darts.checks.run import darts_config
from darts.messages import Node
from darts.strategy import make_strategy
from darts.training.trainer import RayDartsTrainer

OF_A_NEW_RAY = ("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "_node_name", "_system_config")
"""Arguments of `ray.init` that it refuses where it joins a cluster."""

FORWARDED = (
    "VERL_", "DARTS_", "VLLM_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "NCCL_", "GLOO_",
    "UCX_", "FI_", "TORCH_", "OMP_", "PYTORCH_",
)  # fmt: skip
"""Beginnings of the names of variables that workers are to have as the entry point has them."""

NOT_FORWARDED = ("_HOST_IP", "_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
"""Ends of names: a node's own address, and what must not be read in a log; verl prints what it gives to Ray."""


class DartsTaskRunner(BaseTaskRunner):
    """verl's legacy task runner (`verl.trainer.main_ppo_v0.TaskRunner`, 0.9.1) with `RayDartsTrainer`."""

    def add_actor_rollout_worker(self, config: DictConfig) -> tuple[type, type]:
        """Adds verl's worker; it holds no rollout where the servers stand alone, and has the RPCs of the overlap."""
        worker, worker_group = super().add_actor_rollout_worker(config)
        darts = darts_config(config)
        if darts.enable and darts.overlap.mode != "off":
            from verl_patches.dp_actor import OverlappedActorWorker as worker
        elif is_disaggregated(config):
            from verl_patches.placement import PlacedActorWorker as worker
        else:
            return worker, worker_group
        roles = (Role.ActorRollout, Role.ActorRolloutRef)
        self.role_worker_mapping |= {role: ray.remote(worker) for role in roles if role in self.role_worker_mapping}
        return worker, worker_group

    def trainer_class(self) -> type:
        """`RayDartsTrainer`; a subclass may train with a subclass of it."""
        return RayDartsTrainer

    def run(self, config: DictConfig) -> None:
        """Sets up roles, data and trainer as `TaskRunner.run` does, and trains."""
        # What verl's prints here.
        print(f"DartsTaskRunner hostname: {socket.gethostname()}, PID: {os.getpid()}")  # noqa: T201
        pprint(OmegaConf.to_container(config, resolve=True))  # noqa: T203
        _, ray_worker_group_cls = self.add_actor_rollout_worker(config)
        self.add_critic_worker(config)
        self.add_reward_model_resource_pool(config)
        self.add_teacher_model_resource_pool(config)
        trained = as_trained(config)
        validate_config(trained, need_reference_policy(trained), need_critic(trained))
        resource_pools = self.init_resource_pool_mgr(config)
        # The nodes that Ray has now must be enough, before data or models are loaded.
        found_resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [Node(found.get(get_resource_name(), 0), found.get("CPU", 0)) for found in found_resources]
        check_cluster(config, others=resource_pools.get_n_gpus() - pools(config).train, nodes=nodes)
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        data = config.data
        made_of = {"data_config": data, "tokenizer": model.tokenizer, "processor": model.processor}
        train_limit, val_limit = data.get("train_max_samples", -1), data.get("val_max_samples", -1)
        train = create_rl_dataset(data.train_files, **made_of, is_train=True, max_samples=train_limit)
        val = create_rl_dataset(data.val_files, **made_of, is_train=False, max_samples=val_limit)
        trainer = self.trainer_class()(
            config=config,
            tokenizer=model.tokenizer,
            processor=model.processor,
            role_worker_mapping=self.role_worker_mapping,
            resource_pool_manager=resource_pools,
            ray_worker_group_cls=ray_worker_group_cls,
            train_dataset=train,
            val_dataset=val,
            train_sampler=create_rl_sampler(data, train),
        )
        trainer.init_workers()
        trainer.fit()


def as_trained(config: DictConfig) -> DictConfig:
    """A copy of the configuration with what the run's strategy sets in it, for verl to check."""
    darts = darts_config(config)
    if not darts.enable:
        return config
    trained = deepcopy(config)
    for key, value in make_strategy(darts, config.data.train_batch_size).settings.items():
        OmegaConf.update(trained, key, value)
    return trained


def join_cluster(config: DictConfig, environment: Mapping[str, str]) -> None:
    """Where a running Ray is to be joined (RAY_ADDRESS, or `ray_kwargs.ray_init.address`), fits `ray_init` to that.

    What only a new Ray can be told is dropped. Workers of a Ray that was started elsewhere have its environment, not
    this one's: variables that verl, vLLM and the like read are handed on, unless the configuration sets them.
    """
    ray_init = config.ray_kwargs.ray_init
    if (ray_init.get("address") or environment.get("RAY_ADDRESS") or "local") == "local":
        return
    with open_dict(ray_init):
        for name in OF_A_NEW_RAY:
            ray_init.pop(name, None)
        runtime_env = ray_init.get("runtime_env") or {}
        forwarded = {
            name: value
            for name, value in environment.items()
            if name.startswith(FORWARDED) and not name.endswith(NOT_FORWARDED)
        }
        ray_init.runtime_env = {**runtime_env, "env_vars": {**forwarded, **(runtime_env.get("env_vars") or {})}}
