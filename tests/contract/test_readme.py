"""README: about a page, the output that it shows is the summary's, its table of keys is the configuration's. Links and
commands: `tests/unit/test_docs.py`, `tests/contract/test_docs.py`."""

import re

import pandas as pd
import pytest
import yaml
from compositions import composed
from documents import ROOT, text_of
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that quickstart.yaml uses)
from darts import CONFIG_DIR
from darts.checks.run import check_run
from darts.metrics import METRICS
from darts.report.summary import summarise
from darts.testbed import assets_dir

README = text_of("README.md")
EXISTING = str(assets_dir("overthink") / "model")


def test_readme_is_about_a_page():
    assert len(README.splitlines()) < 130


@pytest.mark.parametrize("page", ["README.md", "recipe/darts/README.md"])
def test_the_command_for_ones_own_model_is_all_that_is_needed(page):
    """Every command of the entry point is valid for verl and DARTS as it stands, `...` filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.split("#")[0].split() for line in lines if "-m recipe.darts.main_darts" in line]
    assert commands
    for words in commands:
        name = words[words.index("--config-name") + 1] if "--config-name" in words else "darts_trainer"
        overrides = [word.replace("...", EXISTING) for word in words if "=" in word]
        if page != "README.md" and name == "darts_trainer":  # what verl wants besides is the README's
            overrides.append("actor_rollout_ref.actor.use_dynamic_bsz=True")
        config = composed(name, *overrides)
        check_run(config)
        validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_expected_output_has_the_rows_that_the_summary_prints():
    shown = re.search(r"```\nSummary of the run\n(.*?)```", README, flags=re.S).group(1)
    step = dict.fromkeys(METRICS, 1.0) | {"timing_s/step": 1.0, "timing_s/gen": 1.0}
    printed = summarise(pd.DataFrame([step]), [0.5], 0.1)
    assert [line[:24] for line in shown.splitlines()] == [line[:24] for line in printed.splitlines()]


def test_paths_in_comments_of_configurations_exist():
    for path in CONFIG_DIR.rglob("*.yaml"):
        for name in re.findall(r"\b((?:tests|docs|darts|verl_patches|configs|scripts)/[\w./]+\.\w+)", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_keys_in_the_table_have_their_defaults():
    block = yaml.safe_load((CONFIG_DIR / "darts_base.yaml").read_text())["darts"]
    rows = re.findall(r"^\| `(darts\.[\w.]+)`(?:, `\.\w+`)? \|[^|]*\| (\S+) \|", README, flags=re.M)
    assert len(rows) > 8
    for key, default in rows:
        value = block
        for name in key.split(".")[1:]:
            value = value[name]
        assert default == ("null" if value is None else str(value).lower()), key
