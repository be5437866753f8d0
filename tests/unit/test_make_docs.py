"""docs/configuration.md and the block `darts:` are what scripts/make_docs.py makes of the definitions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from darts.config import SECTIONS, DartsConfig, help_of, keys_of, taken_by

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_docs.py"
PAGE = ROOT / "docs" / "configuration.md"
BASE = ROOT / "configs" / "darts_base.yaml"


def run(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=600)


def test_both_files_are_up_to_date():
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("changed", [PAGE, BASE], ids=["page", "yaml"])
@pytest.mark.parametrize(("word", "other"), [("[lambda]", "[mu]"), ("1.25", "1.5")], ids=["help", "default"])
def test_a_file_that_differs_is_found(tmp_path, changed, word, other):
    copies = {path: tmp_path / path.relative_to(ROOT) for path in (SCRIPT, PAGE, BASE)}
    for path, copy in copies.items():
        copy.parent.mkdir()
        copy.write_text(path.read_text())
    assert word in changed.read_text()
    copies[changed].write_text(changed.read_text().replace(word, other))
    result = run("--check", script=copies[SCRIPT])
    assert result.returncode == 1
    assert f"{changed.name}: differs" in result.stdout
    assert run(script=copies[SCRIPT]).returncode == 0
    assert all(copy.read_text() == path.read_text() for path, copy in copies.items())


def test_every_key_has_a_row():
    keys = {f"darts.{name}" for name in DartsConfig.__dataclass_fields__ if name not in {"group_size", *SECTIONS}}
    keys |= {f"darts.{name}.{part}" for name, kind in SECTIONS.items() for part in kind.__dataclass_fields__}
    assert set(re.findall(r"^\| `(darts\.[\w.]+)` \|", PAGE.read_text(), flags=re.M)) == keys


@pytest.mark.parametrize("kind", [DartsConfig, *SECTIONS.values()])
def test_every_key_says_in_words_what_it_takes_and_means(kind):
    for name, info in keys_of(kind).items():
        if name not in SECTIONS:
            assert taken_by(info)
            assert re.fullmatch(r"(\[.+\] )?[A-Z].+\.", help_of(info)), name
            assert help_of(info) in PAGE.read_text(), name


@pytest.mark.parametrize("folder", ["darts", "verl_patches", "recipe", "scripts"])
def test_every_variable_that_is_read_is_told_of(folder):
    internal = {"DARTS_TEST_RUN"}
    named = set(re.findall(r"DARTS_[A-Z_]+", PAGE.read_text())) | internal
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in {".py", ".sh", ".sbatch"}:
            assert set(re.findall(r"\bDARTS_[A-Z]+(?:_[A-Z]+)*\b", path.read_text())) <= named, path
