"""Runs are checked as on a machine with flash-attn, and composed faster."""

from collections.abc import Iterator

import pytest
from compositions import files_merged_once

from darts.checks import run as checks


@pytest.fixture(autouse=True)
def flash_attention_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())


@pytest.fixture(autouse=True, scope="module")
def files_are_merged_once() -> Iterator[None]:
    with files_merged_once():
        yield
