"""Entry point: `python -m recipe.darts.main_darts [hydra overrides]`, from any directory.

Contract: composes `configs/darts_trainer.yaml` (or `--config-name quickstart`), checks it before anything expensive
starts, and trains with `RayDartsTrainer` through verl's own `run_ppo`. A setting that cannot work is one line on stderr
and exit code 2. A run that has ended, started again, is one line and exit code 0.
"""

import os
import sys

import hydra
import ray
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

import verl_patches.register
from darts import CONFIG_DIR
from darts.checks.paths import settle_paths
from darts.checks.placement import choose_backend
from darts.checks.run import check_model, check_run, darts_config, refuse_unknown_overrides
from darts.config import ConfigError
from darts.evidence.checkpoint import finished_at
from darts.evidence.log import logger, refuse
from darts.testbed import register_resolver
from darts.training.launch import DartsTaskRunner, join_cluster
from verl_patches.pools import ClusterTooSmall
from verl_patches.weights.run_id import name_run

register_resolver()


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
    if (last_step := finished_at(config.trainer)) is not None:
        logger.info(
            f"nothing to train: {config.trainer.default_local_dir} has step {last_step}, and "
            f"trainer.total_training_steps={config.trainer.total_training_steps}. Raise it to train on; "
            "trainer.val_only=True validates, if the run was ended in its last validation."
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
