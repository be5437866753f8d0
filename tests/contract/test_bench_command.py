"""`python -m darts.bench`: what is refused before an engine starts, how a folder's plan is kept, how a run is ended."""

import fcntl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_records import step
from omegaconf import OmegaConf

from darts.bench import command, launch
from darts.bench.arms import PRESETS
from darts.bench.command import main, options_of
from darts.bench.launch import LOG
from darts.bench.plan import PLAN, BenchPlan
from darts.bench.records import Records
from darts.config import ConfigError, DartsConfig


def refused(capsys, *given: str) -> str:
    """The one line that a command is refused with."""
    assert main(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--arms", "dart"], "--arms='dart': must be a preset (strategies, ablation"),
        (["--arm", "x=foo"], "must be one of none, bypass, shortest_k, darts, tail_batching, sorted"),
        (["--override", "data.train_batch=3"], "Could not override 'data.train_batch'"),
        (["--config-name", "mine"], "Cannot find primary config 'mine'"),
        (["--override", "darts.selection.num_long=9"], "darts.selection.num_long=9: L must be an integer"),
        (["--override", "actor_rollout_ref.rollout.name=sglang"], "DARTS drives verl's vLLM servers"),
        (["--arm", "x=no.such.Class"], "--arms='x': cannot be: darts.strategy='no.such.Class'"),
        (["--arms", "bypass", "--override", "actor_rollout_ref.rollout.calculate_log_probs=false"], "--arms='bypass'"),
        (
            [
                *("--arms", "none", "--arm", "x=darts,algorithm.rollout_correction.bypass_mode=true"),
                *("--override", "actor_rollout_ref.rollout.calculate_log_probs=false"),
            ],
            "--arms='x': cannot be: actor_rollout_ref.rollout.calculate_log_probs=False",
        ),
        (["--arm", "x=darts,darts.allocation.ema_weight=0.1"], "darts.allocation.ema_weight is shared by all arms"),
        (
            ["--arm", "x=none,data.max_response_length=999"],
            "'x': cannot be: data.max_response_length=999.0: must be from",
        ),
        (
            [
                *("--arm", "x=none,reward.reward_kwargs.overlong_buffer_cfg.len=8"),
                *("--override", "+reward.reward_kwargs.overlong_buffer_cfg.enable=true"),
            ],
            "has an overlong_buffer_cfg already",
        ),
        (
            [
                *("--arm", "x=none,data.max_response_length=8"),
                *("--override", "actor_rollout_ref.rollout.multi_turn.enable=true"),
            ],
            "would limit each turn",
        ),
        (["--report-only"], "has no records of a bench"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, given, says):
    assert says in refused(capsys, "--out", str(tmp_path / "out"), *given)
    assert not (tmp_path / "out" / PLAN).exists()


@pytest.mark.parametrize("given", [["--seeds", "0"], ["--steps", "-1"], ["--validate-every", "-1"], ["--testbed", "x"]])
def test_numbers_out_of_range_are_refused(given):
    with pytest.raises(SystemExit) as refusal:
        options_of(given)
    assert refusal.value.code == 2


def test_quick_is_small_and_explicit_options_win():
    quick = options_of(["--quick"]).plan
    assert ([arm.name for arm in quick.arms], quick.seeds, quick.steps) == (["none", "darts", "tail_batching"], 1, 6)
    assert options_of(["--quick", "--steps", "9"]).plan.steps == 9
    assert options_of([]).plan.seeds == 3
    assert {arm.name for arm in options_of([]).plan.arms} == {arm.name for arm in PRESETS["strategies"]}


def test_a_folder_keeps_its_plan_but_for_more_seeds(tmp_path):
    def plan(**changes):
        values = {"arms": list(PRESETS["quick"]), "seeds": 2, "steps": 5, "validate_every": 0, "overrides": []}
        return BenchPlan(**values | changes)

    plan().save(tmp_path)
    assert BenchPlan.load(tmp_path) == plan()
    plan(seeds=3).save(tmp_path)
    assert BenchPlan.load(tmp_path).seeds == 3
    for changes, name in ({"seeds": 2}, "seeds"), ({"steps": 6}, "steps"), ({"arms": list(PRESETS["beyond"])}, "arms"):
        with pytest.raises(ConfigError, match=f"has a bench with other {name}"):
            plan(**{"seeds": 3} | changes).save(tmp_path)


def test_every_preset_composes_with_the_benchs_configuration(tmp_path):
    plan = options_of(["--arms", "all", "--testbed", "depth"]).plan
    config = plan.compose(tmp_path)
    OmegaConf.resolve(config)
    assert config.trainer.total_training_steps == 30
    assert list(config.actor_rollout_ref.actor.checkpoint.load_contents) == ["model", "optimizer", "extra"]
    settings = {arm.name: arm.config(OmegaConf.to_container(config.darts), 8) for arm in plan.arms}
    assert all(isinstance(one, DartsConfig) for one in settings.values())
    modes = {name: one.overlap.mode for name, one in settings.items() if one.overlap.mode != "off"}
    assert set(modes) == {
        "+ streaming",
        "+ dual-end",
        "+ adaptive",
        "overlap sequence",
        "overlap token",
        "deadline + overlap",
    }, "an arm is the same whatever others are in the command"


def pass_minutes(monkeypatch, meanwhile) -> None:
    """Each time that the command sleeps, its clock goes on by 4 minutes, and `meanwhile()` is what happens."""
    passed = []

    def sleep(seconds) -> None:
        passed.append(240)
        meanwhile()

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: sum(passed), sleep=sleep))


