"""recipe/darts/run_*.sh, run with a stub in the place of Python: what they ask for composes, is valid for verl and for
DARTS, has the paper's settings, and differs from its baseline in DARTS alone."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import compositions
import pytest
from jobs import ROOT
from omegaconf import DictConfig, OmegaConf
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that configurations use)
from darts.checks.placement import Pools, choose_backend, pools
from darts.checks.run import check_run
from darts.config import ConfigError
from darts.testbed import assets_dir

FOLDER = ROOT / "recipe" / "darts"
RECIPES = sorted(path.stem for path in FOLDER.glob("run_*.sh") if not path.stem.endswith("_baseline"))
PAPER = [name for name in RECIPES if name.endswith(("_3b_math", "_dapo", "_megatron"))]
ONE_GPU = "run_qwen2.5_0.5b_gsm8k"
SEVERAL_GPUS = [name for name in RECIPES if name != ONE_GPU]
BRANCHES = ("colocated", "disaggregated")
RUNS = [(name, placement) for placement in BRANCHES for name in (RECIPES if placement == "colocated" else SEVERAL_GPUS)]
FILES = {
    "MODEL_PATH": str(assets_dir("overthink") / "model"),
    "TRAIN_FILES": str(assets_dir("overthink") / "train.parquet"),
    "VAL_FILES": str(assets_dir("overthink") / "val.parquet"),
}
KNOBS = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")


@pytest.fixture(scope="module", autouse=True)
def nccl():
    """As where cupy is installed."""
    before = CheckpointEngineRegistry._registry.get("nccl")
    CheckpointEngineRegistry._registry["nccl"] = object
    yield
    CheckpointEngineRegistry._registry["nccl"] = before
    if before is None:
        del CheckpointEngineRegistry._registry["nccl"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs a script and returns what it would have started Python with."""
    folder = tmp_path_factory.mktemp("launch")
    stub, out = folder / "python", folder / "arguments"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {out}\n")
    stub.chmod(0o755)

    @cache
    def run(name: str, *arguments: str, **knobs: str) -> tuple[str, ...]:
        inherited = {key: os.environ[key] for key in ("PATH", "HOME")}
        result = subprocess.run(
            ["bash", str(FOLDER / f"{name}.sh"), *arguments],
            env=inherited | {"PYTHON": str(stub)} | FILES | knobs,
            cwd=folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return tuple(out.read_text().split("\0")[:-1])

    return run


def composed(arguments: tuple[str, ...]) -> DictConfig:
    assert arguments[:2] == ("-m", "recipe.darts.main_darts")
    return compositions.composed("darts_trainer", *arguments[2:])


def checked(arguments: tuple[str, ...]) -> DictConfig:
    """As the entry point checks it."""
    config = composed(arguments)
    choose_backend(config)
    check_run(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    return config


def leaves(config: DictConfig) -> dict[str, object]:
    def walk(value: object, path: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {path: value}
        return {key: leaf for name, part in value.items() for key, leaf in walk(part, f"{path}.{name}").items()}

    return walk(OmegaConf.to_container(config), "")


@pytest.mark.parametrize(("name", "placement"), RUNS)
def test_it_is_valid_and_differs_from_its_twin_in_darts_alone(launch, name, placement):
    """The twin is plain verl: of the block `darts:` it reads `enable` and `placement`, which is the recipe's."""
    ours, baseline = (checked(launch(script, PLACEMENT=placement)) for script in (name, f"{name}_baseline"))
    assert ours.darts.enable
    assert not baseline.darts.enable
    assert ours.darts.placement == baseline.darts.placement == placement
    mine, theirs = leaves(ours), leaves(baseline)
    differing = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    of_the_folder = {".trainer.default_local_dir", ".trainer.experiment_name", ".darts.trace"}
    of_the_folder |= {".actor_rollout_ref.rollout.trace.experiment_name"}
    of_the_folder |= {".ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"}
    assert differing - of_the_folder == {".darts.enable"}
    assert baseline.trainer.experiment_name == f"{ours.trainer.experiment_name}_baseline"


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(launch, name):
    """GRPO, group 8, clip-higher, token mean, overlong shaping, no KL (docs/reproduction.md)."""
    config = checked(launch(name))
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    assert config.algorithm.adv_estimator == "grpo"
    assert rollout.n == 8
    assert 128 <= data.train_batch_size <= 256
    assert actor.ppo_mini_batch_size == 32
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)
    assert actor.loss_agg_mode == "token-mean"
    assert not actor.use_kl_loss
    assert not config.algorithm.use_kl_in_reward
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (1e-6, 10, 0.1)
    assert actor.optim.clip_grad == 1.0, "what both engines read; actor.grad_clip is read by none"
    assert rollout.temperature == 1.0
    assert data.max_prompt_length == 2048
    assert data.max_response_length == (16384 if "30b" in name else 8192)
    assert config.reward.reward_manager.name == "dapo"
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg
    assert overlong.enable
    assert (overlong.len, overlong.penalty_factor) == (data.max_response_length / 2, 1.0)
    assert config.reward.reward_kwargs.max_resp_len == data.max_response_length
    assert rollout.tensor_model_parallel_size == (2 if "_3b_" in name else 4)
    assert actor.get("ulysses_sequence_parallel_size", 4) == 4
    assert config.trainer.total_training_steps == 500
    assert config.darts.selection.num_long == 1
    assert config.darts.allocation.high == 16
    darts = check_run(config)
    assert (darts.preset, darts.spare_prompts, darts.bypass) == ("paper", 0, False)
    assert (darts.selection.mode, darts.selection.long_end, darts.selection.long_wait) == ("auto", "finished", "all")
    assert (darts.allocation.mode, darts.allocation.mean_candidates) == ("adaptive", 1.3 * 8)


@pytest.mark.parametrize("name", SEVERAL_GPUS)
def test_half_of_each_node_serves_where_disaggregated_and_all_of_it_otherwise(launch, name):
    apart = composed(launch(name, NNODES="2", PLACEMENT="disaggregated"))
    assert pools(apart) == Pools(train=8, serve=8, separate=True)
    assert pools(composed(launch(name, NNODES="8"))) == Pools(train=64, serve=64, separate=False)
    assert apart.trainer.nnodes == apart.actor_rollout_ref.rollout.nnodes == 2
    assert composed(launch(name, GPUS_PER_NODE="1", ROLLOUT_TP="1")).actor_rollout_ref.rollout.n_gpus_per_node == 1


def test_the_switches_of_the_ablation(launch):
    """The paper's rows, each with what the one before has (docs/reproduction.md)."""
    name = "run_qwen2.5_14b_dapo"
    rows = [
        launch(f"{name}_baseline", PLACEMENT="disaggregated"),
        launch(name, PLACEMENT="disaggregated", ALLOCATION="off", OVERLAP="token"),
        launch(name, PLACEMENT="disaggregated", ALLOCATION="uniform", MEAN_CANDIDATES="10.4", OVERLAP="token"),
        launch(name, PLACEMENT="disaggregated", OVERLAP="token"),
    ]
    settings = [check_run(checked(row)) for row in rows]
    assert [s.enable for s in settings] == [False, True, True, True]
    assert [s.overlap.mode for s in settings[1:]] == ["token"] * 3
    assert [s.allocation.mode for s in settings[1:]] == ["off", "uniform", "adaptive"]
    assert [s.allocation.mean_candidates for s in settings[2:]] == [10.4, 10.4]
    assert [s.num_short for s in settings[1:]] == [7, 7, 7]
    for num_long in (2, 4):
        assert check_run(checked(launch(name, NUM_LONG=str(num_long)))).num_short == 8 - num_long


@pytest.mark.parametrize(("name", "placement"), RUNS)
def test_the_fast_preset_is_valid_for_verl_with_every_recipe(launch, name, placement):
    """Log-probs are the servers', so none are computed during generation, wherever the servers are."""
    darts = check_run(checked(launch(name, PLACEMENT=placement, PRESET="fast")))
    assert (darts.spare_prompts, darts.allocation.mean_candidates) == ("plan", "plan")
    assert (darts.selection.long_end, darts.bypass, darts.overlap.mode) == ("cut", True, "off")
    kept = check_run(checked(launch(name, PLACEMENT=placement, PRESET="fast", BYPASS="False", MEAN_CANDIDATES="9")))
    assert (kept.bypass, kept.allocation.mean_candidates) == (False, 9)


@pytest.mark.parametrize("name", RECIPES)
def test_every_knob_changes_what_is_launched(launch, name):
    text = (FOLDER / f"{name}.sh").read_text()
    knobs = dict(KNOBS.findall(text))
    assert {"MODEL_PATH", "DATA_DIR", "NNODES", "GPUS_PER_NODE", "OUTPUT_DIR"} <= knobs.keys()
    assert len(knobs) > 20
    assert ("PLACEMENT" in knobs) == (name != ONE_GPU)
    usual = {"PLACEMENT": "disaggregated"} if name != ONE_GPU else {}
    plain = launch(name, **usual)
    for knob in knobs.keys() - {"PYTHON", *FILES}:
        value = "7" if re.fullmatch(r"\d+|\$\(\(.*", knobs[knob]) else "other"
        if knob == "DATA_DIR":
            given = usual | {"TRAIN_FILES": "", "VAL_FILES": "", knob: "/some/data"}
            assert any("/some/data/" in word for word in launch(name, **given))
        else:
            assert launch(name, **(usual | {knob: value})) != plain, knob


@pytest.mark.parametrize("name", RECIPES)
def test_overrides_come_last_and_paths_are_absolute(launch, name):
    folder = "lr=1e-6, try (2)"
    arguments = launch(name, "trainer.total_training_steps=2", "darts.selection.num_long=2", OUTPUT_DIR=folder)
    assert arguments[-2:] == ("trainer.total_training_steps=2", "darts.selection.num_long=2")
    config = checked(arguments)
    assert config.trainer.total_training_steps == 2
    assert config.darts.selection.num_long == 2
    assert Path(config.trainer.default_local_dir).is_absolute()
    assert Path(config.trainer.default_local_dir).name == config.trainer.experiment_name == folder
    assert Path(config.darts.trace) == Path(config.trainer.default_local_dir) / "darts.jsonl"


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_script_tells_how_to_use_it(name):
    """The commands in its comment are of this recipe, and its data are made by a script that is there."""
    head = [line[1:].strip() for line in (FOLDER / f"{name}.sh").read_text().split("set -x")[0].splitlines()]
    scripts = {word for line in head for word in re.findall(r"(?:recipe|scripts)/[\w./]+\.(?:sh|py)", line)}
    assert {f"recipe/darts/{name}.sh", f"recipe/darts/{name}_baseline.sh"} <= scripts
    prepared = {data for line in head for data in re.findall(r"scripts/data/prepare\.py (\w+)", line)}
    assert len(prepared) == 1
    assert f"$DATA_DIR/{min(prepared)}/train.parquet" in (FOLDER / f"{name}.sh").read_text()
    assert [script for script in sorted(scripts) if not (ROOT / script).exists()] == []


BAD = [
    ({"PLACEMENT": "disaggregated", "GPUS_PER_NODE": "6"}, "do not fill the 1 x 3 GPUs that serve"),
    ({"GPUS_PER_NODE": "6"}, "tensor_model_parallel_size=4: a server takes 4 GPUs"),
    ({"GPUS_PER_NODE": "6", "ROLLOUT_TP": "2"}, "ulysses_sequence_parallel_size=4: must divide the 6 GPUs that train"),
    ({"PLACEMENT": "separate"}, "darts.placement='separate': must be one of"),
    ({"PLACEMENT": "disaggregated", "GPUS_PER_NODE": "1"}, "actor_rollout_ref.rollout.n_gpus_per_node=0"),
    (
        {"MODEL_PATH": "/no/such/model"},
        "actor_rollout_ref.model.path='/no/such/model': there is no such file or folder",
    ),
    ({"TRAIN_FILES": "data/no.parquet"}, "data.train_files='data/no.parquet': there is no such file or folder"),
    ({"NUM_LONG": "8"}, "darts.selection.num_long=8"),
    ({"STRATEGY": "fast"}, "darts.strategy='fast'"),
    ({"PRESET": "quick"}, "darts.preset='quick': must be one of paper, fast"),
    ({"LONG_END": "cut", "LONG_WAIT": "all"}, "darts.selection.long_wait='all': with darts.selection.long_end=cut"),
    ({"PRESET": "fast", "OVERLAP": "token"}, "darts.overlap.mode='token': with darts.bypass"),
    ({"ATTENTION": "sdpa"}, "attn_implementation='sdpa': with Ulysses 4"),
]


@pytest.mark.parametrize(("knobs", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_with_the_fix(launch, knobs, message):
    with pytest.raises(ConfigError) as error:
        checked(launch("run_qwen2.5_math_7b_dapo", NNODES="1", **knobs))
    assert message in str(error.value)
    assert " Fix: " in str(error.value)


def test_a_script_ends_with_that_line_and_code_2(tmp_path):
    """With the real Python: nothing was loaded, no Ray started."""
    result = subprocess.run(
        ["bash", str(FOLDER / f"{ONE_GPU}.sh")],
        env=os.environ | FILES | {"MODEL_PATH": "/no/such/model", "OUTPUT_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        "[darts] actor_rollout_ref.model.path='/no/such/model': there is no such file or folder. Fix:"
    )
    assert "ray init" not in result.stdout
    assert "Traceback" not in result.stderr
