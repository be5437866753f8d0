"""Runs are checked as on a machine with flash-attn, and composed a third faster."""

import copy
from collections.abc import Iterator

import pytest
import yaml

from darts import checks

PARSED: dict = {}


@pytest.fixture(autouse=True)
def flash_attention_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())


@pytest.fixture(autouse=True, scope="module")
def yaml_is_parsed_once() -> Iterator[None]:
    """Hydra parses verl's thirty files anew for each of hundreds of configurations."""
    parse = yaml.load

    def load(stream, Loader):
        text = stream if isinstance(stream, str) else stream.read()
        key = (text, Loader.__name__)
        if key not in PARSED:
            PARSED[key] = parse(text, Loader=Loader)
        return copy.deepcopy(PARSED[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load)
        yield
