"""Measures the words of the code: local names of one word, docstrings without a subject, class names used twice.

    .venv/bin/python scripts/check_names.py          three figures; exit code 1 if one is above its limit
    .venv/bin/python scripts/check_names.py --list   every offender with its place, too
    .venv/bin/python scripts/check_names.py --top 40 the most frequent names of one word, too

A local name is one that a function binds: a parameter, or the target of an assignment, a loop, `with`, `except`, a
comprehension, `:=` or `match`. It counts once a function, without leading underscores; `self`, `cls` and `_` never do.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("darts", "verl_patches", "recipe", "scripts")
LIMITS = {"names share": 70.0, "docstrings": 0.0, "class names": 0.0}
"""The per cent of local names that have one word; docstrings that begin with a preposition; class names used twice."""
TERMS = {term + end for term in ("budget", "candidate", "group", "prompt", "response", "rollout") for end in ("", "s")}
"""The field's words for what DARTS handles. They are names as they are, and do not count as names of one word."""
NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BINDERS = {
    ast.Name: "id", ast.arg: "arg", ast.ExceptHandler: "name", ast.MatchAs: "name", ast.MatchStar: "name",
    ast.MatchMapping: "rest",
}  # fmt: skip
"""The nodes that may bind a name, and where they have it."""
PREPOSITION = re.compile(r"\s*(Of|As|With)\b")


class Found(NamedTuple):
    """One finding, e.g. `Found("darts/group.py", 42, "kept")`."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def bound_names(outer_function: ast.AST) -> dict[str, int]:
    """The names that a function binds in its own scope, with a line of each; those of functions in it are theirs."""
    name_lines: dict[str, int] = {}
    declared = {"self", "cls"}
    node_queue = list(ast.iter_child_nodes(outer_function))
    while node_queue:
        node = node_queue.pop()
        name = getattr(node, BINDERS.get(type(node), ""), None)
        if isinstance(node, ast.Global | ast.Nonlocal):
            declared.update(node.names)
        elif name is not None and isinstance(getattr(node, "ctx", ast.Store()), ast.Store):
            name_lines[name] = getattr(node, "lineno", 0)
        if not isinstance(node, NESTED):
            node_queue += ast.iter_child_nodes(node)
    stripped_names = {name: name.strip("_") for name in name_lines if name not in declared}
    return {bare_name: name_lines[name] for name, bare_name in stripped_names.items() if bare_name}


def words(sources: Iterable[tuple[str, str]]) -> dict[str, list[Found]]:
    """What is found in pairs of a path and its code: all local names, and what should be called otherwise."""
    local_names, docstrings, classes = [], [], []
    for path, source in sources:
        for node in ast.walk(ast.parse(source, filename=path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                local_names += [Found(path, line_number, name) for name, line_number in bound_names(node).items()]
            elif isinstance(node, ast.ClassDef):
                classes.append(Found(path, node.lineno, node.name))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                # Also the strings under a constant or a field.
                doc_text = str(node.value.value)
                if PREPOSITION.match(doc_text):
                    docstrings.append(Found(path, node.lineno, doc_text.strip().splitlines()[0]))
    class_counts = Counter(found.text for found in classes)
    return {
        "local names": sorted(local_names),
        "one word": sorted(name for name in local_names if "_" not in name.text and name.text not in TERMS),
        "docstrings": sorted(docstrings),
        "classes": sorted(found for found in classes if class_counts[found.text] > 1),
    }


def figures(found: dict[str, list[Found]]) -> dict[str, float]:
    """The figures that have limits, by the names of the limits."""
    return {
        "names share": 100 * len(found["one word"]) / max(len(found["local names"]), 1),
        "docstrings": len(found["docstrings"]),
        "class names": len({found_class.text for found_class in found["classes"]}),
    }


def sources_in(root: Path) -> list[tuple[str, str]]:
    paths = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))
    return [(path.relative_to(root).as_posix(), path.read_text()) for path in paths]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="the repository to read")
    parser.add_argument("--list", action="store_true", help="print every offender with its place")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="print the N most frequent names of one word")
    options = parser.parse_args(arguments)

    found = words(sources_in(options.root))
    local_names, one_word = found["local names"], found["one word"]
    if options.list:
        print(*one_word, *found["docstrings"], *found["classes"], sep="\n")
    for name, name_count in Counter(name.text for name in one_word).most_common(options.top):
        print(f"{name_count:5} {name}")
    mean_letters = sum(len(name.text) for name in local_names) / max(len(local_names), 1)
    with_terms = sum("_" not in name.text for name in local_names)
    print(f"{len(local_names)} local names of {mean_letters:.1f} letters in the mean")
    print(f"{len(one_word)} have one word, {with_terms} if the field's terms counted too")
    tree_figures = figures(found)
    for limit_name, figure in tree_figures.items():
        print(f"{limit_name}: {figure:.1f} (limit {LIMITS[limit_name]:g})")
    return int(any(figure > LIMITS[limit_name] for limit_name, figure in tree_figures.items()))


if __name__ == "__main__":
    sys.exit(main())