@pytest.mark.parametrize(
    ("script", "says"), [("import time; time.sleep(3600)", "has said nothing"), ("1/0", "exit code 1")]
)
def test_a_run_that_fails_or_says_nothing_ends_the_command_and_itself(tmp_path, monkeypatch, capsys, script, says):
    started = []
    if says == "has said nothing":
        pass_minutes(monkeypatch, lambda: None)

    def popen(arguments, **settings):
        started.append(
            subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=settings["stderr"])
        )
        return started[-1]

    monkeypatch.setattr(command, "_composed", lambda options: {"darts": {}})
    monkeypatch.setattr(launch, "subprocess", type("Own", (), dict(vars(subprocess)) | {"Popen": staticmethod(popen)}))
    assert main(["--out", str(tmp_path), "--silence", "6"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error
    assert str(tmp_path / "run.log") in error
    assert started[0].returncode is not None
    assert Path(tmp_path / PLAN).exists(), "the same command goes on here"


def test_a_folder_in_which_a_bench_runs_is_refused(tmp_path, monkeypatch, capsys):
    """The lock lives as long as the run that has inherited it, even where the command itself was killed."""
    monkeypatch.setattr(command, "_composed", lambda options: {"darts": {}})
    with open(tmp_path / "running", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("123\n")
        lock.flush()
        inherited = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    assert main(["--out", str(tmp_path)]) == 2
    assert "has a bench that runs (process 123)" in capsys.readouterr().err
    inherited.communicate(b"\n")

    failing = subprocess.Popen
    arguments = [sys.executable, "-c", "1/0"]
    own = {"Popen": staticmethod(lambda _, **settings: failing(arguments, **settings))}
    monkeypatch.setattr(launch, "subprocess", type("Own", (), dict(vars(subprocess)) | own))
    assert main(["--out", str(tmp_path)]) == 1, "it is free once that has ended"


def composed_with(monkeypatch, **leaves) -> None:
    monkeypatch.setattr(command, "_composed", lambda options: {"actor": {"lr": 0.1, "layers": [1, 2]} | leaves})


def test_a_folder_of_another_configuration_is_refused(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command, "run_trainer", lambda plan, *_, lock: ran.append(plan))
    monkeypatch.setattr(command, "report", lambda options: "")
    for leaves in ({}, {}, {"lr": 0.2}, {"new": 1}):
        composed_with(monkeypatch, **leaves)
        main(["--out", str(tmp_path)])
    assert len(ran) == 2, "the same configuration goes on"
    said = capsys.readouterr().err
    assert "has a bench with actor.lr=0.1, where it is 0.2 now" in said
    assert "has a bench with actor.new=None, where it is 1 now" in said


def test_measurements_without_their_states_are_not_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_trainer", lambda *_, lock: pytest.fail("would have removed all records"))
    composed_with(monkeypatch)
    Records(tmp_path / "records.jsonl").append(step("none", 0, 1))
    assert main(["--out", str(tmp_path)]) == 2
    assert "no longer the states/" in capsys.readouterr().err
    assert len(Records(tmp_path / "records.jsonl").read()) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("critic.enable=true", "would share the critic"),
        ("algorithm.use_kl_in_reward=true algorithm.kl_ctrl.type=adaptive", "would share the controller"),
    ],
)
def test_what_arms_would_share_is_refused(tmp_path, capsys, override, says):
    overrides = [word for one in override.split() for word in ("--override", one)]
    assert main(["--quick", "--out", str(tmp_path), *overrides]) == 2
    assert says in capsys.readouterr().err


def test_a_run_that_says_something_is_not_ended(tmp_path, monkeypatch):
    """Its first step may take longer than `--silence`; its log tells that it lives."""
    said = []

    def say() -> None:
        said.append(".")
        (tmp_path / LOG).write_text("".join(said))

    child = SimpleNamespace(pid=1, returncode=0, poll=lambda: None if len(said) < 8 else 0)
    own = {"Popen": staticmethod(lambda arguments, **settings: child)}
    monkeypatch.setattr(launch, "subprocess", type("Own", (), dict(vars(subprocess)) | own))
    monkeypatch.setattr(command, "report", lambda options: "")
    pass_minutes(monkeypatch, say)
    composed_with(monkeypatch)
    assert main(["--out", str(tmp_path), "--silence", "6"]) == 0
    assert len(said) * 4 > 2 * 6, "minutes"


def test_a_gpu_gets_its_platform(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert options_of(["--testbed", "depth"]).plan.overrides == ["testbed=depth"]
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    assert options_of(["--testbed", "depth"]).plan.overrides == ["platform=gpu", "testbed=depth"]
