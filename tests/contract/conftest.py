"""Runs are checked as on a machine with flash-attn, and composed a sixth faster."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hydra._internal.config_repository import ConfigRepository

from darts.checks import run as checks

READ: dict = {}


@pytest.fixture(autouse=True)
def flash_attention_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())


@pytest.fixture(autouse=True, scope="module")
def files_are_read_once() -> Iterator[None]:
    """Hydra reads verl's thirty files anew for each of hundreds of configurations."""
    read = ConfigRepository.load_config

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        key = (config_path, *(source.full_path() for source in self.sources))
        if key not in READ:
            READ[key] = read(self, config_path)
        return copy.deepcopy(READ[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        yield
