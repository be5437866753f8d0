"""The rule of imports: pyproject.toml has its contracts, import-linter holds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS = {contract["name"].split()[0]: contract for contract in SETTINGS["contracts"]}
METHOD = {f"darts.{path.stem}" for path in (ROOT / "darts").glob("*.py")} - {"darts.__init__"}
FOLDERS = {f"darts.{path.parent.name}" for path in (ROOT / "darts").glob("*/__init__.py")}
HEAVY = {"ray", "vllm", "verl", "verl_patches", "torch", "omegaconf", "hydra", "transformers", "tensordict"}


def test_every_import_follows_the_contracts() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 kept, 0 broken" in run.stdout


def test_the_contracts_have_no_exceptions_and_forget_no_module() -> None:
    assert set(CONTRACTS) == {"Imports", "The", "verl_patches", "No"}
    assert not any("ignore_imports" in contract for contract in SETTINGS["contracts"])
    layers = {name for layer in CONTRACTS["Imports"]["layers"] for name in layer.replace("|", ":").split(":")}
    assert {name.strip() for name in layers} == METHOD | FOLDERS | {"verl_patches", "recipe.darts"}
    assert set(CONTRACTS["The"]["source_modules"]) == METHOD
    assert set(CONTRACTS["The"]["forbidden_modules"]) == HEAVY
    assert set(CONTRACTS["verl_patches"]["forbidden_modules"]) == (METHOD | FOLDERS) - {"darts.messages"}


def test_the_method_is_a_shelf_of_few_books() -> None:
    assert len(list((ROOT / "darts").glob("*.py"))) <= 17


def test_importing_the_method_and_the_simulator_loads_nothing_heavy() -> None:
    """The simulator plans for clusters on any laptop; import-linter does not see what a library imports."""
    modules = sorted(METHOD | {"darts.simulation.command"})
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        f"print(*sorted(set(sys.modules) & {HEAVY!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_every_folder_says_what_it_is(folder: str) -> None:
    text = (ROOT / folder.replace(".", "/") / "__init__.py").read_text()
    assert text.startswith('"""')
