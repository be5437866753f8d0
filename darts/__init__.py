"""DARTS for verl: shapes the distribution of rollouts so that synchronous RL steps end sooner.

Files directly in this folder are the method: Python and NumPy, lengths and events in, decisions out. The folders make
verl follow it, or show what came of it. Imports point down; pyproject.toml has the layers (`[tool.importlinter]`).
"""

from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the YAML files lie inside the package, in a checkout beside it.
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
