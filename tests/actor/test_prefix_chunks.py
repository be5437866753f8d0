"""The benchmark of the actor's forwards runs on a real engine, and its three ways agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_chunks_are_computed_once_and_without_a_cache_again_and_again(tmp_path):
    out = tmp_path / "chunks.json"
    sizes = ["--rows=2", "--prompt=8", "--response=40", "--chunk=16", "--repeats=1", "--dtype=fp32"]
    command = [sys.executable, "-m", "darts.bench", "actor", *sizes, f"--out={out}"]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = {record["arm"]: record for record in json.loads(out.read_text())["records"]}
    assert found["whole"]["tokens"] == 2 * 48
    assert found["chunks"]["tokens"] == 2 * 47, "the last token has no successor"
    assert found["again"]["tokens"] == 2 * (24 + 40 + 48)
    assert found["chunks"]["peak_bytes"] > found["again"]["peak_bytes"] == found["whole"]["peak_bytes"] == 0
    assert found["chunks"]["difference"] == pytest.approx(0, abs=1e-5)
    assert "| chunks |" in run.stdout
