"""A configuration with a tiny untrained model, and one local Ray for the tier."""

from pathlib import Path

import pytest
import ray
from compositions import composed
from scripted_cluster import ScriptedCluster
from virtual_time import use_virtual_time

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that quickstart.yaml uses)
from darts.testbed.model import build_model, build_tokenizer

RESPONSE_LENGTH = 32


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """Tokenizer and configuration of the testbed; the weights are never used."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(tokenizer, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_config(model_dir):
    """The quickstart's configuration, for scripted responses of at most `RESPONSE_LENGTH` tokens, with overrides."""

    def make(*overrides: str):
        return composed(
            "quickstart",
            f"actor_rollout_ref.model.path={model_dir}",
            "actor_rollout_ref.rollout.n=4",
            f"data.max_response_length={RESPONSE_LENGTH}",
            "darts.allocation.mode=uniform",
            "darts.allocation.high=null",
            "darts.allocation.mean_candidates=null",
            "darts.reward.pool=false",
            "darts.progress_s=0",
            "darts.early_stop=off",
            *overrides,
        )

    return make


@pytest.fixture
def virtual_time(monkeypatch):
    """Time passes only while everybody waits, in a test whose worker and server are in its own process."""
    return use_virtual_time(monkeypatch)


@pytest.fixture(scope="session")
def local_ray():
    support = str(Path(__file__).resolve().parents[1] / "support")
    ray.init(
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": support}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def scripted(local_ray, make_config):
    """Processes for rollouts, which the tier shares."""
    return ScriptedCluster(make_config("actor_rollout_ref.rollout.agent.num_workers=3"))
