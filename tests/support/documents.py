"""What the pages for people name and tell to run, and whether it would.

Contract: nothing is started, nothing needs verl. A command is understood if its program is one of ours, exists, and its
own parser takes the options; any other program is refused, so that no command stands in a page that nobody checks.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any
from unittest import mock

from darts.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "recipe/darts/README.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PYTHONS = (".venv/bin/python",)
ENTRY_POINT = "recipe.darts.main_darts"
FILES = {"darts.json", "darts.jsonl"}
OURS = r"(?:darts|verl_patches|recipe|configs|docs|scripts|tests)"


def text_of(name: str) -> str:
    """A file of the project."""
    return (ROOT / name).read_text()


# --- what a page names -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a page names in backticks; paths and metrics may have `*`."""

    paths: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # darts.allocation.high, darts.bench
    tests: list[str] = field(default_factory=list)


def named(page: Path) -> Named:
    """Of its text, without blocks of code."""
    text, found = re.sub(r"```.*?```", "", page.read_text(), flags=re.S), Named()
    for word in (word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()):
        if re.fullmatch(rf"{OURS}/[\w./*-]*", word):
            is_metric = re.fullmatch(r"darts/\w+/[\w*]+", word) and not (ROOT / word).exists()
            (found.metrics if is_metric else found.paths).append(word)
        elif re.fullmatch(r"test_\w+", word):
            found.tests.append(word)
        elif (key := re.fullmatch(r"(darts(?:\.\w+)+)(?:=.*)?", word)) and key[1] not in FILES:
            found.keys.append(key[1])
    return found


def unknown_metrics(names: Iterable[str]) -> list[str]:
    """Those that stand for no metric."""
    return [name for name in names if not any(re.fullmatch(name.replace("*", r"\w+"), known) for known in METRICS)]


def write_example(folder: Path) -> str:
    """Writes the strategy of docs/extending.md as a module; returns the path of its class."""
    code = next(code for code in re.findall(r"```python\n(.*?)```", text_of("docs/extending.md"), flags=re.S))
    module = re.match(r'"""(\w+)\.py:', code)[1]
    (folder / f"{module}.py").write_text(code)
    name = re.search(r"^class (\w+)", code, flags=re.M)[1]
    return f"{module}.{name}"


# --- what a page tells to run ----------------------------------------------------------------------------------------


def commands_of(pages: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Every command of every bash block, as words; what a block assigns is filled in."""
    for page in pages:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            values: dict[str, str] = {}
            for line in block.replace("\\\n", " ").splitlines():
                for words in _split(line):
                    filled = [Template(word).safe_substitute(values) for word in words]
                    if all(re.match(r"[A-Za-z_]\w*=", word) for word in filled):
                        values |= dict(word.split("=", 1) for word in filled)
                    else:
                        yield page, filled


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, words = True, []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def understood(words: Sequence[str]) -> None:
    """Asserts that a command is one of ours and its options are known.

    Raises:
        AssertionError: it is not; the reason.
    """
    environment, words = environment_and_words(words)
    program, *arguments = words
    if program == "export":
        environment |= dict(word.split("=", 1) for word in arguments)
        unknown = set(environment) - {"PYTHONPATH"} - {name for script in recipes() for name in knobs(script)}
        assert not unknown, f"no recipe reads {unknown}"
    elif program == "bash" or program.startswith("scripts/"):
        script, *arguments = arguments if program == "bash" else words
        _script(script, arguments, environment)
    elif program in PYTHONS and arguments[0] == "-m":
        _module(arguments[1], arguments[2:])
    elif program in PYTHONS:
        path = ROOT / arguments[0]
        assert path.is_file(), f"no such script: {path}"
        with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
            _parses(lambda: runpy.run_path(str(path), run_name="__main__"), arguments)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.M))
        assert set(arguments) <= targets, f"no such target: {arguments}"
    elif program == "sbatch":
        jobs = [word for word in arguments if not word.startswith("-")]
        assert jobs, "sbatch without a script"
        assert (ROOT / jobs[0]).is_file(), f"no such script: {jobs[0]}"
        started = shlex.split(environment.get("COMMAND", ""))
        _reads([jobs[0], *(word for word in started if word in recipes())], environment)
        understood(started)
    else:
        raise AssertionError(f"unknown program: {program}")


def environment_and_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and the command."""
    count = next(at for at, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), list(words[count:])


def recipes() -> list[str]:
    """The launch scripts."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipe" / "darts").glob("run_*.sh"))]


def knobs(script: str) -> set[str]:
    """The variables that a script takes from outside; a baseline has those of its twin."""
    return set(re.findall(r"\$\{([A-Z_]+):?[-?=]", text_of(script.replace("_baseline.sh", ".sh"))))


def _reads(scripts: Sequence[str], environment: dict[str, str]) -> None:
    unknown = set(environment) - {name for script in scripts for name in knobs(script)}
    assert not unknown, f"{' and '.join(scripts)} does not read {unknown}"


def _script(script: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    assert (ROOT / script).is_file(), f"no such script: {script}"
    _reads([script], environment)
    if script == "scripts/setup.sh":
        wrong = [word for word in arguments if word != "--force"]
    elif script == "scripts/test.sh":
        wrong = [
            word for word in arguments if word not in ("--full", "-k") and "/" in word and not (ROOT / word).exists()
        ]
    else:
        wrong = [word for word in arguments if not is_override(word)]
    assert not wrong, f"{script} does not take {wrong}"


def is_override(word: str) -> bool:
    """Whether Hydra takes this; `...` stands for more of it."""
    return word == "..." or bool(re.match(r"[+~]{0,2}[\w./@]+=", word))


def _module(name: str, arguments: Sequence[str]) -> None:
    try:
        assert importlib.util.find_spec(name), f"no such module: {name}"
    except ImportError as error:
        raise AssertionError(f"no such module: {name}") from error
    if name == ENTRY_POINT:
        options = {"--config-name", "--config-dir"}
        left = [word for before, word in zip(["", *arguments], arguments, strict=False) if before not in options]
        wrong = [word for word in left if word not in options and not is_override(word)]
        assert not wrong, f"{name} does not take {wrong}"
    elif name == "darts.bench":
        from darts.bench.command import BENCHES, main, options_of

        if arguments and arguments[0] in BENCHES:
            _parses(lambda: main(arguments), arguments)
        else:
            _parses(lambda: options_of(list(arguments)), arguments, stop=False)
    elif name == "darts.simulation":
        from darts.simulation.options import arms_of, parse

        def both() -> None:
            options = parse(list(arguments))
            if options.command == "replay":
                arms_of(options)

        _parses(both, arguments, stop=False)
    else:
        _parses(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), [name, *arguments])


class _Parsed(Exception):
    """The program's own parser took the options; nothing else is to happen."""


def _parses(run: Callable[[], Any], argv: Sequence[str], stop: bool = True) -> None:
    """Runs a program until its parser has returned, or with `stop` false to the end."""

    def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if stop:
                raise _Parsed
            return result

        return parse

    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, name, stopping(method)))
        stack.enter_context(mock.patch.object(sys, "argv", list(argv)))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            run()
        except _Parsed:
            return
        except (SystemExit, ValueError) as error:
            raise AssertionError(f"{said.getvalue()}{error}") from error
    assert not stop, f"{argv[0]} parses no options"
