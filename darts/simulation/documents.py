"""What `--json` writes, and how it is read again: the figures, and what they belong to.

Contract: a document holds all that its tables come from: the command, machine with versions and commit, what the
command said of its inputs (`about`), and the rows. NaN is null.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darts.evidence.machine import machine
from darts.simulation import SimulationError
from darts.simulation.comparison import Summary
from darts.simulation.validation import Compared

FORMAT = "darts.simulation"
VERSION = 1
ROWS: dict[str, type[Summary] | type[Compared]] = {"replay": Summary, "plan": Summary, "validate": Compared}
"""What the rows of each command are."""


def document(
    kind: str, arguments: Sequence[str], about: Sequence[str], rows: Sequence[Summary | Compared], **more: Any
) -> dict[str, Any]:
    """For JSON.

    Args:
        kind: the command, of `ROWS`.
        arguments: that it was given.
        about: what has to be known to read the rows.
        rows: the figures.
        more: what this command alone has.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "settings": {"command": ["python", "-m", "darts.simulation", *arguments]},
        "machine": machine(),
        "about": list(about),
        **more,
        "rows": [row.to_dict() for row in rows],
    }


def save(path: Path, opened: Mapping[str, Any]) -> None:
    """Writes a document."""
    path.write_text(json.dumps(opened, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """A document, and its rows: `Summary`, or `Compared` of `validate`.

    Raises:
        SimulationError: the file cannot be read, or is something else.
    """
    try:
        opened = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SimulationError(f"{path}: cannot be read: {error}; give what --json of darts.simulation wrote.") from None
    told = (opened.get("format"), opened.get("version")) if isinstance(opened, dict) else None
    if told != (FORMAT, VERSION) or opened.get("kind") not in ROWS:
        raise SimulationError(f"{path}: is no document of python -m darts.simulation ({FORMAT}, version {VERSION}).")
    try:
        return opened, [ROWS[opened["kind"]].from_dict(row) for row in opened["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise SimulationError(f"{path}: has rows that are not those of a {opened['kind']}: {error!r}.") from None
