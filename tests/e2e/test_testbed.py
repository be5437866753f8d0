"""The testbeds have the properties that the benchmark needs, measured on 2,560 responses a class."""

import subprocess
import sys

import pytest

from darts.testbed import LIMITS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(20000)]


@pytest.mark.parametrize("name", LIMITS)
def test_measured_bounds_hold(name):
    result = subprocess.run(
        [sys.executable, "-m", "darts.testbed.measure", "--testbed", name], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
