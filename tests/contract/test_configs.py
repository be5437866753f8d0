"""Every YAML composes with verl's own, in any directory; what cannot work is refused before anything starts."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from compositions import composed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

import recipe.darts.main_darts  # registers the resolver that quickstart.yaml uses, too
from darts import CONFIG_DIR
from darts.checks import run as checks
from darts.checks.paths import settle_paths
from darts.checks.run import check_model, check_run
from darts.config import SECTIONS, ConfigError, DartsConfig
from darts.testbed import LIMITS, assets_dir
from darts.training.launch import as_trained

PRIMARY = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if "searchpath" in path.read_text())
TESTBEDS = sorted(path.stem for path in (CONFIG_DIR / "testbed").glob("*.yaml"))
PLATFORMS = sorted(path.stem for path in (CONFIG_DIR / "platform").glob("*.yaml"))


PATHS = ("actor_rollout_ref.model.path", "data.train_files", "data.val_files")


def trainable(*overrides: str):
    """`darts_trainer` with the few keys that verl itself wants a user to set."""
    return composed(
        "darts_trainer",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        *(f"{key}={assets_dir('overthink')}" for key in PATHS),
        *overrides,
    )


def test_the_primary_files():
    assert PRIMARY == ["bench", "darts_trainer", "quickstart"]
    assert PLATFORMS == ["cpu", "gpu"]
    assert sorted(LIMITS) == TESTBEDS


def test_verl_checks_the_configuration_with_what_the_strategy_sets_in_it():
    """So that its own rules about bypass mode hold for a preset that switches it on."""
    config = trainable("darts.preset=fast")
    trained = as_trained(config)
    assert trained.algorithm.rollout_correction.bypass_mode
    assert trained.actor_rollout_ref.rollout.calculate_log_probs
    assert not config.algorithm.rollout_correction.bypass_mode
    assert as_trained(trainable("darts.enable=false")) == trainable("darts.enable=false")


@pytest.mark.parametrize("testbed", LIMITS)
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["quickstart", "bench"])
def test_the_testbeds_compose_and_are_valid_for_verl(name, platform, testbed):
    config = composed(name, f"platform={platform}", f"testbed={testbed}")
    check_run(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    limits = LIMITS[testbed]
    assert (config.data.max_prompt_length, config.data.max_response_length) == (limits.prompt, limits.response)
    assert config.actor_rollout_ref.rollout.max_model_len == limits.prompt + limits.response


def test_the_trainer_composes_and_is_valid_for_verl():
    config = trainable()
    assert check_run(config).enable
    validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_yaml_block_is_the_typed_block():
    """The same keys, and null or the default as values."""
    block = yaml.safe_load((CONFIG_DIR / "darts_base.yaml").read_text())["darts"]
    typed = DartsConfig.from_block({}, 8)
    for section, section_type in SECTIONS.items():
        assert set(block[section]) == set(section_type.__dataclass_fields__)
    assert set(block) == set(typed.__dataclass_fields__) - {"group_size"}
    assert block.pop("trace") == "${trainer.default_local_dir}/darts.jsonl", "it names the run's folder"
    assert DartsConfig.from_block(block, 8) == typed


@pytest.mark.parametrize("name", ["darts_base.yaml", "platform/cpu.yaml"])
def test_a_comment_stands_above_every_key_of_ours(name):
    lines = (CONFIG_DIR / name).read_text().splitlines()
    block = lines[lines.index("darts:") :] if "darts:" in lines else []
    block = block[: next((i for i, line in enumerate(block[1:], 1) if line and not line.startswith(" ")), len(block))]
    for number, line in enumerate(block):
        if re.match(r"^ +\w+: \S", line):
            assert block[number - 1].lstrip().startswith("#"), line


BAD = [
    (["+darts.lambda=1"], "darts.lambda=1: unknown key"),
    (["darts.selection.num_long=-1"], "darts.selection.num_long=-1"),
    (["darts.selection.num_long=8"], "in [0, rollout.n=8)"),
    (["darts.allocation.low=7"], "darts.allocation.low=7"),
    (["darts.allocation.low=12", "darts.allocation.high=11"], "darts.allocation.high=11"),
    (["darts.allocation.mean_candidates=20"], "darts.allocation.mean_candidates=20"),
    (["actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n=1"),
    (["algorithm.adv_estimator=remax"], "algorithm.adv_estimator='remax'"),
    (["actor_rollout_ref.rollout.name=sglang"], "actor_rollout_ref.rollout.name='sglang'"),
    (["trainer.use_v1=true"], "trainer.use_v1=True"),
    (["trainer.use_v1=true", "darts.enable=false"], "trainer.use_v1=True"),
    (["actor_rollout_ref.hybrid_engine=false"], "actor_rollout_ref.hybrid_engine=False"),
    (["actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"], "agent_loop_manager_class=None"),
    (["darts.reward.pool=true", "reward.reward_model.enable=true"], "darts.reward.pool=True"),
    (["darts.latency.profile=/no/such.json"], "darts.latency.profile='/no/such.json'"),
    (["darts.allocation.cost_weight=-1"], "darts.allocation.cost_weight=-1"),
    (["darts.early_stop=fast"], "darts.early_stop='fast'"),
    (["darts.selection.long_wait=5"], "darts.selection.long_wait=5"),
    (["darts.streaming.chunk_tokens=0"], "darts.streaming.chunk_tokens=0"),
    (["darts.streaming.abort_timeout_s=-1"], "darts.streaming.abort_timeout_s=-1"),
    (["darts.routing=sticky"], "darts.routing='sticky'"),
    (["darts.routing=group", "actor_rollout_ref.rollout.router_config_path=/x"], "router_config_path='/x' replaces"),
    (["actor_rollout_ref.rollout.disaggregation.enabled=true"], "rollout.disaggregation.enabled=True"),
    (
        ["actor_rollout_ref.rollout.agent.agent_loop_manager_class=darts.rollout.DartsAgentLoopManager"],
        "class='darts.rollout.DartsAgentLoopManager': it is called darts.rollout.manager.DartsAgentLoopManager now.",
    ),
    (
        [
            "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_patches.gloo_checkpoint_engine",
            "darts.enable=false",
        ],
        "module='verl_patches.gloo_checkpoint_engine': it is called verl_patches.weights.gloo now.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_error_with_key_value_rule_and_fix(overrides, message):
    with pytest.raises(ConfigError) as error:
        check_run(trainable(*overrides))
    assert message in str(error.value)
    assert " Fix: " in str(error.value)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("enable", [True, False])
def test_a_local_path_that_is_not_there_is_refused(key, enable):
    with pytest.raises(ConfigError, match=f"{key}='/no/such': there is no such file or folder"):
        check_run(trainable(f"{key}=/no/such", f"darts.enable={enable}"))
    with pytest.raises(ConfigError, match=key):
        check_run(trainable(f"{key}='~/no/such'"))


@pytest.mark.parametrize("path", ["data/no.parquet", "no.parquet"])
def test_a_relative_data_file_that_is_not_there_is_refused(path):
    with pytest.raises(ConfigError, match=f"data.train_files='{path}': there is no such file or folder"):
        check_run(trainable(f"data.train_files={path}"))


def test_local_paths_are_made_absolute(tmp_path, monkeypatch):
    """verl's processes may have started in another folder; it expands no ~, and takes no slash at a model's end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1"]}), tmp_path / "here.parquet")
    data = ["data.train_files=[here.parquet,hdfs://cluster/a.parquet]", "data.val_files=here.parquet"]
    others = ["actor_rollout_ref.model.path='~/model/'", "trainer.default_local_dir=out"]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = compose("darts_trainer", [*data, *others])
    settle_paths(config)
    assert list(config.data.train_files) == [f"{tmp_path}/here.parquet", "hdfs://cluster/a.parquet"]
    assert config.data.val_files == f"{tmp_path}/here.parquet"
    assert config.actor_rollout_ref.model.path == f"{tmp_path}/home/model"
    assert config.darts.trace == f"{tmp_path}/out/darts.jsonl"
    (tmp_path / "auto").touch()
    config.actor_rollout_ref.model.path = "Qwen/Qwen2.5-0.5B"
    settle_paths(config)
    assert config.darts.latency.profile == "auto"
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-0.5B"


