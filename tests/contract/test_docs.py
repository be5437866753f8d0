"""docs/*.md and their kin: the Hydra overrides of every command compose to a valid block `darts:`, and the keys of verl
that are named exist. What needs no verl is in `tests/unit/test_docs.py`."""

import os
import re
import subprocess
from string import Template

import compositions
import pytest
from documents import ENTRY_POINT, PAGES, ROOT, commands_of, environment_and_words, recipes, text_of, write_example
from omegaconf import DictConfig, OmegaConf
from verl.checkpoint_engine import CheckpointEngineRegistry

import recipe.darts.main_darts  # noqa: F401  (registers the resolver that configurations use)
from darts.checks.placement import choose_backend
from darts.checks.run import check_run, darts_config, refuse_unknown_overrides
from darts.config import DartsConfig
from darts.strategy import make_strategy
from darts.testbed import assets_dir

EXISTING = str(assets_dir("overthink") / "model")
FILES = {"MODEL_PATH": EXISTING, "TRAIN_FILES": EXISTING, "VAL_FILES": EXISTING}
HYDRA = (ENTRY_POINT, "darts.latency", "scripts/quickstart.sh", *recipes())
COMMANDS = [
    pytest.param(command, id=f"{page.name}: {' '.join(command)}")
    for page, command in commands_of(PAGES)
    if set(HYDRA) & set(command)
]


@pytest.fixture
def arguments_of(tmp_path):
    """What a command hands to Hydra: a script is run, with a stub in the place of Python."""
    stub, out = tmp_path / "python", tmp_path / "arguments"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {out}\n")
    stub.chmod(0o755)

    def arguments(command: list[str]) -> list[str]:
        environment, words = environment_and_words(command)
        if words[1] in recipes():
            inherited = {key: os.environ[key] for key in ("PATH", "HOME")}
            given = [word for word in words[2:] if word != "..."]
            done = subprocess.run(
                ["bash", str(ROOT / words[1]), *given],
                env=inherited | {"PYTHON": str(stub)} | FILES | environment,
                cwd=tmp_path, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return out.read_text().split("\0")[2:-1]
        if words[1] == "scripts/quickstart.sh":
            return ["--config-name", "quickstart", *words[2:]]
        return words[3:] if words[2] == ENTRY_POINT else words[4:]

    return arguments


def composed(arguments: list[str]) -> DictConfig:
    """As the entry point composes it."""
    name = arguments[arguments.index("--config-name") + 1] if "--config-name" in arguments else "darts_trainer"
    overrides = [word.replace("...", EXISTING) for word in arguments if "=" in word]
    refuse_unknown_overrides(overrides)
    return compositions.composed(name, *overrides)


def test_there_are_commands():
    assert len(COMMANDS) > 15
    assert len(RUNGS) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_overrides_compose(command, arguments_of, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_example(tmp_path)
    config = composed(arguments_of(command))
    darts = darts_config(config)
    assert isinstance(darts, DartsConfig)
    if darts.enable:
        assert make_strategy(darts, config.data.train_batch_size).next_round().new > 0


RUNGS = re.findall(r"bash scripts/quickstart\.sh((?:[^`'\n\\]|\\\n)*)", text_of("docs/smoke.md"))


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("rung", [" ".join(rung.replace("\\\n", " ").split()) for rung in RUNGS if "$" in rung])
def test_rungs_of_the_first_hour_are_valid_on_nodes_with_gpus(rung, gpus, monkeypatch):
    sizes = {"GPUS": gpus, "GPUS_PER_NODE": gpus, "HALF": gpus // 2, "NNODES": 2}
    words = Template(rung).substitute(sizes).split()
    config = composed(["--config-name", "quickstart", "platform=gpu", *words])
    monkeypatch.setitem(CheckpointEngineRegistry._registry, "nccl", object)  # as where cupy is installed
    choose_backend(config)
    check_run(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_of_verl_that_is_named_exists(page, defaults):
    """But for what the recipes add."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    sections = "actor_rollout_ref|algorithm|data|reward|trainer|skip|ray_kwargs"
    keys = set(re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", text))
    assert [key for key in keys if not has(defaults, key)] == []


@pytest.fixture(scope="module")
def defaults():
    return composed(["+recipe=dapo"])


def has(config: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    block = OmegaConf.select(config, section)
    return isinstance(block, DictConfig) and name in block
