"""Makes docs/results.md from the measurements in docs/results/, and its figures.

    .venv/bin/python -m benchmarks.results --add overthink=outputs/bench/overthink/bench.json
    .venv/bin/python -m benchmarks.results
    .venv/bin/python -m benchmarks.results --check

Contract. The page is docs/results/page.md with every placeholder replaced; a placeholder is a line of its own:

    <!-- table: overthink time strategies -->     of docs/results/overthink.json the table `time`, of a preset's arms
    <!-- figure: overthink seconds -->            a figure, drawn to docs/results/overthink-seconds.png
    <!-- note: anything -->                       for whoever writes the page; left out

Before the first table or figure of a file in a section (`##`) stands where its numbers come from: command, machine,
versions, date, commit. An unknown placeholder, or one that cannot be replaced, is one line on stderr and exit code 2.
`--add` puts a document of `python -m darts.bench`, or what `--json` of `python -m darts.simulation` wrote, into
docs/results/ in the form in which it is committed. `--check` writes nothing, and exits with 1 if the page is not what
the measurements give, or a figure is missing.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results_data import ROOT, PageError, Source, committed, read

DOCS = ROOT / "docs"
PLACEHOLDER = re.compile(r"<!-- (table|figure): (\S+) (\S+)(?: (\S+))? -->")
NOTE = re.compile(r"<!-- note: .* -->")
MADE = "<!-- Made by python -m benchmarks.results: change results/page.md, and the measurements beside it. -->"
FORM = "<!-- table: FILE WHAT [WHICH] -->, <!-- figure: FILE WHAT [WHICH] --> or <!-- note: ... -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The page, and what draws its figures, by the names of their files in docs/results/."""

    text: str
    figures: Mapping[str, Callable[[], bytes]]


@dataclass(slots=True)
class _Maker:
    """Replaces placeholders."""

    folder: Path
    sources: dict[str, Source] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)  # files whose origin stands in this section
    figures: dict[str, Callable[[], bytes]] = field(default_factory=dict)

    def line(self, line: str) -> list[str]:
        """What stands for a line of the template."""
        if line.startswith("## "):
            self.told.clear()
        if not line.lstrip().startswith("<!--"):
            return [line]
        if NOTE.fullmatch(line):
            return []
        if not (found := PLACEHOLDER.fullmatch(line)):
            raise PageError(f"{line!r:.100} must be {FORM}.")
        kind, file, what, which = found.groups(default="")
        if file not in self.sources:
            self.sources[file] = read(self.folder / f"{file}.json")
        source = self.sources[file]
        known: Mapping[str, Callable] = source.tables if kind == "table" else source.figures
        if what not in known:
            raise PageError(f"{line!r}: {source.path} has no {kind} {what!r}, but {', '.join(known) or 'none'}.")
        if kind == "table":
            shown = known[what](which)
        else:
            name = "-".join(part for part in (file, what, which) if part) + ".png"
            self.figures[name] = lambda: known[what](which)
            shown = f"![{' '.join(part for part in (what, which, 'of', file) if part)}](results/{name})"
        origin = [] if file in self.told else [source.origin(), ""]
        self.told.add(file)
        return [*origin, shown]


def make(docs: Path) -> Page:
    """The page that template and measurements give.

    Raises:
        PageError: there are no measurements, no template, or a placeholder that cannot be replaced.
    """
    folder = docs / "results"
    if not any(folder.glob("*.json")):
        raise PageError(f"{folder} has no measurements (*.json) to make a page of; --add NAME=FILE puts some there.")
    template = folder / "page.md"
    if not template.exists():
        raise PageError(f"{template}: there is no template.")
    maker = _Maker(folder)
    lines = [
        line
        for number, given in enumerate(template.read_text().splitlines(), 1)
        for line in _replaced(maker, given, f"{template}, line {number}")
    ]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([MADE, "", *lines]))
    return Page(text=text.rstrip() + "\n", figures=maker.figures)


def _replaced(maker: _Maker, line: str, where: str) -> list[str]:
    try:
        return maker.line(line)
    except PageError as error:
        raise PageError(f"{where}: {error}") from None


def write(docs: Path) -> Page:
    """Writes the page and its figures.

    Raises:
        PageError: as `make`; or a figure cannot be drawn.
    """
    page = make(docs)
    drawn = {name: draw() for name, draw in page.figures.items()}
    for name, png in drawn.items():
        (docs / "results" / name).write_bytes(png)
    (docs / "results.md").write_text(page.text)
    return page


def differences(docs: Path) -> list[str]:
    """How page and figures differ from what `write` would leave; of figures, which there are.

    Raises:
        PageError: as `make`.
    """
    page, there = make(docs), docs / "results.md"
    found = [] if there.exists() and there.read_text() == page.text else [f"{there} is not what the measurements give"]
    drawn = {path.name for path in (docs / "results").glob("*.png")}
    missing, unused = page.figures.keys() - drawn, drawn - page.figures.keys()
    found += [f"{docs / 'results' / name} is missing" for name in sorted(missing)]
    return found + [f"{docs / 'results' / name} is not in the page" for name in sorted(unused)]


def add(docs: Path, written: str) -> Path:
    """Puts a document, NAME=FILE, among the measurements.

    Raises:
        PageError: not of this form, or as `committed`.
    """
    name, equals, file = written.partition("=")
    if not (equals and re.fullmatch(r"[\w-]+", name)):
        raise PageError(f"--add {written}: must be NAME=FILE, where NAME has letters, digits, - and _ alone.")
    text, path = committed(Path(file)), docs / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main(given: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", action="append", default=[], metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(given)
    try:
        for written in options.add:
            path = add(docs, written)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            if lacking := read(path).lacking():
                print(f"[results] {path} does not say: {', '.join(lacking)}", file=sys.stderr)
        if options.check:
            found = differences(docs)
            print(*(f"[results] {one}; run python -m benchmarks.results" for one in found), sep="\n", file=sys.stderr)
            return 1 if found else 0
        if not options.add:
            page = write(docs)
            print(f"{docs / 'results.md'}: {len(page.text.splitlines())} lines, {len(page.figures)} figures")
    except PageError as error:
        print(f"[results] {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