def test_data_without_rows_or_prompts_are_refused(tmp_path):
    for name, columns in {"empty": {"prompt": []}, "other": {"question": ["1"]}, "good": {"prompt": ["1"]}}.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    check_run(trainable(f"data.train_files={tmp_path}/good.parquet"))
    check_run(trainable(f"data.train_files={tmp_path}/other.parquet", "data.prompt_key=question"))
    check_run(trainable(f"data.train_files={tmp_path}/other.parquet", "data.custom_cls.path=mine.py"))
    for name, rule in {
        "empty": "no rows",
        "other": "no column .*'prompt'.* but question",
        "text": "no parquet",
    }.items():
        with pytest.raises(ConfigError, match=f"data.val_files='.*{name}.parquet': (has|is) {rule}"):
            check_run(trainable(f"data.val_files=[{tmp_path}/good.parquet,{tmp_path}/{name}.parquet]"))


def test_micro_batches_take_the_longest_row():
    """verl would stop at the first response that is longer, maybe after hours."""
    dynamic, limit = "actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    lengths = ["data.max_prompt_length=1000", "data.max_response_length=20000"]
    longest = r"ppo_max_token_len_per_gpu=10500: times Ulysses 1 must be at least 21000, .* Fix: .*=21000 or more"
    check_run(trainable(dynamic, *lengths, f"{limit}=21000"))
    check_run(trainable(*lengths, f"{limit}=10500"))
    with pytest.raises(ConfigError, match=longest):
        check_run(trainable(dynamic, *lengths, f"{limit}=10500"))
    check_run(trainable(dynamic, *lengths, f"{limit}=10500", "actor_rollout_ref.rollout.max_model_len=10500"))
    check_run(trainable(dynamic, *lengths, f"{limit}=10500", "darts.enable=false"))
    reference = [
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=10500",
    ]
    with pytest.raises(ConfigError, match=r"ref.log_prob_max_token_len_per_gpu=10500"):
        check_run(trainable(dynamic, *lengths, f"{limit}=21000", *reference))
    check_run(trainable(dynamic, *lengths, f"{limit}=21000", *reference, "actor_rollout_ref.model.lora_rank=8"))
    nested = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"
    check_run(trainable(dynamic, *lengths, f"{limit}=10500", nested))
    with pytest.raises(ConfigError, match=r"ref.log_prob_max_token_len_per_gpu=10500: times Ulysses 1 "):
        check_run(trainable(dynamic, *lengths, f"{limit}=10500", nested, *reference))


