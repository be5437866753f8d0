"""Local paths in a run's configuration: data, model, latency profile, and the folder of its checkpoints.

Contract: `settle_paths` makes them absolute, since verl reads them in processes that may have started in other folders,
and expands no `~`; `check_paths` raises one `ConfigError` (key, value, rule, fix) for what is not there or is no data.
Names of a hub (owner/name) and addresses (hdfs://...) are left to verl.
"""

import os
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from darts.checks.model import MODEL_KEY
from darts.config import ConfigError

READ = (
    "data.train_files", "data.val_files", MODEL_KEY, "critic.model.path", "darts.latency.profile",
    "trainer.resume_from_path",
)  # fmt: skip
MADE = "trainer.default_local_dir"
NO_PATHS = ("auto", "off")  # what the latency profile may be besides a path


def settle_paths(config: DictConfig) -> None:
    """Makes what is there absolute, and the folder of checkpoints, which a run makes. Other keys may be interpolations
    of these, so it comes before they are resolved."""
    for key in (*READ, MADE):
        value = OmegaConf.select(config, key)
        if isinstance(value, ListConfig):
            OmegaConf.update(config, key, [_settled(path, key) for path in value])
        elif isinstance(value, str):
            OmegaConf.update(config, key, _settled(value, key))


def _settled(path: str, key: str) -> str:
    if "://" in path or path in NO_PATHS:
        return path
    absolute_path = Path(os.path.expanduser(path)).absolute()
    return str(absolute_path) if key == MADE or absolute_path.exists() else path


def check_paths(config: DictConfig) -> None:
    """Refuses local paths that do not exist, and parquet files without rows or prompts."""
    data, model = config.data, config.actor_rollout_ref.model.path
    path_values = {"data.train_files": data.train_files, "data.val_files": data.val_files, MODEL_KEY: model}
    for key, value in path_values.items():
        for path in [value] if isinstance(value, str) else value or []:
            on_a_hub = key == MODEL_KEY and path.count("/") < 2 and not path.startswith(("/", ".", "~"))
            if "://" in path or on_a_hub:
                continue
            if not os.path.exists(os.path.expanduser(path)):
                fix = "correct the path" if key == MODEL_KEY else "prepare the data (scripts/data/), correct the path"
                raise ConfigError(key, path, "there is no such file or folder.", f"{fix}, or {key}=...")
            if key != MODEL_KEY and path.endswith(".parquet") and not data.custom_cls.path:
                _check_parquet(key, path, data.prompt_key)


def _check_parquet(key: str, path: str, prompt_key: str) -> None:
    import pyarrow.parquet
    from pyarrow import ArrowException

    fix = "scripts/data/ makes such files; or set data.prompt_key, data.custom_cls."
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, file.schema_arrow.names
    except (ArrowException, OSError) as error:
        raise ConfigError(key, path, f"is no parquet file ({' '.join(str(error).split())[:100]}).", fix) from None
    if rows == 0:
        raise ConfigError(key, path, "has no rows.", fix)
    if prompt_key not in columns:
        rule = f"has no column data.prompt_key={prompt_key!r}, but {', '.join(columns)}."
        raise ConfigError(key, path, rule, fix)
