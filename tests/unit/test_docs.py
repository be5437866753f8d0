"""docs/*.md, both README.md and CONTRIBUTING.md: links lead somewhere, commands are understood, and what is quoted
from the code, from tests and from measurements is there. What needs verl is in `tests/contract/test_docs.py`."""

import ast
import importlib
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from documents import PAGES, ROOT, commands_of, named, text_of, understood, unknown_metrics, write_example

from darts.bench.arms import PRESETS
from darts.config import STRATEGIES
from darts.metrics import METRICS
from darts.simulation.options import load_curve

TODAYS = [page for page in PAGES if page.name != "log.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=NAMES)
TODAYS_PAGES = pytest.mark.parametrize("page", TODAYS, ids=[page.stem for page in TODAYS])
"""All but the log, whose entries keep the names of their day."""
COMMANDS = [pytest.param(command, id=f"{page.name}: {' '.join(command)}") for page, command in commands_of(PAGES)]
TROUBLE, METRICS_PAGE = ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "metrics.md"
SHORT = {
    "comparing": 130,
    "how_it_works": 130,
    "tuning": 130,
    "extending": 150,
    "reproduction": 130,
    "troubleshooting": 90,
}
"""Pages that are to stay short, in lines; a table beats prose."""


# --- links and names -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_every_link_leads_somewhere(page):
    missing = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


@TODAYS_PAGES
def test_every_path_metric_and_test_that_is_named_exists(page):
    names = named(page)
    assert [name for name in names.paths if not list(ROOT.glob(name))] == []
    assert unknown_metrics(names.metrics) == []
    assert [name for name in names.tests if name not in all_tests()] == []


@TODAYS_PAGES
def test_every_key_and_class_of_darts_that_is_named_exists(page):
    unknown = [name for name in named(page).keys if name not in all_keys() and not importable(name)]
    assert unknown == []


def importable(name: str) -> bool:
    """Whether this is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or bool(importlib.import_module(name))
    except ImportError:
        return False


@cache
def all_tests() -> set[str]:
    return {name for path in ROOT.glob("tests/*/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}


@cache
def all_keys() -> set[str]:
    """`darts.allocation.high`, `darts.allocation`, ..."""
    block = yaml.safe_load((ROOT / "configs" / "darts_base.yaml").read_text())["darts"]
    inner = {f"darts.{name}.{key}" for name, value in block.items() if isinstance(value, dict) for key in value}
    return inner | {f"darts.{name}" for name in block}


# --- commands --------------------------------------------------------------------------------------------------------


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_example(tmp_path)  # which some commands name
    (tmp_path / "outputs").mkdir()
    understood([word.replace("$PWD", str(tmp_path)) for word in command])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("pip install verl", "unknown program"),
        ("bash scripts/nothing.sh", "no such script"),
        ("bash scripts/setup.sh --fast", "--fast"),
        ("SPEED=fast bash recipe/darts/run_qwen2.5_14b_dapo.sh", "SPEED"),
        (".venv/bin/python -m darts.nothing", "no such module"),
        (".venv/bin/python -m darts.simulation replay lengths.csv --fast", "--fast"),
        (".venv/bin/python -m darts.bench --arms nothing", "nothing"),
        (".venv/bin/python -m darts.bench allocate --fast", "--fast"),
        ("make coffee", "coffee"),
        ("COMMAND='bash scripts/nothing.sh' sbatch --nodes=4 scripts/slurm/ray.sbatch", "no such script"),
        ("SPEED=fast COMMAND='make help' sbatch --nodes=4 scripts/slurm/ray.sbatch", "SPEED"),
    ],
)
def test_what_nobody_checked_is_not_understood(line, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=reason):
        understood(shlex.split(line))


# --- what is quoted --------------------------------------------------------------------------------------------------


@cache
def sayings() -> list[str]:
    """Every text in our code; what is filled in is a line break."""
    found = []
    for folder in ("darts", "verl_patches", "recipe"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\n" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def occurs(symptom: str) -> bool:
    """Whether our code says this, with anything for `...`."""
    parts = [re.escape(part) for part in symptom.split("...")]
    pattern = re.compile(r"[\s\S]*?".join(parts))
    return any(pattern.search(saying) for saying in sayings())


def rows_of(text: str) -> list[list[str]]:
    """The cells of all rows of its tables, without heads."""
    lines = re.findall(r"^\| (.*) \|$", text, flags=re.M)
    return [re.split(r" \| ", line) for line in lines if not set(line) <= set("-| ")]


def test_every_symptom_that_is_ours_is_said_by_the_code():
    ours, _, others = TROUBLE.read_text().partition("## Not ours")
    symptoms = [quoted for row in rows_of(ours) for quoted in re.findall(r"`([^`]+)`", row[0])]
    elsewhere = {"EngineDeadError", "nccl", "torch.OutOfMemoryError", "overlap_extend"}
    assert len(symptoms) > 40
    assert others
    assert [symptom for symptom in symptoms if symptom not in elsewhere and not occurs(symptom)] == []
    assert not occurs("the cluster has ... coffee machines")


def test_every_metric_has_one_healthy_range():
    (table,) = re.findall(r"## Healthy ranges\n(.*?)## All of them", METRICS_PAGE.read_text(), flags=re.S)
    found = [f"darts/{name}" for row in rows_of(table)[1:] for name in re.findall(r"`(\w+/\w+)`", row[1])]
    assert sorted(found) == sorted(METRICS)


def test_measured_figures_are_those_of_the_results():
    results = text_of("docs/results.md")
    for page in ("docs/tuning.md", "docs/reproduction.md", "docs/how_it_works.md"):
        figures = set(re.findall(r"[+-]?\d\.\d+ \[[^\]]+\]", text_of(page)))
        assert [figure for figure in figures if figure not in results] == [], page


def test_the_recipes_have_the_settings_that_the_paper_index_names():
    recipe = text_of("recipe/darts/run_qwen2.5_14b_dapo.sh")
    assert "+recipe=dapo" in recipe
    shared = [
        leaf for name in ("base", "dapo") for leaf in leaves(yaml.safe_load(text_of(f"configs/recipe/{name}.yaml")))
    ]
    (table,) = re.findall(r"## Paper index\n(.*)", text_of("docs/reproduction.md"), flags=re.S)
    settings = [quoted for row in rows_of(table)[1:] for quoted in re.findall(r"`([^`]+)`", row[-1])]
    assert len(settings) > 20
    for setting in settings:
        name, equals, value = setting.partition("=")
        if re.fullmatch(r"[A-Z_]+", name):
            default = re.search(rf"\$\{{{name}:-([^}}]*)\}}", recipe)
            assert default, f"{name} is no knob of the recipe"
            assert not equals or value in ("disaggregated", default[1]), setting
        elif equals:
            assert setting in shared or setting in recipe.split(), setting
        else:
            assert setting == "auto"


def leaves(value: object, path: str = "") -> list[str]:
    """`a.b.c=value` for each setting of a configuration."""
    if not isinstance(value, dict):
        return [f"{path}={value}"]
    return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}" if path else name)]


def test_every_strategy_and_preset_is_told_of():
    text = text_of("docs/comparing.md")
    assert set(STRATEGIES) <= set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    assert all(f"`{name}`" in text for name in PRESETS)


def test_what_is_stable_is_there_and_needs_neither_verl_nor_torch():
    (table,) = re.findall(r"## What is stable\n(.*)", text_of("docs/extending.md"), flags=re.S)
    names = [name for row in rows_of(table)[1:] for name in re.findall(r"`(darts\.\w+\.\w+)`", row[0])]
    assert len(names) > 12
    assert all(importable(name) for name in names)
    assert {"darts." + name.split(".")[1] for name in names} <= set(sys.modules)


def test_the_bare_curve_is_one(tmp_path):
    (curve,) = re.findall(r"```json\n(.*?)```", text_of("docs/extending.md"), flags=re.S)
    (tmp_path / "curve.json").write_text(curve)
    made, _ = load_curve(str(tmp_path / "curve.json"))
    assert made(32) == json.loads(curve)["seconds"][1]


@pytest.mark.parametrize(("page", "lines"), SHORT.items())
def test_pages_are_short(page, lines):
    assert len(text_of(f"docs/{page}.md").splitlines()) <= lines