def test_log_probs_have_micro_batches_of_the_actors_kind():
    with pytest.raises(ConfigError, match=r"log_prob_use_dynamic_bsz=True: must be what .*use_dynamic_bsz=False is"):
        check_run(trainable("actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"))


def model_folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | config))
    return f"actor_rollout_ref.model.path={tmp_path}"


def test_more_positions_than_the_model_has_are_refused(tmp_path):
    """As verl's servers would, once they have started."""
    length, override = "actor_rollout_ref.rollout.max_model_len=10240", "actor_rollout_ref.model.override_config"
    small, large = {"max_position_embeddings": 4096}, {"max_position_embeddings": 10240}
    model = model_folder(tmp_path, **small)
    check_model(trainable(model))
    check_model(trainable(model, length, f"+{override}.max_position_embeddings=10240"))
    with pytest.raises(ConfigError, match=r"max_model_len=10240: .* made for 4096 positions"):
        check_model(trainable(model, length))
    check_model(trainable(model_folder(tmp_path, text_config=large, vision_config={}), length))


def test_a_vision_model_is_not_packed_without_flash_attention(tmp_path, monkeypatch):
    model, sdpa = model_folder(tmp_path, vision_config={"depth": 1}), f"+{ATTENTION}=sdpa"
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "is_cpu_only", lambda: False)
    with pytest.raises(ConfigError, match=r"use_remove_padding=True: verl packs the rows of vision models"):
        check_model(trainable(model, sdpa))
    check_model(trainable(model, sdpa, "actor_rollout_ref.model.use_remove_padding=false"))
    check_model(trainable(model_folder(tmp_path), sdpa))


def test_a_model_whose_configuration_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.path='.*': its config.json cannot be read"):
        check_model(trainable(f"actor_rollout_ref.model.path={tmp_path}"))


def test_names_of_a_hub_and_addresses_are_left_to_verl():
    overrides = ["actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B", "data.train_files=[hdfs://cluster/train.parquet]"]
    check_run(trainable(*overrides))


@pytest.mark.parametrize(
    "argument", ["darts.selection.num_lng=2", "+darts.selection.num_lng=2", "++darts.selektion.x=1"]
)
def test_an_unknown_key_on_the_command_line_is_refused_before_hydra_advises_to_append_it(argument):
    checks.refuse_unknown_overrides(["--config-name", "quickstart", "darts.selection.num_long=2", "trainer.nnodes=1"])
    with pytest.raises(ConfigError, match=r"did you mean darts\.selection"):
        checks.refuse_unknown_overrides([argument])


def test_off_refuses_nothing_that_plain_verl_takes():
    for n in (1, 8):
        config = trainable(
            "darts.enable=false",
            "darts.selection.num_long=99",
            "algorithm.adv_estimator=remax",
            "actor_rollout_ref.rollout.name=sglang",
            f"actor_rollout_ref.rollout.n={n}",
        )
        assert not check_run(config).enable


def test_exact_without_reports_is_a_warning():
    with pytest.warns(
        UserWarning, match="early_stop=exact with darts.streaming.chunk_tokens=9999 .* nothing is aborted"
    ):
        check_run(trainable("darts.early_stop=exact", "darts.streaming.chunk_tokens=9999"))


@pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus"])
def test_no_group_baseline_is_a_warning(estimator):
    with pytest.warns(
        UserWarning, match=f"algorithm.adv_estimator={estimator}: DARTS shapes lengths through the group"
    ):
        check_run(trainable(f"algorithm.adv_estimator={estimator}"))


@pytest.mark.parametrize("plain", ["darts.enable=false", "darts.strategy=none"])
def test_rows_that_plain_verl_cannot_deal_to_its_workers_are_refused(plain):
    """Groups go to workers whole, and their number does not matter."""
    workers = "actor_rollout_ref.rollout.agent.num_workers=7"
    check_run(trainable(workers))
    with pytest.raises(ConfigError, match=r"agent\.num_workers=7: must divide the 8192 responses of a step"):
        check_run(trainable(workers, plain))


ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"


@pytest.mark.parametrize("enable", [True, False])
def test_attention_that_is_not_installed_is_refused(monkeypatch, enable):
    """As verl would, later, with a traceback of every rank."""
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    check_run(trainable(f"darts.enable={enable}"))  # nothing trains where there is no GPU
    monkeypatch.setattr(checks, "is_cpu_only", lambda: False)
    with pytest.raises(ConfigError, match=f"{ATTENTION}='flash_attention_2': .* flash-attn, which is not installed"):
        check_run(trainable(f"darts.enable={enable}"))
    check_run(trainable(f"+{ATTENTION}=sdpa"))
    check_run(composed("quickstart"))


def test_megatron_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "megatron" else object())
    check_run(trainable("model_engine=megatron"))
    monkeypatch.setattr(checks, "is_cpu_only", lambda: False)
    with pytest.raises(ConfigError, match="strategy='megatron': needs megatron, not installed"):
        check_run(trainable("model_engine=megatron"))


@pytest.mark.parametrize("key", ["ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"])
def test_sequences_are_split_with_flash_attention_alone(key):
    """With sdpa verl's ranks would each attend to their own slice, silently."""
    ulysses = f"actor_rollout_ref.actor.{key}=2"
    check_run(trainable(ulysses))
    with pytest.raises(ConfigError, match=f"{ATTENTION}='sdpa': with Ulysses 2"):
        check_run(trainable(ulysses, f"+{ATTENTION}=sdpa"))


@pytest.mark.parametrize("override", ["reward_model.reward_manager=dapo", "+reward_model.reward_kwargs.max_resp_len=9"])
def test_reward_settings_that_verl_no_longer_reads_are_a_warning(override):
    with pytest.warns(
        UserWarning, match=r"reward_model\.reward_\w+ is read by nothing in verl 0\.9\.1: write reward\."
    ):
        check_run(trainable(override))


@pytest.mark.parametrize("value", ["null", "5"])
def test_a_block_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="the block `darts:` is missing"):
        check_run(trainable(f"darts={value}"))


def test_a_missing_block_is_refused():
    config = OmegaConf.create({key: value for key, value in trainable().items() if key != "darts"})
    with pytest.raises(ConfigError, match="the block `darts:` is missing"):
        check_run(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "testbed=dephts",
            "In 'quickstart': Could not find 'testbed/dephts' Available options in 'testbed': depth long overthink",
        ),
        ("dart.enable=false", "Could not override 'dart.enable'. To append to your config use +dart.enable=false"),
        ("data.train_batch_size=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_what_hydra_cannot_compose_or_resolve_is_refused_in_one_line(override, said, monkeypatch, tmp_path, capsys):
    arguments = ["main_darts", "--config-name", "quickstart", f"hydra.run.dir={tmp_path}", override]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as end:
        recipe.darts.main_darts.command()
    assert end.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "[darts]" in line] == [f"[darts] {said}"]


def test_another_verl_is_refused_and_can_be_allowed(monkeypatch):
    assert version("verl") == checks.VERL_VERSION
    monkeypatch.setattr(checks, "version", lambda name: "0.9.2")
    with pytest.raises(ConfigError, match=r"verl='0.9.2': .*verl 0.9.1.* Fix: .*DARTS_ALLOW_OTHER_VERL=1"):
        check_run(trainable())
    monkeypatch.setenv("DARTS_ALLOW_OTHER_VERL", "1")
    check_run(trainable())


def test_the_command_refuses_in_one_line_before_ray_starts_from_any_directory(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart", "darts.selection.num_long=8",
         "hydra.run.dir=."],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("[darts]")]
    assert len(lines) == 1
    assert lines[0].startswith("[darts] darts.selection.num_long=8: L must be an integer in [0, rollout.n=8)")
    assert "ray init" not in result.stdout
    assert "Traceback" not in result.stderr
