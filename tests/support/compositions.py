"""Compositions without the reading: Hydra parses verl's thirty files anew for each of hundreds of configurations."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig, OmegaConf

from darts import CONFIG_DIR

_files: dict[tuple[str, ...], bytes] = {}


@contextmanager
def files_read_once() -> Iterator[None]:
    """Hydra gets a copy of what was read before; copies by pickle are made in a fifth of deepcopy's time."""
    read = ConfigRepository.load_config

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        key = (config_path, *(source.full_path() for source in self.sources))
        if key not in _files:
            _files[key] = pickle.dumps(read(self, config_path))
        return pickle.loads(_files[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        yield


@cache
def _composed(of_verl: bool, name: str, overrides: tuple[str, ...]) -> bytes:
    if of_verl:
        source = initialize_config_module("verl.trainer.config", version_base=None)
    else:
        source = initialize_config_dir(str(CONFIG_DIR), version_base=None)
    with files_read_once(), source:
        config = compose(name, overrides=list(overrides))
    OmegaConf.resolve(config)
    return pickle.dumps(config)


def composed(name: str, *overrides: str) -> DictConfig:
    """A resolved configuration of the project, made once for the same overrides."""
    return pickle.loads(_composed(False, name, overrides))


def composed_by_verl(*overrides: str) -> DictConfig:
    """The same of verl's own `ppo_trainer`."""
    return pickle.loads(_composed(True, "ppo_trainer", overrides))
