"""`verl_patches.patches` is the page of all that is replaced, and imports nothing of what it replaces."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from verl_patches import patches
from verl_patches.patching import PatchTargetMoved, patch

FOLDER = Path(patches.__file__).parent
PATCHES = {name: value for name, value in vars(patches).items() if name.startswith("patch_")}


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_a_patch_says_its_symptom_its_target_and_its_end(name):
    lines = [line.split(":")[0] for line in inspect.getdoc(PATCHES[name]).splitlines()]
    assert [line for line in lines if line in {"Symptom", "Upstream", "Delete"}] == ["Symptom", "Upstream", "Delete"]


def test_nothing_is_replaced_anywhere_else():
    """The form of a patch is used on the page alone."""
    for folder in (FOLDER, FOLDER.parent / "darts"):
        for path in folder.rglob("*.py"):
            if path.name not in {"patches.py", "patching.py"}:
                source = path.read_text()
                assert "@patch(" not in source, path
                assert "verl_patches.patching import" not in source, path


def test_the_page_imports_nothing_of_what_it_replaces():
    code = "import sys, verl_patches.patches; assert not {'torch', 'ray', 'hydra', 'verl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_patch_imports_its_target_when_it_is_applied(monkeypatch, tmp_path):
    (tmp_path / "upstream_module.py").write_text("class Sender:\n    def send(self, value):\n        return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def twice(upstream):
        """Sends twice as much."""
        return lambda self, value: upstream(self, 2 * value)

    waiting = patch("upstream_module:Sender.send", "self", "value", if_imported=True)(twice)
    assert waiting.__doc__ == "Sends twice as much."
    assert not waiting(), "nobody has imported the module"
    assert "upstream_module" not in sys.modules
    applied = patch("upstream_module:Sender.send", "self", "value")(twice)
    assert applied()
    assert sys.modules["upstream_module"].Sender().send(3) == 6
    assert not applied()
    assert not waiting(), "the same patch"
    with pytest.raises(PatchTargetMoved, match=r"Sender\.send has parameters \('self', 'value'\)"):
        patch("upstream_module:Sender.send", "self")(lambda upstream: upstream)()
