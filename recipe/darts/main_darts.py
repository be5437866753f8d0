"""Entry point: `python -m recipe.darts.main_darts [hydra overrides]`, from any directory.

Contract: composes `configs/darts_trainer.yaml` (or `--config-name quickstart`), checks it before anything expensive
starts, and trains with `RayDartsTrainer` through verl's own `run_ppo`. A setting that cannot work is one line on stderr
and exit code 2. A run that has ended, started again, is one line and exit code 0.
"""

import os
import socket
import sys
from collections.abc import Mapping
from pprint import pprint
from typing import NoReturn

import hydra
import ray
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.main_ppo import run_ppo
from verl.trainer.main_ppo_v0 import BaseTaskRunner
from verl.trainer.ppo.ray_trainer import Role
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler, need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.device import auto_set_device, get_resource_name

import verl_patches.register
from darts import CONFIG_DIR
from darts.checks import check_model, check_run, darts_config, refuse_unknown_overrides
from darts.config import ConfigError
from darts.paths import settle_paths
from darts.placement import ClusterTooSmall, Node, check_cluster, choose_backend, is_disaggregated, pools
from darts.state import finished_at
from darts.testbed import register_resolver
from verl_patches.run_id import name_run

register_resolver()

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
        """As verl's; the worker holds no rollout where the servers stand alone, and has the RPCs of the overlap."""
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
        from darts.trainer import RayDartsTrainer

        return RayDartsTrainer

    def run(self, config: DictConfig) -> None:
        """Sets up roles, data and trainer as `TaskRunner.run` does, and trains."""
        print(f"DartsTaskRunner hostname: {socket.gethostname()}, PID: {os.getpid()}")
        pprint(OmegaConf.to_container(config, resolve=True))
        _, ray_worker_group_cls = self.add_actor_rollout_worker(config)
        self.add_critic_worker(config)
        self.add_reward_model_resource_pool(config)
        self.add_teacher_model_resource_pool(config)
        validate_config(config, need_reference_policy(config), need_critic(config))
        resource_pools = self.init_resource_pool_mgr(config)
        check_ray(config, resource_pools.get_n_gpus())
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        data = config.data
        train, val = (
            create_rl_dataset(files, data, model.tokenizer, model.processor, is_train=is_train, max_samples=limit)
            for files, is_train, limit in (
                (data.train_files, True, data.get("train_max_samples", -1)),
                (data.val_files, False, data.get("val_max_samples", -1)),
            )
        )
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


@hydra.main(config_path=str(CONFIG_DIR), config_name="darts_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Checks the configuration, starts Ray and trains."""
    verl_patches.register.assert_active()
    auto_set_device(config)
    settle_paths(config)
    OmegaConf.resolve(config)
    try:
        darts_config(config)
        choose_backend(config)
        check_run(config)
        check_model(config)
    except ConfigError as error:
        refuse(error)
    try:
        validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError) as error:  # verl's own rules
        refuse(error)
    if (step := finished_at(config.trainer)) is not None:
        print(
            f"[darts] nothing to train: {config.trainer.default_local_dir} has step {step}, and "
            f"trainer.total_training_steps={config.trainer.total_training_steps}. Raise it to train on; "
            "trainer.val_only=True validates, if the run was ended in its last validation.",
            flush=True,
        )
        return
    name_run()
    join_cluster(config, os.environ)
    try:
        run_ppo(config, task_runner_class=ray.remote(DartsTaskRunner))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClusterTooSmall | ConfigError):
            refuse(error.cause)
        raise


def check_ray(config: DictConfig, num_gpus: int) -> None:
    """Checks that the nodes which Ray has now are enough, before data or models are loaded.

    Args:
        config: of the run.
        num_gpus: of verl's resource pools: those that train, and those of reward and teacher models.

    Raises:
        ClusterTooSmall: they are not.
    """
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node(resources.get(get_resource_name(), 0), resources.get("CPU", 0)) for resources in have]
    check_cluster(config, others=num_gpus - pools(config).train, nodes=nodes)


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


def refuse(error: Exception | str) -> NoReturn:
    """Ends the program with the one line that says what is wrong."""
    print(f"[darts] {error}", file=sys.stderr)
    sys.exit(2)


def command() -> None:
    """Runs `main`, and refuses what Hydra cannot compose or resolve, where Hydra itself would exit with 1."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors
    try:
        refuse_unknown_overrides(sys.argv[1:])
        main()
    except ray.exceptions.RayTaskError:  # is of its cause's class too
        raise
    except ConfigError as error:
        refuse(error)
    except (HydraException, OmegaConfBaseException) as error:
        refuse(" ".join(str(error).partition("Config search path")[0].split()))


if __name__ == "__main__":
    command()
