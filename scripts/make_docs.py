"""Writes docs/configuration.md: the keys of `darts:` from their types, what darts_base.yaml sets of verl's, and the
environment. From the repository's root:

    .venv/bin/python scripts/make_docs.py           writes it
    .venv/bin/python scripts/make_docs.py --check   exit code 1 if it is not what would be written
"""

import argparse
import sys
import types
import typing
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml

from darts import CONFIG_DIR
from darts.config import SECTIONS, DartsConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Made by `scripts/make_docs.py` from the typed configuration; a test compares. `configs/darts_base.yaml` has the same
keys with longer comments; [tuning.md](tuning.md) says which to choose. A bad value or an unknown key is one line with
the key, the value, the rule and the fix, before Ray starts.

## The block `darts:`

M is `actor_rollout_ref.rollout.n`, the responses per prompt that are trained on.

| key | paper | default | type | meaning |
|---|---|---|---|---|
"""
VERLS = """
## Keys of verl's that `darts_base.yaml` sets

Everything else of verl's `ppo_trainer.yaml` stays as it is.

| key | value | why |
|---|---|---|
"""
ENVIRONMENT = """
## Environment

| variable | read by | meaning |
|---|---|---|
"""
VARIABLES = (
    ("DARTS_ALLOW_OTHER_VERL=1", "a run", "tries a verl that the plugin was not tested with"),
    ("RAY_ADDRESS", "a run", "joins that cluster instead of starting a Ray of its own"),
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
    text = page()
    if parser.parse_args().check:
        same = PAGE.exists() and PAGE.read_text() == text
        print(f"{PAGE.name}: {'up to date' if same else 'differs: run scripts/make_docs.py'}")
        return int(not same)
    PAGE.write_text(text)
    print(f"written: {PAGE}")
    return 0


def page() -> str:
    """The whole page."""
    base = yaml.safe_load((CONFIG_DIR / "darts_base.yaml").read_text())
    block = base.pop("darts")
    del base["defaults"]
    rows = []
    for field in fields(DartsConfig):
        if field.name in SECTIONS:
            types_of = typing.get_type_hints(SECTIONS[field.name])
            rows += [
                row(f"darts.{field.name}.{part.name}", part, block[field.name][part.name], types_of[part.name])
                for part in fields(SECTIONS[field.name])
            ]
        elif field.name != "group_size":
            kind = typing.get_type_hints(DartsConfig)[field.name]
            rows.append(row(f"darts.{field.name}", field, block[field.name], kind))
    verls = [f"| `{key}` | `{shown(value)}` | {REASONS[key]} |" for key, value in leaves(base)]
    variables = "".join(f"| `{name}` | {reader} | {meaning} |\n" for name, reader, meaning in VARIABLES)
    return HEAD + "\n".join(rows) + "\n" + VERLS + "\n".join(verls) + "\n" + ENVIRONMENT + variables


def row(key: str, field: Field[Any], default: object, kind: Any) -> str:
    """One line of the table; `default` is the setting's, as the YAML file has it."""
    return (
        f"| `{key}` | {field.metadata.get('paper', '')} | `{shown(default)}` | {type_name(kind)} | "
        f"{field.metadata['help']} |"
    )


def type_name(kind: Any) -> str:
    """For people, e.g. `number or null`."""
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(names[part] for part in parts)


def shown(value: object) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def leaves(tree: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Every key with its value, by its dotted path."""
    found = []
    for name, value in tree.items():
        key = f"{path}.{name}" if path else name
        found += leaves(value, key) if isinstance(value, dict) else [(key, value)]
    return found


if __name__ == "__main__":
    sys.exit(main())
