"""A run that joins a Ray which was started elsewhere: what `ray.init` refuses there, and the workers' environment."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from darts import CONFIG_DIR
from darts.training.launch import OF_A_NEW_RAY, join_cluster


@pytest.fixture
def config():
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        variable = "+ray_kwargs.ray_init.runtime_env.env_vars.NCCL_DEBUG=INFO"
        config = compose("quickstart", overrides=["platform=cpu", variable, "ray_kwargs.ray_init.num_cpus=7"])
    OmegaConf.resolve(config)
    return config


def test_without_an_address_nothing_changes(config):
    before = OmegaConf.to_container(config)
    join_cluster(config, {"VLLM_LOGGING_LEVEL": "INFO"})
    join_cluster(config, {"RAY_ADDRESS": "local"})
    assert OmegaConf.to_container(config) == before


@pytest.mark.parametrize("how", ["environment", "configuration"])
def test_workers_get_the_variables_of_the_run_but_no_secrets(config, how):
    variables = {
        "VERL_FILE_LOGGER_PATH": "m.jsonl",
        "NCCL_DEBUG": "WARN",
        "VLLM_HOST_IP": "192.0.2.1",
        "WANDB_API_KEY": "x",
    }
    if how == "environment":
        variables["RAY_ADDRESS"] = "192.0.2.1:6379"
    else:
        OmegaConf.update(config, "ray_kwargs.ray_init.address", "192.0.2.1:6379", force_add=True)
    join_cluster(config, {**variables, "PATH": "p"})
    ray_init = config.ray_kwargs.ray_init
    assert ray_init.runtime_env.env_vars == {"VERL_FILE_LOGGER_PATH": "m.jsonl", "NCCL_DEBUG": "INFO"}
    assert not set(ray_init) & set(OF_A_NEW_RAY)


def test_these_are_what_ray_refuses():
    """And nothing else that the platforms set."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = compose("quickstart", overrides=["platform=cpu"])
    kept = set(config.ray_kwargs.ray_init) - set(OF_A_NEW_RAY)
    assert kept == {"include_dashboard", "runtime_env"}
    code = """
import sys, ray
values = dict(num_cpus=1, num_gpus=1, resources={"a": 1}, labels={"a": "b"}, object_store_memory=10**8, _node_name="a",
              _system_config={"a": 1})
for name in sys.argv[1].split(","):
    try:
        ray.init("127.0.0.1:1", include_dashboard=False, **{name: values[name]})
    except ValueError as error:
        print(name, "existing cluster" in str(error))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, ",".join(OF_A_NEW_RAY)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.stdout.split("\n")[:-1] == [f"{name} True" for name in OF_A_NEW_RAY], run.stderr
