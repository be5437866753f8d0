"""recipe/darts/run_*.sh are what scripts/make_recipes.py makes of its table and the template: no copy drifts apart."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
