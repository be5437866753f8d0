"""What figures say about where they come from."""

import json

from darts.evidence import machine


def test_it_says_where_figures_come_from(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = machine.machine(("OMP_NUM_THREADS", "NOT_SET"))
    assert {"date", "commit", "cores", "processor", "architecture", "python", *machine.PACKAGES} <= told.keys()
    assert told["environment"] == {"OMP_NUM_THREADS": "3", "NOT_SET": None}
    assert json.loads(json.dumps(told))["cores"] >= 1


def test_what_is_not_there_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PACKAGES", ("no-such-package",))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    told = machine.machine()
    assert (told["no-such-package"], told["commit"], told["changed_files"]) == ("unknown", "unknown", ["unknown"])
