"""docs/configuration.md is what scripts/make_docs.py makes of the types, and says what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from darts.config import SECTIONS, DartsConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_docs.py"
PAGE = ROOT / "docs" / "configuration.md"


def run(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=60)


def test_the_page_is_up_to_date():
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_page_that_differs_is_found(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "scripts" / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    (tmp_path / "docs" / PAGE.name).write_text(PAGE.read_text().replace("lambda", "mu"))
    assert run("--check", script=script).returncode == 1
    assert run(script=script).returncode == 0
    assert (tmp_path / "docs" / PAGE.name).read_text() == PAGE.read_text()


def test_every_key_has_a_row():
    keys = {f"darts.{name}" for name in DartsConfig.__dataclass_fields__ if name not in {"group_size", *SECTIONS}}
    keys |= {f"darts.{name}.{part}" for name, kind in SECTIONS.items() for part in kind.__dataclass_fields__}
    assert set(re.findall(r"^\| `(darts\.[\w.]+)` \|", PAGE.read_text(), flags=re.M)) == keys


@pytest.mark.parametrize("folder", ["darts", "verl_patches", "recipe", "scripts"])
def test_every_variable_that_is_read_is_told_of(folder):
    internal = {"DARTS_TEST_RUN"}
    named = set(re.findall(r"DARTS_[A-Z_]+", PAGE.read_text())) | internal
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in {".py", ".sh", ".sbatch"}:
            assert set(re.findall(r"\bDARTS_[A-Z]+(?:_[A-Z]+)*\b", path.read_text())) <= named, path
