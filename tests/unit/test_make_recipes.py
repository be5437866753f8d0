"""recipe/darts/run_*.sh are what scripts/make_recipes.py makes of its table and the template: no copy drifts apart.
And what a preset decides, none of them sets beside it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from darts.config import PRESETS, DartsConfig
from darts.simulation.options import block_of
from darts.strategy import make_strategy

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "run_qwen2.5_14b_dapo.sh"


def run(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "scripts" / "make_recipes.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture
def folder(tmp_path):
    """A copy of the scripts, with what makes them beside it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "make_recipes.py", tmp_path / "scripts")
    return Path(shutil.copytree(ROOT / "recipe" / "darts", tmp_path / "recipe" / "darts"))


@pytest.fixture
def darts_of(tmp_path):
    """What a script, run with a stub in the place of Python, sets of the block `darts:`."""
    stub, out = tmp_path / "python", tmp_path / "arguments"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {out}\n")
    stub.chmod(0o755)

    def settings(script: str, **knobs: str) -> DartsConfig:
        environment = {key: os.environ[key] for key in ("PATH", "HOME")} | {"PYTHON": str(stub)} | knobs
        command = ["bash", str(ROOT / "recipe" / "darts" / script)]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=600)
        words = [word.split("=", 1) for word in out.read_text().split("\0") if word.startswith("darts.")]
        values = [f"{key}={json.dumps(yaml.safe_load(value))}" for key, value in words]
        return DartsConfig.from_block(block_of(values), group_size=8)

    return settings


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("run_*.sh")}


def test_the_scripts_are_up_to_date_and_say_in_line_2_what_makes_them():
    result = run(ROOT, "--check")
    assert result.returncode == 0, result.stderr
    second_lines = [text.splitlines()[1] for text in texts(ROOT / "recipe" / "darts").values()]
    assert len(second_lines) >= 18
    assert all("scripts/make_recipes.py" in line for line in second_lines)


def test_what_differs_is_missing_or_in_no_table_is_found(folder, tmp_path):
    before = texts(folder)
    changed, missing, unknown = "run_qwen2.5_32b_dapo.sh", "run_qwen2.5_3b_math_baseline.sh", "run_unknown.sh"
    (folder / changed).write_text(before[changed].replace("strategy=fsdp2", "strategy=fsdp"))
    (folder / missing).unlink()
    (folder / unknown).write_text(before[changed])
    result = run(tmp_path, "--check")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{changed}, {missing}, {unknown}: not what")
    (folder / unknown).unlink()
    assert run(tmp_path).returncode == 0
    assert texts(folder) == before


def test_a_change_of_the_template_reaches_every_recipe(folder, tmp_path):
    template = folder / TEMPLATE
    template.write_text(
        template.read_text().replace("TOTAL_STEPS:-500", "TOTAL_STEPS:-400").replace("8 * NNODES", "4 * NNODES")
    )
    assert run(tmp_path, "--check").returncode == 1
    assert run(tmp_path).returncode == 0
    assert all("4 * NNODES" in text for name, text in texts(folder).items() if "_baseline" not in name)


def test_a_change_that_has_lost_its_place_is_an_error_and_writes_nothing(folder, tmp_path):
    template = folder / TEMPLATE
    template.write_text(template.read_text().replace("${ULYSSES:-4}", "4"))
    before = texts(folder)
    result = run(tmp_path)
    assert result.returncode == 1
    assert "'ULYSSES' has 0 places in run_qwen2.5_14b_dapo.sh" in result.stderr
    assert texts(folder) == before


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "recipe" / "darts").glob("run_*[a-z0-9].sh")))
def test_a_recipe_takes_a_preset_which_decides_what_is_not_set(script, darts_of):
    if script.endswith("_baseline.sh"):
        assert not darts_of(script, PRESET="fast").enable
        return
    assert darts_of(script) == darts_of(script, PRESET="paper")
    for preset in PRESETS:
        assert darts_of(script, PRESET=preset) == replace(
            DartsConfig.from_block({"preset": preset}, group_size=8),
            reward=darts_of(script).reward,  # a slow one is scored as responses end
        )


def test_a_knob_that_is_set_beside_a_preset_wins(darts_of):
    knobs = {"MEAN_CANDIDATES": "9", "SPARE_PROMPTS": "0.1", "BYPASS": "False", "LONG_WAIT": "none"}
    darts = darts_of(TEMPLATE, PRESET="fast", **knobs)
    assert (darts.allocation.mean_candidates, darts.spare_prompts, darts.bypass) == (9, 0.1, False)
    assert (darts.selection.long_end, darts.selection.long_wait) == ("cut", "none")
    paper = darts_of(TEMPLATE, ALLOCATION="uniform", LONG_END="truncated", SELECTION="dual_end")
    assert (paper.allocation.mode, paper.selection.mode) == ("uniform", "dual_end")
    assert (paper.selection.long_end, paper.selection.long_wait) == ("truncated", "all")


def test_what_is_compared_with_stays_what_it_is_whatever_the_preset(darts_of):
    for strategy in ("none", "bypass", "shortest_k", "tail_batching", "sorted"):
        rules = [make_strategy(darts_of(TEMPLATE, STRATEGY=strategy, PRESET=preset), 8).rules for preset in PRESETS]
        assert rules[0] == replace(rules[1], preset=rules[0].preset)
