"""docs/figures/waits.png is what scripts/make_figure.py draws of a replay, whose figures the pages tell."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from darts.config import DartsConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_figure.py"


@pytest.fixture(scope="module")
def outcomes():
    """The rollouts that it draws, by the first word of their titles."""
    names = runpy.run_path(str(SCRIPT))
    return {
        title.split(":")[0]: names["rollout"](DartsConfig.from_block(block, names["GROUP_SIZE"]), num_spare)
        for title, block, num_spare in names["PANELS"]
    }


def test_it_draws_a_picture(tmp_path):
    out = tmp_path / "waits.png"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out)], check=True, timeout=600)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_page_tells_what_the_replay_gives(outcomes):
    plain, paper, fast = (outcomes[name] for name in ("plain verl", "paper", "fast"))
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    assert plain.seconds == paper.seconds == 2048
    assert f"after {plain.seconds:,.0f} decoding steps" in text
    assert f"after {fast.seconds:,.0f}, " in text
    for outcome in outcomes.values():
        assert f"{outcome.pool.length.sum():,}" in text
        assert outcome.pool.kept.sum() == 6 * 8


def test_the_hard_prompt_comes_late_and_one_response_is_cut(outcomes):
    assert outcomes["fast"].complete == [0, 2, 3, 4, 5, 6]
    assert outcomes["fast"].pool.cut.sum() == 1
