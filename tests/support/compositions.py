"""Quick compositions: Hydra reads and merges verl's thirty files anew for each of hundreds of configurations."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig, OmegaConf

from darts import CONFIG_DIR

_known: dict[tuple[str, ...], bytes] = {}


def _copy_of(key: tuple[str, ...], make: Callable[[], Any]) -> Any:
    """What was made for the key; copies by pickle take a fifth of deepcopy's time."""
    if key not in _known:
        _known[key] = pickle.dumps(make())
    return pickle.loads(_known[key])


@contextmanager
def files_merged_once() -> Iterator[None]:
    """Hydra reads a file once, and merges the same files once; values that are overridden come after that."""
    read, merge = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        key = (config_path, *(source.full_path() for source in self.sources))
        return _copy_of(key, lambda: read(self, config_path))

    def merge_defaults(self: ConfigLoaderImpl, defaults: list[Any], repo: ConfigRepository) -> Any:
        key = (*map(repr, defaults), *(source.full_path() for source in repo.get_sources()))
        return _copy_of(key, lambda: merge(self, defaults=defaults, repo=repo))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_defaults)
        yield


@cache
def _composed(of_verl: bool, name: str, overrides: tuple[str, ...]) -> bytes:
    if of_verl:
        source = initialize_config_module("verl.trainer.config", version_base=None)
    else:
        source = initialize_config_dir(str(CONFIG_DIR), version_base=None)
    with files_merged_once(), source:
        config = compose(name, overrides=list(overrides))
    OmegaConf.resolve(config)
    return pickle.dumps(config)


def composed(name: str, *overrides: str) -> DictConfig:
    """A resolved configuration of the project, made once for the same overrides."""
    return pickle.loads(_composed(False, name, overrides))


def composed_by_verl(*overrides: str) -> DictConfig:
    """The same of verl's own `ppo_trainer`."""
    return pickle.loads(_composed(True, "ppo_trainer", overrides))
