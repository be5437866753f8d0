"""All ways to an environment install the same: pyproject.toml has the versions, the others name its extras."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r"(?:==|>=|~=|<)\s*\d")
"""Of a package: these stand in pyproject.toml alone."""


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def extras(project) -> dict[str, dict[str, Requirement]]:
    """The requirements of each extra, verl's lines joined."""
    found: dict[str, dict[str, Requirement]] = {}
    for name, lines in project["optional-dependencies"].items():
        found[name] = {requirement.name: requirement for requirement in map(Requirement, lines)}
        assert len(found[name]) == len(lines), f"{name} names a package twice"
    return found


@pytest.fixture(scope="module")
def conda() -> list:
    text = (ROOT / "env.yml").read_text()
    assert len(text.splitlines()) < 25
    return yaml.safe_load(text)["dependencies"]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]
    known = {"FROM", "RUN", "ENV", "ARG", "WORKDIR", "USER", "COPY", "CMD"}
    assert {instruction for instruction, _ in found} <= known
    return found


def arguments(dockerfile: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in dockerfile if name == instruction]


def environment(dockerfile: list[tuple[str, str]]) -> dict[str, str]:
    pairs = [pair for rest in arguments(dockerfile, "ENV") for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def python_of(conda: list) -> str:
    (python,) = (entry for entry in conda if str(entry).startswith("python="))
    return python.removeprefix("python=")


# --- what is installed -----------------------------------------------------------------------------------------------


def test_gpu_extra_repeats_the_pins_of_verl(extras) -> None:
    try:
        lines = [Requirement(line) for line in distribution("verl").requires or []]
    except PackageNotFoundError:
        pytest.skip("verl is not installed: run scripts/setup.sh")
    pins = {
        line.name: line.specifier
        for line in lines
        for extra in extras["gpu"]["verl"].extras
        if line.marker and line.marker.evaluate({"extra": extra}) and not line.marker.evaluate({"extra": ""})
    }
    ours = {name: requirement.specifier for name, requirement in extras["gpu"].items() if name != "verl"}
    assert ours == {name: pins.get(name) for name in ours}
    assert "cupy-cuda13x" in pins, "darts.placement=disaggregated sends weights with it"


def test_every_extra_of_verl_exists_and_is_of_the_verl_that_is_asked_for(project, extras) -> None:
    (verl,) = (line for line in map(Requirement, project["dependencies"]) if line.name == "verl")
    named = [lines["verl"] for lines in extras.values() if "verl" in lines]
    assert {str(line.specifier) for line in named} == {str(verl.specifier)}
    try:
        known = set(distribution("verl").metadata.get_all("Provides-Extra"))
    except PackageNotFoundError:
        pytest.skip("verl is not installed: run scripts/setup.sh")
    assert set().union(*(line.extras for line in named)) <= known


def test_what_is_compiled_against_torch_is_for_the_torch_of_the_gpu_extra(extras) -> None:
    (pin,) = extras["gpu"]["torch"].specifier
    major, minor, _ = pin.version.split(".")
    (flash,) = extras["flash-attn"]["verl"].extras
    assert flash.endswith(f"torch{major}{minor}")
    assert cuda_of(extras) == re.fullmatch(r"flash-attn-cu(\d+)torch\d+", flash).group(1)


def cuda_of(extras: dict) -> str:
    """The CUDA that the extras are for, e.g. `130`."""
    (cupy,) = (name for name in extras["gpu"]["verl"].extras if name.startswith("cupy"))
    return cupy.removeprefix("cupy-cu")


# --- env.yml ---------------------------------------------------------------------------------------------------------


def test_conda_installs_what_the_set_up_installs(project, conda) -> None:
    assert SpecifierSet(project["requires-python"]).contains(python_of(conda))
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    (line,) = pip
    extras = re.fullmatch(r"-e \.\[(.+)\]", line).group(1)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert f'--editable ".[{extras.replace("gpu", "$DEVICE")}]"' in (ROOT / "scripts" / "setup.sh").read_text()
    assert not [entry for entry in conda if VERSION.search(str(entry))]


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def test_the_image_has_the_cuda_of_the_wheels(dockerfile, extras) -> None:
    (base,) = arguments(dockerfile, "FROM")
    major, minor = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-devel-ubuntu[\d.]+", base).groups()
    assert major + minor == cuda_of(extras)


def test_the_image_is_made_by_the_set_up_for_the_python_of_conda(dockerfile, conda) -> None:
    assert any("bash scripts/setup.sh" in run for run in arguments(dockerfile, "RUN"))
    variables = environment(dockerfile)
    assert variables["DARTS_DEVICE"] == "gpu"
    assert variables["DARTS_PYTHON"] == python_of(conda)
    (folder,) = arguments(dockerfile, "WORKDIR")
    assert variables["PATH"].startswith(f"{folder}/.venv/bin:")
    assert not [run for run in arguments(dockerfile, "RUN") if VERSION.search(run)], "versions are pyproject.toml's"


def test_the_image_installs_extras_that_exist(project, dockerfile) -> None:
    named = {
        extra
        for run in arguments(dockerfile, "RUN")
        for part in re.findall(r"\.\[(.+?)\]", run)
        for extra in part.split(",")
    }
    assert named == {"gpu", "flash-attn"}
    assert named <= set(project["optional-dependencies"])


def test_the_image_does_not_run_as_root(dockerfile) -> None:
    (user,) = arguments(dockerfile, "USER")
    assert user != "root"
    assert any(
        f"useradd --create-home --home-dir /opt/{user} --uid 10001 {user}" in run
        for run in arguments(dockerfile, "RUN")
    )
    assert environment(dockerfile)["HOME"] == f"/opt/{user}"
    copies = arguments(dockerfile, "COPY")
    assert copies
    assert all(copy.startswith(f"--chown={user}:{user} ") for copy in copies)


def test_the_image_copies_and_runs_what_is_there(dockerfile) -> None:
    for copy in arguments(dockerfile, "COPY"):
        *sources, _ = (part for part in copy.split() if not part.startswith("--"))
        assert all((ROOT / source).exists() for source in sources)
    for run in arguments(dockerfile, "RUN"):
        assert all((ROOT / script).is_file() for script in re.findall(r"scripts/\w+\.sh", run))
    (command,) = arguments(dockerfile, "CMD")
    assert yaml.safe_load(command) == ["python", "-m", "darts.doctor"]


def test_shell_lines_of_the_image_parse(dockerfile) -> None:
    for run in arguments(dockerfile, "RUN"):
        shell = re.sub(r"^(--\S+\s+)+", "", run)
        assert subprocess.run(["sh", "-n", "-c", shell], capture_output=True).returncode == 0, shell


def test_the_image_takes_nothing_that_git_leaves_out() -> None:
    """`.dockerignore` looks at the top folder alone unless a pattern starts with `**/`."""

    def patterns(name: str) -> set[str]:
        lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
        return {line.removeprefix("**/").rstrip("/") for line in lines if line and not line.startswith("#")}

    assert patterns(".dockerignore") == patterns(".gitignore") | {".git"}
    everywhere = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")}
    assert {"**/__pycache__", "**/*.py[cod]", "**/*.log"} <= everywhere
