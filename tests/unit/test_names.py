"""scripts/check_names.py finds what it looks for in a small source, and no more in the code than the limits allow."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_names.py"
SOURCE = '''"""Module that is fine."""


class Twice:
    size: int
    """With two words, or three."""

    def total(self, row_values, *rest, _hidden=None, prompt=""):
        """As a sum."""
        global settled
        first, (second_part, third) = row_values[:3]
        settled = self.size = first
        if (found := third) and [inner for inner in rest]:
            with open("file") as handle:
                for line in handle:
                    row_values = sorted(rest, key=lambda pair: pair[0])

        def nested():
            """Assigns what is the outer function's. Of course this begins otherwise."""
            nonlocal found
            found = own = 1

        try:
            match found:
                case {"key": captured, **others}:
                    _, cls = captured, [*others]
        except ValueError as error:
            raise error
'''


@pytest.fixture(scope="module")
def check_names():
    spec = importlib.util.spec_from_file_location("check_names", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_counts_as_a_local_name_and_what_is_found(check_names, tmp_path, capsys):
    words = check_names.words([("one.py", SOURCE), ("two.py", "class Twice:\n    class Once: ...\n")])
    outer = {"first", "third", "found", "inner", "rest", "handle", "line", "pair", "captured", "others", "error"}
    assert {found.text for found in words["one word"]} == outer | {"hidden", "own"}
    all_names = sorted(found.text for found in words["local names"])
    assert all_names == sorted([*outer, "hidden", "own", "prompt", "row_values", "second_part"])
    assert [str(found) for found in words["docstrings"]] == [
        "one.py:6: With two words, or three.",
        "one.py:9: As a sum.",
    ]
    assert [str(found) for found in words["classes"]] == ["one.py:4: Twice", "two.py:1: Twice"]
    assert check_names.figures(words) == {"names share": 100 * 13 / 16, "docstrings": 2, "class names": 1}

    (tmp_path / "darts").mkdir()
    (tmp_path / "darts" / "one.py").write_text(SOURCE)
    assert check_names.main([str(tmp_path), "--list", "--top=1"]) == 1
    output = capsys.readouterr().out
    assert "darts/one.py:9: As a sum." in output
    assert "darts/one.py:11: first" in output
    assert "names share: 81.2 (limit 70)" in output
    (tmp_path / "darts" / "one.py").write_text("def short(two_words, _): ...\n")
    assert check_names.main([str(tmp_path)]) == 0


def test_the_code_keeps_to_the_limits(check_names):
    figures = check_names.figures(check_names.words(check_names.sources_in(ROOT)))
    assert {key: figure for key, figure in figures.items() if figure > check_names.LIMITS[key]} == {}
