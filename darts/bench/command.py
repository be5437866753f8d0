"""`python -m darts.bench`: strategies x seeds, interleaved on one warm engine and one trainer; and the other benches.

    python -m darts.bench --testbed overthink --arms strategies ablation --seeds 3 --out outputs/bench/overthink
    python -m darts.bench --config-dir conf --config-name mine --arms none --arm two=darts,darts.selection.num_long=2
    python -m darts.bench actor|allocate|budgets|overhead|overlap|rollouts --help

Contract. What is measured is in `darts.bench.trainer`, what the figures mean in `darts.bench.report`. The same command
goes on where it was stopped; with more `--seeds` it adds them. In the folder of `--out` it leaves bench.json,
table.md, PNG figures, the log run.log, and the traces of all arms for `darts.report` and `darts.simulation`.
`--report-only` makes tables and figures of what is there. A run whose log and records do not grow for `--silence`
minutes is ended with an error. SIGTERM and Ctrl-C end all that the command has started; a folder in which a bench runs
is refused. With a GPU the project's configurations run on `platform=gpu`.
"""

import argparse
import fcntl
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pandas import json_normalize

from darts import CONFIG_DIR
from darts.bench.arms import PRESETS, BenchArm, chosen
from darts.bench.harness import ENVIRONMENT, Options, exit_code, parse
from darts.bench.launch import run_trainer
from darts.bench.limits import BUFFER, RESPONSE
from darts.bench.plan import CONFIG, RECORDS, STATES, BenchPlan
from darts.bench.records import Records
from darts.bench.report import document, text
from darts.bench.states import POSITION
from darts.bench.statistics import BenchResults
from darts.config import ConfigError
from darts.evidence import documents
from darts.evidence.log import logger, refuse, say
from darts.evidence.machine import machine
from darts.testbed import LIMITS

BENCHES = ("actor", "allocate", "budgets", "overhead", "overlap", "rollouts")
"""The benches besides that of the arms; each is the `BENCH` of its module."""
MACHINE, DOCUMENT, TABLE, LOCK = "machine.json", "bench.json", "table.md", "running"
SETTINGS = ("seeds", "steps", "validate_every", "config_name")
OPTIONS: Options = {
    "--arms": (None, f"presets ({', '.join(PRESETS)}) or their arms", {"nargs": "+", "metavar": "NAME"}),
    "--arm": ([], "yours", {"action": "append", "metavar": "NAME=STRATEGY,darts.KEY=VALUE,..."}),
    "--testbed": (None, "sets testbed=...; None: the configuration's", {"choices": sorted(LIMITS)}),
    "--config-name": ("bench", "Hydra configuration"),
    "--config-dir": (CONFIG_DIR, "its folder"),
    "--override": ([], "of it, for all arms", {"action": "append", "metavar": "KEY=VALUE"}),
    "--seeds": (3, "orders of the prompts"),
    "--steps": (30, "of each arm and seed"),
    "--validate-every": (5, "steps; 0: never"),
    "--target": (None, "accuracy to time; None: that of plain verl's last third", {"type": float}),
    "--out": (Path("outputs/bench"), "folder"),
    "--silence": (15.0, "minutes without a step"),
    "--quick": (False, "preset quick, 1 seed, 6 steps: to try it out, in minutes"),
    "--report-only": (False, "run nothing"),
}


