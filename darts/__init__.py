"""DARTS for verl: shapes the distribution of rollouts so that synchronous RL steps end sooner.

Two rings. The method (`selection`, `group`, `allocation`, `config`, `metrics`) is pure Python and NumPy: lengths and
events in, decisions out. The adapters (`rollout`, `checks`, `trainer`) connect it to verl and Ray.
"""

from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the YAML files lie inside the package, in a checkout beside it.
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
