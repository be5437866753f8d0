"""Runs are checked here as on a machine for GPUs."""

import pytest

from darts import checks


@pytest.fixture(autouse=True)
def flash_attention_is_installed(monkeypatch):
    """What verl's default attention needs, and CPU machines do not have."""
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
