"""What `--json` writes, and how it is read again: the figures, and what they belong to.

Contract: a document holds all that its tables come from: the command, machine with versions and commit, what the
command said of its inputs (`about`), and the rows. NaN is null.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from darts.evidence import documents
from darts.evidence.documents import DocumentError
from darts.evidence.machine import machine
from darts.simulation import comparison, validation
from darts.simulation.comparison import ReplaySummary
from darts.simulation.validation import ComparedSeconds

FORMAT, VERSION = "darts.simulation", 1
TABLES: Mapping[str, Mapping[str, Callable[[Sequence[Any]], str]]] = {
    "replay": {
        "rows": comparison.markdown,
        "speed-ups": partial(comparison.by_gpus, column="speed-up"),
        "gaps": partial(comparison.by_gpus, column="gap closed"),
    },
    "plan": {"rows": comparison.markdown},
    "validate": {"rows": validation.markdown, "verdict": validation.verdict},
}
"""What can be told of the rows of each command."""


def save(
    path: Path,
    arguments: Sequence[str],
    about: Sequence[str],
    rows: Sequence[ReplaySummary | ComparedSeconds],
    **facts: Any,
) -> None:
    """Writes what a command leaves behind; `about` is what has to be known to read the rows."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": arguments[0],
        "settings": {"command": ["python", "-m", FORMAT, *arguments]},
        "machine": machine(),
        "about": about,
        **facts,
        "rows": [row_to_dict(row) for row in rows],
    }
    documents.save(path, document)


def row_to_dict(row: ReplaySummary | ComparedSeconds) -> dict[str, Any]:
    """A row for JSON: its fields, and what is computed from them."""
    computed_names = [name for name, member in vars(type(row)).items() if isinstance(member, property)]
    values = asdict(row) | {name: getattr(row, name) for name in computed_names}
    return {name: documents.finite(value) for name, value in values.items()}


def load(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """A document, and its rows: `ReplaySummary`, or `ComparedSeconds` of `validate`.

    Raises:
        DocumentError: the file cannot be read, or is something else.
    """
    opened_document = documents.load(path, FORMAT, VERSION)
    kind = opened_document.get("kind", "")
    if kind not in TABLES:
        raise DocumentError(f"{path}: is no document of one of {', '.join(TABLES)}.")
    row_class = ComparedSeconds if kind == "validate" else ReplaySummary
    try:
        rows = [
            {name: math.nan if value is None else value for name, value in row.items()}
            for row in opened_document["rows"]
        ]
        return opened_document, TypeAdapter(list[row_class]).validate_python(rows)
    except (AttributeError, KeyError, ValueError) as error:
        raise DocumentError(f"{path}: has rows that are not those of a {kind}: {error!r}.") from None


def tell(path: Path, name: str = "rows", gpus: Sequence[int] = ()) -> str:
    """One of the `TABLES` of a document, in Markdown; of a replay these clusters alone, if any are named.

    Raises:
        DocumentError: as `load`; or there is no such table, or none of these clusters.
    """
    opened_document, rows = load(path)
    kind = opened_document["kind"]
    if name not in TABLES[kind]:
        raise DocumentError(f"{path}: there is no table {name!r} of a {kind}, but {', '.join(TABLES[kind])}.")
    shown_rows = [row for row in rows if not gpus or getattr(row, "gpus", None) in gpus]
    if not shown_rows:
        raise DocumentError(f"{path}: has no rows of {', '.join(map(str, gpus)) or 'any'} GPUs.")
    return TABLES[kind][name](shown_rows)
