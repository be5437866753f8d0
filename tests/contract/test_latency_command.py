"""`python -m darts.engines profile` on real configurations, up to the point where it would start an engine."""

import pytest

from darts import CONFIG_DIR
from darts.engines import command as latency_command
from darts.engines.command import main
from darts.testbed import assets_dir


class Started(Exception):
    """An engine would have been started."""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """The configuration that the command's options give."""
    seen = []
    configure = latency_command._configure

    def record(options):
        seen.append(configure(options))
        return seen[-1]

    def refuse(*args, **kwargs):
        raise Started

    monkeypatch.setattr(latency_command, "_configure", record)
    monkeypatch.setattr("darts.engines.start.local_ray", refuse)

    def run(*options):
        with pytest.raises(Started):
            main(["profile", "--out", str(tmp_path / "curve.json"), *options])
        return seen[-1]

    return run


def test_the_default_is_one_engine_of_the_quickstart_with_the_models_own_weights(configured):
    rollout = configured().actor_rollout_ref.rollout
    assert (rollout.nnodes, rollout.n_gpus_per_node, rollout.load_format) == (1, 1, "auto")
    assert (rollout.max_num_seqs, rollout.max_model_len) == (128, 304), "as in the quickstart's run"


def test_a_users_run_is_profiled_with_the_overrides_of_the_run(configured):
    model = str(assets_dir("depth") / "model")
    config = configured(
        "--config-name", "darts_trainer", "data.max_prompt_length=100", "--largest", "64", "darts.seed=3",
        f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.rollout.tensor_model_parallel_size=4",
    )  # fmt: skip
    assert config.actor_rollout_ref.model.path == model
    assert config.actor_rollout_ref.rollout.prompt_length == 100
    assert config.actor_rollout_ref.rollout.n_gpus_per_node == 4, "one engine of tensor-parallel size 4"
    assert config.darts.seed == 3


def test_a_users_own_file_and_model(configured, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"hydra:\n  searchpath: [pkg://verl.trainer.config, {CONFIG_DIR}]\n"
        "defaults: [darts_base, _self_]\nactor_rollout_ref:\n  rollout: {max_num_seqs: 77}\n"
    )
    model = str(assets_dir("depth") / "model")
    config = configured("--config-dir", str(tmp_path), "--config-name", "mine", "--model", model)
    assert config.actor_rollout_ref.rollout.max_num_seqs == 77
    assert config.actor_rollout_ref.model.path == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "300"], "tokens=300: 439 tokens do not fit into max_model_len=304"),
        (["--largest", "1"], "largest batch size 1: must be at least 2"),
        (["--prompt-tokens", "0"], "prompt_tokens=0: must be at least 1"),
        (
            ["--model", "/no/such/model"],
            "actor_rollout_ref.model.path='/no/such/model': its config.json cannot be read",
        ),
        (["data.nonsense=3"], "data.nonsense"),
        (["data.max_prompt_length="], "actor_rollout_ref.rollout.prompt_length='': must be an integer"),
        (
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=x"],
            "tensor_model_parallel_size='x': must be an integer",
        ),
        (["x=["], "no viable alternative at input"),
        (["darts.selction=3"], "did you mean darts.selection?"),
        (["--config-name", "none"], "Cannot find primary config 'none'"),
        (["--config-dir", "/no/such/folder"], "/no/such/folder"),
        (["actor_rollout_ref.rollout.name=sglang"], "DARTS drives vLLM servers"),
    ],
)
def test_settings_that_cannot_work_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, options, message):
    def refuse(*args, **kwargs):
        raise Started

    monkeypatch.setattr("darts.engines.start.local_ray", refuse)
    with pytest.raises(SystemExit) as raised:
        main(["profile", "--out", str(tmp_path / "curve.json"), *options])
    assert raised.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[darts]")]
    assert message in line
    assert not list(tmp_path.iterdir())
