"""Writes what is made of the definitions in darts/config.py: the block `darts:` of configs/darts_base.yaml with its
comments, and docs/configuration.md, which also has what darts_base.yaml sets of verl's and the environment; and the
tables in docs/results.md that are made of the documents in docs/results/. From the repository's root:

    .venv/bin/python scripts/make_docs.py           writes them
    .venv/bin/python scripts/make_docs.py --check   exit code 1 if they are not what would be written

In docs/results.md a table stands between two lines:

    <!-- table: overthink time none, darts -->   of overthink.json the table `time`, of two arms; without names, of all
    <!-- table: replay rows 64 -->               of replay.json the table `rows`, for 64 GPUs
    <!-- /table -->
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic.fields import FieldInfo

from darts.bench import report
from darts.config import SECTIONS, DartsConfig, help_of, keys_of, shown, taken_by
from darts.simulation import documents

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
BASE = ROOT / "configs" / "darts_base.yaml"
RESULTS = ROOT / "docs" / "results.md"
TABLE = re.compile(r"(<!-- table: (\S+) (\S+)(?: (.+))? -->\n)(?:.*\n)*?(?=<!-- /table -->)")
WIDTH = 120
HEAD = """# Configuration

Made by `scripts/make_docs.py` from the definitions in `darts/config.py`, as the comments in `configs/darts_base.yaml`
are; a test compares. [tuning.md](tuning.md) says which to choose. A bad value or an unknown key is one line with the
key, the value, the rule and the fix, before Ray starts.

## The block `darts:`

rollout.n, the paper's M, is `actor_rollout_ref.rollout.n`: the responses per prompt that are trained on. What the paper
calls a key stands in brackets.

| key | default | type | meaning |
|---|---|---|---|"""
VERLS = """
## Keys of verl's that `darts_base.yaml` sets

Everything else of verl's `ppo_trainer.yaml` stays as it is.

| key | value | why |
|---|---|---|"""
ENVIRONMENT = """
## Environment

| variable | read by | meaning |
|---|---|---|"""
VARIABLES = (
    ("DARTS_ALLOW_OTHER_VERL=1", "a run", "tries a verl that the plugin was not tested with"),
    ("RAY_ADDRESS", "a run", "joins that cluster instead of starting a Ray of its own"),
    ("DARTS_LOG_LEVEL", "a run", "the level from which on lines `[darts] ...` are said; default INFO"),
    ("DARTS_OUT", "`scripts/quickstart.sh`", "the folder of its results"),
    ("DARTS_RESUME=1", "`scripts/quickstart.sh`", "goes on from the last checkpoint there"),
    ("VERL_PATCHES_WEIGHT_TIMEOUT_S", "a run", "seconds without progress that end a weight update; default 600"),
    ("DARTS_QUICKSTART_TIMEOUT", "`scripts/quickstart.sh`", "seconds"),
    ("DARTS_DEVICE", "`scripts/setup.sh`", "`cpu` or `gpu`; default: `gpu` where there is one"),
    ("DARTS_PYTHON", "`scripts/setup.sh`", "the Python version"),
    ("DARTS_TEST_TIMEOUT", "`scripts/test.sh`", "seconds for all tests"),
    ("DARTS_JUNIT", "`scripts/test.sh`", "file of a JUnit report"),
    ("DARTS_ENABLE", "`recipe/darts/run_*.sh`", "False: the baseline; each recipe's head has its other knobs"),
    ("PYTHON", "`recipe/darts/run_*.sh`", "the interpreter; default: `.venv`'s, else `python3`"),
)
# Why, for the keys of verl's that are set; the values are read from the file.
REASONS = {
    "actor_rollout_ref.rollout.name": "DARTS drives vLLM servers",
    "actor_rollout_ref.rollout.n": "M, the paper's",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": "generates and selects the candidates",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "an error during a weight update ends the run",
    "algorithm.adv_estimator": "DARTS needs a group baseline",
    "trainer.use_v1": "`RayDartsTrainer` is a `RayPPOTrainer`",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    only_check = parser.parse_args().check
    exit_code = 0
    for path, make_text in ((BASE, base), (PAGE, page), (RESULTS, results_page)):
        text = make_text()
        if path.exists() and path.read_text() == text:
            print(f"{path.name}: up to date")
        elif only_check:
            print(f"{path.name}: differs: run scripts/make_docs.py")
            exit_code = 1
        else:
            path.write_text(text)
            print(f"{path.name}: written")
    return exit_code


def base() -> str:
    """The whole darts_base.yaml: as it is, but for the block `darts:`."""
    darts_block = "\n".join(["darts:", *yaml_lines(DartsConfig, "  ")[1:]]) + "\n\n"
    return re.sub(r"^darts:\n(?: .*\n|\n)*", lambda _: darts_block, BASE.read_text(), flags=re.M)


def yaml_lines(kind: Any, indent: str) -> list[str]:
    """The keys of a block, each below its help."""
    block_lines = []
    for name, info in keys_of(kind).items():
        section = SECTIONS.get(name) if kind is DartsConfig else None
        if section:
            help_words, value, inner_lines = " ".join(section.__doc__.split()), "", yaml_lines(section, indent + "  ")
        else:
            help_words, value, inner_lines = help_of(info), f" {default_of(info)}", []
        block_lines += [""] if kind is DartsConfig else []
        block_lines += textwrap.wrap(help_words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        block_lines += [f"{indent}{name}:{value}", *inner_lines]
    return block_lines


def page() -> str:
    """The whole configuration.md."""
    verls_keys = yaml.safe_load(BASE.read_text())
    del verls_keys["defaults"], verls_keys["darts"]
    verls_values = pd.json_normalize(verls_keys).to_dict("records")[0]
    definitions: dict[str, FieldInfo] = {}
    for name, info in keys_of(DartsConfig).items():
        section_keys = keys_of(SECTIONS[name]) if name in SECTIONS else {"": info}
        definitions |= {f"darts.{name}.{key}".rstrip("."): definition for key, definition in section_keys.items()}
    darts_rows = [
        f"| `{key}` | `{default_of(info)}` | {taken_by(info)} | {help_of(info)} |" for key, info in definitions.items()
    ]
    verls_rows = [f"| `{key}` | `{shown(value)}` | {REASONS[key]} |" for key, value in verls_values.items()]
    variable_rows = [f"| `{name}` | {reader} | {meaning} |" for name, reader, meaning in VARIABLES]
    return "\n".join([HEAD, *darts_rows, VERLS, *verls_rows, ENVIRONMENT, *variable_rows, ""])


def default_of(info: FieldInfo) -> str:
    """The default as darts_base.yaml has it."""
    return info.json_schema_extra["yaml"] or shown(info.default)


def results_page() -> str:
    """The whole results.md: as it is, but for its tables."""
    return TABLE.sub(lambda found: f"{found[1]}{measured(*found.groups()[1:])}\n", RESULTS.read_text())


def measured(file: str, name: str, chosen: str | None) -> str:
    """A table of a committed document, of the arms or the numbers of GPUs that are chosen."""
    document_path = ROOT / "docs" / "results" / f"{file}.json"
    chosen_names = chosen.split(", ") if chosen else []
    if name not in ("notes", *report.TABLES):
        return documents.tell(document_path, name, [int(gpus) for gpus in chosen_names])
    _, results = report.load(document_path)
    results.arms = chosen_names or results.arms
    if name == "notes":
        return "\n".join(f"- {note}" for note in report.notes(results))
    return report.bench_table(results, name)


if __name__ == "__main__":
    sys.exit(main())
