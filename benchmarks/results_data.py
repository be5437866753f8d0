"""The measurements behind `docs/results.md`: how they are committed, and the Markdown of one table or one figure.

Contract: standard library, NumPy and `darts` alone; figures need matplotlib. What cannot be is one `PageError`.

1. A file is a document of `python -m darts.bench`, or what `--json` of `python -m darts.simulation` wrote.
2. The committed form (`committed`) gives the same tables up to rounding: numbers have five digits, what can be computed
   again is left out, and so are the accuracies of single prompts but for those validations that arms are compared at.
   No string has a folder of the machine that it was made on.
"""

import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts.bench import report
from darts.bench.arms import PRESETS
from darts.bench.records import ValidationRecord, records_of, table_of
from darts.bench.statistics import Results
from darts.machine import PACKAGES, UNKNOWN
from darts.simulation import SimulationError, documents
from darts.simulation.comparison import PLAIN, Summary
from darts.simulation.comparison import markdown as replay_table
from darts.simulation.validation import Compared, verdict
from darts.simulation.validation import markdown as validation_table
from darts.strategy import BYPASS_MODE
from darts.testbed.rollouts_report import table

ROOT = Path(__file__).resolve().parents[1]
DIGITS = 5
ORIGIN = ("date", "commit", "cores", "processor", "python", *PACKAGES)
OWN = "own"
"""Beside the presets' names: the arms that no preset has."""


class PageError(ValueError):
    """A page that cannot be made; one line."""


# --- the committed form ----------------------------------------------------------------------------------------------


def committed(path: Path) -> str:
    """What is committed of a document.

    Raises:
        PageError: the file is no document, or says where on a machine it was made.
    """
    opened, source = _opened(path), read(path)
    if isinstance(source, Bench):
        opened = {key: value for key, value in opened.items() if key != "summary"}
        opened["validations"] = _compared_prompts_only(opened["validations"], source.results)
    text = json.dumps(_short(_placeless(opened)), allow_nan=False, separators=(",", ":")) + "\n"
    place = re.search(r"(?<![\w.$}/-])/(?:home|root|Users|workspace|work|data1|mnt)/[^\"]*", text)
    if place:
        raise PageError(f"{path}: has a folder of this machine, {place.group()}; run it with paths below the project.")
    return text


def _compared_prompts_only(validations: Mapping[str, Sequence[Any]], results: Results) -> dict[str, list[Any]]:
    """Validations without the prompts' accuracies where nothing is computed of them."""
    records = records_of(ValidationRecord, validations)
    last = {one.arm: one.step for one in sorted(records, key=lambda one: one.step)}
    first = min([results.last_from, *last.values()])  # two arms are compared at the last step that both have
    needed = [one.step >= first for one in records]
    columns = table_of(records)
    if columns:
        some = zip(columns["prompt_accuracy"], needed, strict=True)
        columns["prompt_accuracy"] = [accuracies if needs else [] for accuracies, needs in some]
    return columns


