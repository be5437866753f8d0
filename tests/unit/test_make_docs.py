"""docs/configuration.md, the block `darts:` and the tables of docs/results.md are what scripts/make_docs.py makes."""

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
RESULTS = ROOT / "docs" / "results.md"
DOCUMENTS = sorted((ROOT / "docs" / "results").glob("*.json"))


def run(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=600)


def test_all_files_are_up_to_date():
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_most_tables_of_measurements_are_made():
    page = RESULTS.read_text()
    assert page.count("<!-- table: ") == page.count("<!-- /table -->") == 20
    assert set(re.findall(r"<!-- table: (\S+) ", page)) == {path.stem for path in DOCUMENTS}


def test_files_that_differ_are_found(tmp_path):
    texts = {path: path.read_text() for path in (SCRIPT, PAGE, BASE, RESULTS, *DOCUMENTS)}
    texts[RESULTS] = "".join(texts[RESULTS].partition("<!-- /table -->")[:2]) + "\n"  # one table is enough
    copies = {path: tmp_path / path.relative_to(ROOT) for path in texts}
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(texts[path])
    changes = {PAGE: (r"\[lambda\]", "[mu]"), BASE: (r"1\.25", "1.5"), RESULTS: (r"\| 90 \| \d", "| 90 | x")}
    for changed, (old, new) in changes.items():
        changed_text, found = re.subn(old, new, texts[changed])
        assert found
        copies[changed].write_text(changed_text)
    result = run("--check", script=copies[SCRIPT])
    assert result.returncode == 1
    assert result.stdout.count(": differs") == 3
    assert run(script=copies[SCRIPT]).returncode == 0
    assert all(copy.read_text() == texts[path] for path, copy in copies.items())


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
