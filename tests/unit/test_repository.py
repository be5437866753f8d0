"""Rules of the repository that no linter knows: borders between the rings, packaging, files for people and machines."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 500
ENTRY_POINTS = {
    "verl.plugins": {"darts": "verl_patches.register"},
    "vllm.general_plugins": {"darts": "verl_patches.vllm_plugin:register"},
}


def repository_files() -> list[Path]:
    """What git tracks or would track; outside a git checkout, everything but hidden and built folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if run is not None and run.returncode == 0:
        paths = [ROOT / name for name in run.stdout.split("\0") if name]
        return [path for path in paths if path.is_file()]
    built = {"__pycache__", "outputs", "build", "dist"}
    paths = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in built]
        paths += [Path(folder) / name for name in names]
    return paths


FILES = repository_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- code ------------------------------------------------------------------------------------------------------------


def test_every_python_file_is_under_500_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in PYTHON_FILES}
    assert {name: lines for name, lines in lengths.items() if lines >= MAX_LINES} == {}


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, also those inside functions."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
    return packages


def test_the_oldest_python_that_is_promised_has_all_that_the_code_uses(pyproject) -> None:
    oldest = re.match(r">=(3\.\d+)", pyproject["project"]["requires-python"])[1]
    command = [Path(sys.executable).with_name("vermin"), f"-t={oldest}-", "--violations", "--no-tips"]
    command += ["darts", "verl_patches", "recipe", "scripts"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("package", ["recipe", "tests", "scripts"])
def test_shared_names_stay_namespaces(package: str) -> None:
    """verl's wheel installs `tests` and `scripts`, and other recipes live in `recipe`: ours must not shadow them."""
    assert not (ROOT / package / "__init__.py").exists()


def test_nothing_imports_our_tests_or_scripts() -> None:
    offenders = {
        name_of(path): found for path in PYTHON_FILES if (found := imported_packages(path) & {"tests", "scripts"})
    }
    assert offenders == {}


# --- packaging -------------------------------------------------------------------------------------------------------


def test_entry_points_are_declared(pyproject: dict) -> None:
    assert pyproject["project"]["entry-points"] == ENTRY_POINTS


def test_installed_entry_points_are_the_declared_ones() -> None:
    try:
        installed = distribution("verl-darts").entry_points
    except PackageNotFoundError:
        pytest.skip("verl-darts is not installed: run scripts/setup.sh")
    for group, points in ENTRY_POINTS.items():
        assert {point.name: point.value for point in installed.select(group=group)} == points


def test_only_our_packages_are_in_the_wheel(pyproject: dict) -> None:
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "packages" not in wheel, "it would rename recipe/darts to darts, on top of the other one"
    assert "force-include" not in wheel, "it would copy files into site-packages also in an editable install"
    assert set(wheel["only-include"]) == {"darts", "verl_patches", "recipe/darts", "configs"}
    assert wheel["sources"] == {"configs": "darts/configs"}


# --- files for people and machines -----------------------------------------------------------------------------------


def test_citation_names_the_paper_and_the_version(pyproject: dict) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == pyproject["project"]["version"]
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("DARTS: Distribution-Aware Active Rollout Trajectory Shaping")
    assert paper["url"].endswith("2605.30859")


def test_license_is_apache_2(pyproject: dict) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert pyproject["project"]["license"] == "Apache-2.0"


def shell_scripts() -> list[Path]:
    return [path for path in FILES if path.suffix == ".sh"] + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", shell_scripts(), ids=name_of)
def test_shell_scripts_parse(script: Path) -> None:
    run = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["scripts/setup.sh", "scripts/test.sh", ".ci/run"])
def test_commands_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    """No home folders, no working folders, no hosts of package registries."""
    folders = ("home", "root", "Users", "workspace", "work", "data1", "mnt")
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org")
    machine = re.compile(rf"(?<![\w.$}}/-])/(?:{'|'.join(folders)})/\w|" + "|".join(map(re.escape, hosts)))
    found = []
    for path in FILES:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{name_of(path)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if machine.search(line)
        ]
    assert found == []
