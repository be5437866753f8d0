"""The testbeds and their hyperparameters are frozen, so that later work cannot tune them in DARTS's favour.

To change one is a decision of its own: say why in docs/log.md, measure the testbeds again with
`python -m darts.testbed.measure`, search the learning rate again, and renew every result that used it.
"""

import hashlib

import pytest

from darts import CONFIG_DIR
from darts.testbed import LIMITS, assets_dir

FROZEN = {
    CONFIG_DIR / "testbed" / "overthink.yaml": "bb22f8f28d92c6de",
    CONFIG_DIR / "testbed" / "depth.yaml": "12c9853684ca5a6e",
    CONFIG_DIR / "testbed" / "long.yaml": "e001a50b9fb5ad53",
    assets_dir("overthink") / "SHA256SUMS": "e2d65a5d873b446e",
    assets_dir("depth") / "SHA256SUMS": "4733881586f7f968",
    assets_dir("long") / "SHA256SUMS": "f2b441212b2fa912",
}


def test_every_testbed_is_frozen():
    for name in LIMITS:
        assert {CONFIG_DIR / "testbed" / f"{name}.yaml", assets_dir(name) / "SHA256SUMS"} <= set(FROZEN)


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_frozen(path):
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == FROZEN[path]


@pytest.mark.parametrize("name", LIMITS)
def test_assets_are_the_ones_whose_checksums_are_frozen(name):
    lines = (assets_dir(name) / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split(maxsplit=1)) for line in lines)
    files = {str(p.relative_to(assets_dir(name))): p for p in assets_dir(name).rglob("*") if p.is_file()}
    del files["SHA256SUMS"]
    assert set(files) == set(sums)
    for path, expected in sums.items():
        assert hashlib.sha256(files[path].read_bytes()).hexdigest() == expected, path