def options_of(given_arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `--quick` worked in; with `given`, as it was, and the `plan` that they make.

    Raises:
        ConfigError: arms that do not exist, or cannot be.
    """
    from verl_patches.device import is_cpu_only  # imports torch

    options = parse("", __doc__, OPTIONS, {"seeds": 1, "steps": 6, "validate_every": 3}, given_arguments)
    for name, least_value in (("seeds", 1), ("steps", 1), ("validate_every", 0)):
        if getattr(options, name) < least_value:
            refuse(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least_value}")
    platform_override = ["platform=gpu"] if options.config_dir == CONFIG_DIR and not is_cpu_only() else []
    testbed_override = [] if options.testbed is None else [f"testbed={options.testbed}"]
    preset_names = options.arms or ["quick" if options.quick else "strategies"]
    options.given, options.out = list(given_arguments), options.out.resolve()
    options.plan = BenchPlan(
        **{name: getattr(options, name) for name in SETTINGS},
        arms=list(chosen(preset_names, options.arm)),
        config_dir=str(options.config_dir.resolve()),
        overrides=[*platform_override, *testbed_override, *options.override],
    )
    return options


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds the folder's lock, which the run inherits: free when both have ended; `ConfigError` where it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        yield lock
    except BlockingIOError:
        process = os.pread(lock, 32, 0).decode().strip()
        rule, fix = f"has a bench that runs (process {process}).", f"wait for its end, or end it (kill {process})."
        raise ConfigError("--out", str(path.parent), rule, fix) from None
    finally:
        os.close(lock)


def report(options: argparse.Namespace) -> str:
    """Writes document, tables and figures of what is there; returns the tables.

    Raises:
        ConfigError: there is nothing.
    """
    from darts.bench.figures import write

    bench_records = Records(options.out / RECORDS).read()
    if not bench_records:
        raise ConfigError("--out", str(options.out), "has no records of a bench.", "run it without --report-only.")
    bench_plan = BenchPlan.load(options.out)
    results = BenchResults(bench_records, [arm.name for arm in bench_plan.arms], bench_plan.steps)
    bench_document = document(
        results,
        arms=[asdict(arm) for arm in bench_plan.arms],
        settings={"command": ["python", "-m", "darts.bench", *options.given], "overrides": bench_plan.overrides}
        | {name: getattr(bench_plan, name) for name in SETTINGS},
        config=_read(options.out / CONFIG),
        machine=_read(options.out / MACHINE),
        target=options.target,
    )
    documents.save(options.out / DOCUMENT, bench_document)
    tables = text(results, options.target)
    (options.out / TABLE).write_text(tables + "\n")
    write(results, options.out)
    return tables


def _composed(options: argparse.Namespace) -> dict[str, Any]:
    """The resolved configuration; `ConfigError` where it cannot be composed, or cannot work for an arm."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from darts.checks.run import check_run

    try:
        config = options.plan.compose(options.out)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        name = f"{options.plan.config_dir}/{options.plan.config_name}.yaml"
        raise ConfigError("--config-name", name, " ".join(str(error).split()), "correct it, or --override.") from error
    composed: Any = OmegaConf.to_container(config)
    estimator, control = config.algorithm.adv_estimator, config.algorithm.kl_ctrl.type
    if config.critic.enable or (config.critic.enable is None and estimator == "gae"):
        rule = f"algorithm.adv_estimator={estimator}: the arms of a bench would share the critic."
        fix = "set it to false, with an estimator that needs none."
        raise ConfigError("critic.enable", config.critic.enable, rule, fix)
    if config.algorithm.use_kl_in_reward and control != "fixed":
        rule = "the arms of a bench would share the controller."
        raise ConfigError("algorithm.kl_ctrl.type", control, rule, "set it to fixed.")
    block, bypass = composed["darts"], config.algorithm.rollout_correction.bypass_mode
    for arm in options.plan.arms:
        config.darts = arm.block(block)
        config.algorithm.rollout_correction.bypass_mode = arm.bypass or bypass
        try:
            arm.config(block, config.actor_rollout_ref.rollout.n)
            check_run(config)
            _check_limits(arm, config)
        except ConfigError as error:
            raise ConfigError("--arms", arm.name, f"cannot be: {error}", "change the arm.") from error
    return composed


def _check_limits(arm: BenchArm, config: Any) -> None:
    """Checks the arm's own limits on length; a `ConfigError` where they cannot be what plain verl would do."""
    from omegaconf import OmegaConf

    arm.limits.check(config.data.max_response_length)
    if arm.limits.response is not None and config.actor_rollout_ref.rollout.multi_turn.enable:
        key, rule = "actor_rollout_ref.rollout.multi_turn.enable", f"{RESPONSE} of an arm would limit each turn."
        raise ConfigError(key, True, rule, "remove the limit from the arm, or set it for all by --override.")
    if arm.limits.buffer is not None and OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg"):
        rule = "the reward manager of all arms has an overlong_buffer_cfg already."
        raise ConfigError(BUFFER, arm.limits.buffer, rule, "remove one of the two.")


def _prepare(options: argparse.Namespace, composed: Any) -> None:
    """Writes what the bench is into its folder, and adds the commit; `ConfigError` where nothing can be added there."""
    options.plan.save(options.out)
    made = json.loads(json.dumps(composed))
    here, there = (
        json_normalize(config).to_dict("records")[0] for config in (made, _read(options.out / CONFIG) or made)
    )
    if other := [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]:
        more = f" ({len(other) - 1} other keys differ too)" if len(other) > 1 else ""
        rule = f"has a bench with {other[0]}={there.get(other[0])}, where it is {here.get(other[0])} now{more}."
        fix = "choose another folder, or go back to what the bench began with."
        raise ConfigError("--out", str(options.out), rule, fix)
    documents.save(options.out / CONFIG, made)
    if Records(options.out / RECORDS).read() and not (options.out / STATES / POSITION).exists():
        rule = f"has {RECORDS}, but no longer the {STATES}/ to go on from."
        raise ConfigError("--out", str(options.out), rule, "look at it with --report-only, or choose another folder.")
    machine_here = machine(tuple(ENVIRONMENT))
    machine_there = _read(options.out / MACHINE) or machine_here | {"commits": []}
    commits = dict.fromkeys([*machine_there["commits"], machine_here["commit"]])
    documents.save(options.out / MACHINE, machine_there | {"commits": list(commits)})


def _read(file_path: Path) -> Any:
    return json.loads(file_path.read_text()) if file_path.exists() else {}


def run(options: argparse.Namespace) -> int:
    """Runs what is missing, and reports; the exit code."""
    started_at = time.monotonic()
    if not options.report_only:
        composed_block = _composed(options)
        with _locked(options.out / LOCK) as lock_file:
            _prepare(options, composed_block)
            run_trainer(options.plan, options.out, 60 * options.silence, lock=lock_file)
    logger.info(f"\n\n{report(options)}\n")
    say(f"done in {(time.monotonic() - started_at) / 60:.0f} min; tables, figures and {DOCUMENT} are in {options.out}")
    return 0


def main(given_arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    command_arguments = list(sys.argv[1:] if given_arguments is None else given_arguments)
    if command_arguments and command_arguments[0] in BENCHES:
        return importlib.import_module(f"darts.bench.{command_arguments[0]}").BENCH.main(command_arguments[1:])
    return exit_code(lambda: run(options_of(command_arguments)))
