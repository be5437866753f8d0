"""Saved documents: JSON that names its format, and holds all that its tables come from.

Contract: a file is the old document or the new one, never a part. NaN is null (`finite`). What cannot be read is one
`DocumentError`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DocumentError(ValueError):
    """A file that is not the document that was asked for."""


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document in one go; its folder is made if it is not there."""
    write(path, json.dumps(document, default=str, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a file in one go, and on the disk when this returns; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft_path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft_path.replace(path)


def load(path: Path, command: str, version: int) -> dict[str, Any]:
    """The document in a file; its format is named after the module that writes it, `command`. Raises `DocumentError`
    if the file cannot be read, or is something else."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as cause:
        raise DocumentError(f"{path}: cannot be read: {cause}; give what python -m {command} wrote.") from cause
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (command, version):
        raise DocumentError(f"{path}: is no document of python -m {command} (format {command}, version {version}).")
    return document


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
