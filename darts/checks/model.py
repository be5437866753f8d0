"""A model's config.json: read without loading anything else."""

import hashlib
import json
from pathlib import Path
from typing import Any

from darts.checks import MODEL
from darts.config import ConfigError

MODEL_KEY = f"{MODEL}.path"

VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Keys of a model's config.json that change when it is saved again, and do not change what a step costs."""


def model_id(path: str) -> str:
    """Fingerprint of a model's architecture: of its config.json without what changes when it is saved again."""
    return hashlib.sha256(json.dumps(_settled(model_config(path)), sort_keys=True).encode()).hexdigest()[:16]


def model_config(path: str) -> dict[str, Any]:
    """The config.json of a model: a folder, a name on the hub, or an address that verl can copy (hdfs://...). Raises
    `ConfigError` where there is none to be read."""
    try:
        if "://" in path:
            from verl.utils.fs import copy_to_local

            path = copy_to_local(path)
        config_file = Path(path).expanduser() / "config.json"
        if config_file.parent.exists() or path.startswith(("/", "./", "../", "~")):
            return dict(json.loads(config_file.read_text()))
        from transformers import PretrainedConfig

        return dict(PretrainedConfig.get_config_dict(path)[0])
    except (OSError, ValueError, TypeError) as error:
        rule = f"its config.json cannot be read ({' '.join(str(error).split())[:200]})."
        fix = f"correct the path, or {MODEL_KEY}=...; on nodes without internet: docs/slurm.md."
        raise ConfigError(MODEL_KEY, path, rule, fix) from None


def _settled(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept_keys = {key for key, value in config.items() if value is not None and key not in VOLATILE and key[:1] != "_"}
    return {key: _settled(config[key]) for key in kept_keys}


def vocabulary(config: dict[str, Any]) -> int:
    """Tokens of a model that has this config.json; 1000 where it does not say."""
    config_blocks = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((config_block["vocab_size"] for config_block in config_blocks if config_block.get("vocab_size")), 1000)