def _placeless(value: Any) -> Any:
    """Paths below the project, and beside it, relative to the project."""
    if isinstance(value, dict):
        return {key: _placeless(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_placeless(one) for one in value]
    if isinstance(value, str):
        for folder, name in ((ROOT, "."), (ROOT.parent, ".."), (Path.home(), "~")):
            if folder != Path(folder.anchor):
                value = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", name, value)
        return value.replace("./", "", 1) if value.startswith("./") else value
    return value


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short
    return value


def _opened(path: Path) -> dict[str, Any]:
    try:
        opened = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(opened, dict):
        raise PageError(f"{path}: is no document of darts.bench or darts.simulation.")
    return opened


# --- what can be shown -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A document. Its `tables` and `figures` take what stands behind their name in the page, "" for nothing."""

    path: Path
    opened: Mapping[str, Any]

    @property
    def tables(self) -> Mapping[str, Callable[[str], str]]:
        """By their names; Markdown."""
        return {}

    @property
    def figures(self) -> Mapping[str, Callable[[str], bytes]]:
        """By their names; PNG."""
        return {}

    def lacking(self) -> list[str]:
        """What `origin` does not know."""
        machine, command = self.opened.get("machine") or {}, (self.opened.get("settings") or {}).get("command")
        return [key for key in ORIGIN if machine.get(key) in (None, "", UNKNOWN)] + ([] if command else ["command"])

    def origin(self) -> str:
        """Command, machine, versions, date, commit; Markdown."""
        machine = self.opened.get("machine") or {}

        def known(key: str) -> str:
            return str(machine.get(key) or UNKNOWN)

        words = (self.opened.get("settings") or {}).get("command") or [UNKNOWN]
        command = shlex.join([".venv/bin/python", *words[1:]]) if words[0] == "python" else shlex.join(words)
        changed = [name for name in machine.get("changed_files") or [] if name != UNKNOWN]
        versions = [f"{name} {known(name)}" for name in PACKAGES]
        commit = known("commit")[:12] + (f" with {len(changed)} files changed" if changed else "")
        load = machine.get("load")
        busy = f"; load when it began {load[0]:.1f}" if load else ""
        return (
            f"```bash\n{command}\n```\n\n"
            f"{known('cores')} cores ({known('processor')}, {known('architecture')}), Python {known('python')}, "
            f"{', '.join(versions)}; {known('date')[:10]}, commit {commit}{busy}. Data: "
            f"[{self.path.name}](results/{self.path.name})."
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench(Source):
    """A document of `darts.bench`. A preset's name, or `own`, chooses arms; all of them without."""

    results: Results

    @property
    def tables(self) -> Mapping[str, Callable[[str], str]]:
        """Upstream: `Source.tables`."""
        base, goal = self.opened["base"], self.opened["target"] if self.opened["target_is_given"] else None
        return {
            "arms": self._arms,
            "time": lambda which: self._told(which, lambda some: report.time_table(some, base)),
            "work": lambda which: self._told(which, report.work_table),
            "learning": lambda which: self._told(which, lambda some: report.learning_table(some, base, goal)),
            "notes": lambda which: _bullets(report.notes(self._chosen(which), base, goal)),
        }

    @property
    def figures(self) -> Mapping[str, Callable[[str], bytes]]:
        """Upstream: `Source.figures`."""
        return {name: (lambda which, name=name: self._drawn(name, which)) for name in BENCH_FIGURES}

    def _chosen(self, which: str) -> Results:
        arms = self.results.arms
        if which == OWN:
            known = {arm.name for arm in PRESETS["all"]}
            some = [arm for arm in arms if arm not in known or arm == self.opened["base"]]
        elif which in PRESETS:
            some = [arm.name for arm in PRESETS[which] if arm.name in arms]
        elif not which:
            some = arms
        else:
            raise PageError(f"{which!r} is neither a preset ({', '.join(PRESETS)}) nor {OWN}.")
        if set(some) <= {self.opened["base"]}:
            raise PageError(f"{self.path} has no arm of {which!r}; it has {', '.join(arms)}.")
        return self.results.only(some)

    def _told(self, which: str, make: Callable[[Results], str]) -> str:
        some = self._chosen(which)
        missing = [arm.name for arm in PRESETS.get(which, ()) if arm.name not in some.arms]
        return make(some) + (f"\n\nNot in this bench: {', '.join(missing)}." if missing else "")

    def _arms(self, which: str) -> str:
        told = {arm["name"]: arm for arm in self.opened["arms"]}
        rows = []
        for name in self._chosen(which).arms:
            arm = told[name]
            changes = dict(arm["changes"]) | ({} if arm["overlap"] is None else {"overlap.mode": arm["overlap"]})
            changes = {f"darts.{path}": value for path, value in changes.items()}
            changes |= {BYPASS_MODE: True} if arm.get("bypass") else {}
            settings = [f"`{key}={json.dumps(value).strip(chr(34))}`" for key, value in changes.items()]
            rows.append([name, f"`{arm['strategy']}`", ", ".join(settings) or "-", arm["about"] or "-"])
        return table(["arm", "`darts.strategy`", "settings of its own", "what it is"], rows)

    def _drawn(self, name: str, which: str) -> bytes:
        from darts.bench.figures import draw  # needs matplotlib

        (drawn,) = draw(self._chosen(which), self.opened["base"], [name])
        if drawn.png is None:
            raise PageError(f"{self.path}: {drawn.caption}")
        return drawn.png


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay(Source):
    """A replay; a number of GPUs chooses rows."""

    rows: Sequence[Summary]

    @property
    def tables(self) -> Mapping[str, Callable[[str], str]]:
        """Upstream: `Source.tables`."""
        return {
            "replay": lambda which: replay_table(self._of(which)),
            "speed-ups": lambda which: self._by_gpus(lambda row: format(row.speed_up, ".2f"), "1"),
            "gaps": lambda which: self._by_gpus(lambda row: report.number(row.gap_closed, ".0%"), "0%"),
            "notes": lambda which: _bullets([*self.opened["about"], *self.opened["formulas"]]),
        }

    @property
    def figures(self) -> Mapping[str, Callable[[str], bytes]]:
        """Upstream: `Source.figures`."""
        return {"replay": self._drawn}

    def _of(self, which: str) -> list[Summary]:
        sizes = sorted({row.gpus for row in self.rows})
        if which and which not in map(str, sizes):
            raise PageError(f"{self.path} has no replay on {which!r} GPUs; it has {', '.join(map(str, sizes))}.")
        return [row for row in self.rows if not which or row.gpus == int(which)]

    def _by_gpus(self, cell: Callable[[Summary], str], plain: str) -> str:
        sizes = sorted({row.gpus for row in self.rows})
        by = {(row.name, row.gpus): row for row in self.rows}
        names = {row.name: f"{row.name} (MODEL)" if row.model else row.name for row in self.rows}
        cells = [
            [shown, *(plain if name == PLAIN else cell(by[name, size]) for size in sizes)]
            for name, shown in names.items()
        ]
        return table(["strategy", *(f"{size:,} GPUs" for size in sizes)], cells)

    def _drawn(self, which: str) -> bytes:
        from darts.simulation.figures import draw  # needs matplotlib

        buffer = io.BytesIO()
        draw(self._of(which), f"{self.opened['trace']}, {self.opened['steps']} steps", buffer)
        return buffer.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validation(Source):
    """A comparison of simulated with measured seconds."""

    rows: Sequence[Compared]

    @property
    def tables(self) -> Mapping[str, Callable[[str], str]]:
        """Upstream: `Source.tables`."""
        return {
            "validation": lambda which: f"{validation_table(self.rows)}\n\nOver all: {verdict(self.rows)}.",
            "notes": lambda which: _bullets(self.opened["about"]),
        }


BENCH_FIGURES = ("seconds", "accuracy", "tradeoff", "lengths", "phases")
"""The names of `darts.bench.figures.FIGURES`, which needs matplotlib."""


def read(path: Path) -> Source:
    """A document.

    Raises:
        PageError: the file is missing, or is no such document.
    """
    if not path.exists():
        raise PageError(f"{path}: there is no such file; python -m benchmarks.results --add {path.stem}=FILE makes it.")
    try:
        if _opened(path).get("format") == documents.FORMAT:
            opened, rows = documents.load(path)
            if opened["kind"] == "validate":
                return Validation(path=path, opened=opened, rows=rows)
            if opened["kind"] == "replay":
                return Replay(path=path, opened=opened, rows=rows)
            raise PageError(f"{path}: the page shows no {opened['kind']}; give a replay or a validation.")
        opened, results = report.load(path)
        return Bench(path=path, opened=opened, results=results)
    except (report.DocumentError, SimulationError) as error:
        raise PageError(" ".join(str(error).split())) from None


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
