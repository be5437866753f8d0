"""README: every path exists, every command is one that runs, the table of keys is the configuration."""

import re
import shlex

import pytest
import yaml
from hydra import compose, initialize_config_dir
from jobs import ROOT
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that quickstart.yaml uses)
from darts import CONFIG_DIR
from darts.checks import check_run
from darts.metrics import METRICS
from darts.summary import summarise
from darts.testbed import assets_dir

README = (ROOT / "README.md").read_text()
RECIPE = (ROOT / "recipe" / "darts" / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
] + re.findall(r"`(bash scripts/[^`]+)`", README)


EXISTING = str(assets_dir("overthink") / "model")


def test_readme_is_about_a_page():
    assert len(README.splitlines()) < 140


def test_the_commands_are_the_ones_that_are_tested():
    """quickstart.sh: tests/e2e/test_quickstart.py. test.sh, setup.sh: this run. main_darts: composed below."""
    programs = {command.split()[1] for command in COMMANDS if command.startswith("bash ")}
    assert programs == {"scripts/quickstart.sh", "scripts/test.sh", "scripts/setup.sh"}
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "bash" or words[:3] == [".venv/bin/python", "-m", "recipe.darts.main_darts"], command
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), command


@pytest.mark.parametrize("command", [c for c in COMMANDS if "main_darts" in c or "quickstart.sh " in c])
def test_overrides_in_commands_compose(command):
    words = shlex.split(command)
    name = "quickstart" if words[0] == "bash" else "darts_trainer"
    overrides = [word.replace("...", EXISTING) for word in words if "=" in word]
    assert overrides
    compose_and_check(name, overrides)


@pytest.mark.parametrize("command", re.findall(r"^python -m recipe.darts.main_darts (.*)$", RECIPE, flags=re.M))
def test_commands_of_the_recipe_compose(command):
    words = shlex.split(command.split("#")[0].replace("...", EXISTING))
    primary = words[1] if words[0] == "--config-name" else "darts_trainer"
    overrides = [word for word in words if "=" in word]
    if primary == "darts_trainer":  # what verl wants besides is the README's
        overrides.append("actor_rollout_ref.actor.use_dynamic_bsz=True")
    compose_and_check(primary, overrides)


def compose_and_check(name: str, overrides: list[str]) -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = compose(name, overrides=overrides)
    OmegaConf.resolve(config)
    check_run(config)
    validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_expected_output_has_the_rows_that_the_summary_prints():
    shown = re.search(r"```\nSummary of the run\n(.*?)```", README, flags=re.S).group(1)
    step = dict.fromkeys(METRICS, 1.0) | {"timing_s/step": 1.0, "timing_s/gen": 1.0}
    printed = summarise([step], [0.5], 0.1)
    assert [line[:24] for line in shown.splitlines()] == [line[:24] for line in printed.splitlines()]


def test_paths_in_comments_of_configurations_exist():
    for path in CONFIG_DIR.rglob("*.yaml"):
        for name in re.findall(r"\b((?:tests|docs|darts|verl_patches|configs|scripts)/[\w./]+\.\w+)", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_every_file_that_is_named_exists():
    names = set(re.findall(r"`((?:darts|verl_patches|recipe|configs|docs|scripts|tests)/[\w./-]*)`", README))
    names |= set(re.findall(r"\]\((?!http)([^)]+)\)", README))
    assert len(names) > 8
    missing = [name for name in names if not (ROOT / name).exists() and name not in METRICS]
    assert missing == []


def test_every_key_of_the_block_is_in_the_table():
    block = yaml.safe_load((CONFIG_DIR / "darts_base.yaml").read_text())["darts"]
    keys = {
        f"darts.{name}" if not isinstance(value, dict) else f"darts.{name}.{key}"
        for name, value in block.items()
        for key in (value if isinstance(value, dict) else [None])
    }
    table = "".join(line for line in README.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(darts\.[\w.]+)`", table))
    named |= {f"{section}.{key}" for section, key in re.findall(r"`(darts\.\w+)\.\w+`, `\.(\w+)`", table)}
    assert named == keys
