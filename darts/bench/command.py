"""`python -m darts.bench`: strategies x seeds, interleaved on one warm engine and one trainer.

    python -m darts.bench --testbed overthink --arms strategies ablation --seeds 3 --out outputs/bench/overthink
    python -m darts.bench --config-dir conf --config-name mine --arms none --arm two=darts,darts.selection.num_long=2

Contract. What is measured is in `darts.bench.trainer`, what the figures mean in `darts.bench.report`. The same command
goes on where it was stopped; with more `--seeds` it adds them. In the folder of `--out` it leaves bench.json,
table.md, PNG figures, the log run.log, and the traces of all arms for `darts.report` and `darts.simulation`.
`--report-only` makes tables and figures of what is there. A run whose log and records do not grow for `--silence`
minutes is ended with an error. SIGTERM and Ctrl-C end all that the command has started; a folder in which a bench runs
is refused. With a GPU the project's configurations run on `platform=gpu`.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts import CONFIG_DIR
from darts.bench.arms import PRESETS, chosen
from darts.bench.harness import ENVIRONMENT, machine
from darts.bench.plan import CONFIG, RECORDS, STATES, BenchPlan
from darts.bench.records import Record, Records, StepRecord
from darts.bench.report import BASE, document, save, text
from darts.bench.states import POSITION
from darts.bench.statistics import Results
from darts.config import ConfigError
from darts.evidence.log import say
from darts.testbed import LIMITS

LOG, MACHINE, DOCUMENT, TABLE, LOCK = "run.log", "machine.json", "bench.json", "table.md", "running"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's options."""

    plan: BenchPlan
    out: Path
    target: float | None
    silence_s: float
    report_only: bool
    given: list[str]


def options_of(given: Sequence[str]) -> Options:
    """The options, with `--quick` worked in.

    Raises:
        ConfigError: arms that do not exist, or cannot be.
    """
    from verl_patches.device import is_cpu_only  # imports torch

    parser = argparse.ArgumentParser(
        prog="python -m darts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(PRESETS)
    parser.add_argument("--arms", nargs="+", default=None, metavar="NAME", help=f"presets ({names}) or their arms")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=STRATEGY,darts.KEY=VALUE,...", help="yours")
    parser.add_argument("--testbed", choices=sorted(LIMITS), help="sets testbed=... (default: the configuration's)")
    parser.add_argument("--config-name", default="bench", help="Hydra configuration (default: %(default)s)")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="its folder (default: the project's)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of it, for all arms")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of each arm and seed (default: %(default)s)")
    parser.add_argument("--validate-every", type=int, default=5, help="steps; 0: never (default: %(default)s)")
    parser.add_argument("--target", type=float, help="accuracy to time; default: that of plain verl's last third")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--silence", type=float, default=15, help="minutes without a step (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="preset quick, 1 seed, 6 steps: to try it out, in minutes")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    if "--quick" in given:
        parser.set_defaults(seeds=1, steps=6, validate_every=3)
    options = parser.parse_args(list(given))
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.validate_every < 0:
        parser.error(f"--validate-every {options.validate_every}: must not be negative")
    platform = ["platform=gpu"] if options.config_dir == CONFIG_DIR and not is_cpu_only() else []
    testbed = [] if options.testbed is None else [f"testbed={options.testbed}"]
    arms = options.arms if options.arms is not None else ["quick" if options.quick else "strategies"]
    plan = BenchPlan(
        arms=list(chosen(arms, options.arm)),
        seeds=options.seeds,
        steps=options.steps,
        validate_every=options.validate_every,
        config_name=options.config_name,
        config_dir=str(options.config_dir.resolve()),
        overrides=[*platform, *testbed, *options.override],
    )
    return Options(
        plan=plan,
        out=options.out.resolve(),
        target=options.target,
        silence_s=60 * options.silence,
        report_only=options.report_only,
        given=list(given),
    )


def run(options: Options, lock: int) -> None:
    """Runs what is missing, with a line for each round.

    Args:
        lock: of `_locked`.

    Raises:
        RuntimeError: the run failed, or said nothing for too long; its log is named.
    """
    plan, log = options.plan, options.out / LOG
    quiet = {"VERL_LOGGING_LEVEL": "WARN"}  # verl's checkpoints say several lines each
    environment = ENVIRONMENT | quiet | dict(os.environ) | {"PYTHONPATH": _python_path()}
    command = [sys.executable, "-m", "darts.bench.trainer", str(options.out)]
    rounds = len(list(plan.turns()))
    say(f"{len(plan.arms)} arms x {plan.seeds} seeds x {plan.steps} steps in {options.out}; starting the engine ...")
    with log.open("a") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock],
        )
        os.pwrite(lock, f"{child.pid}\n".encode(), 0)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            _follow(child, options, rounds)
        finally:
            _end(child)
            signal.signal(signal.SIGTERM, before)
    if child.returncode:
        raise RuntimeError(f"the bench ended with exit code {child.returncode}; see {log}")


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds the folder's lock, which the run inherits: it is free when both have ended, however they did.

    Raises:
        ConfigError: a bench runs there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        yield lock
    except BlockingIOError:
        process = os.pread(lock, 32, 0).decode().strip()
        raise ConfigError(
            "--out",
            str(path.parent),
            f"has a bench that runs (process {process}).",
            f"wait for its end, or end it (kill {process}).",
        ) from None
    finally:
        os.close(lock)


def _follow(child: subprocess.Popen, options: Options, rounds: int) -> None:
    """Waits for the end, and tells what is new."""
    records, arms = Records(options.out / RECORDS), [arm.name for arm in options.plan.arms]
    files = (options.out / RECORDS, options.out / LOG)
    last, began, told = time.monotonic(), None, -1
    sizes = [-1, -1]
    while child.poll() is None:
        time.sleep(1)
        before, sizes = sizes, [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes != before:
            last = time.monotonic()
        elif time.monotonic() - last > options.silence_s:
            raise RuntimeError(
                f"the run has said nothing for {options.silence_s / 60:g} minutes (--silence); see {options.out / LOG}"
            )
        if sizes[0] != before[0]:
            done = [record for record in records.read() if isinstance(record, StepRecord)]
            complete = len(done) // len(arms)
            if told < 0:
                told, began = complete, (complete, time.monotonic())
                if complete:
                    say(f"{complete} of {rounds} rounds are there; going on")
            elif complete > told:
                told = complete
                _tell_round(done[-len(arms) :], complete, rounds, began)


def _tell_round(steps: Sequence[StepRecord], complete: int, rounds: int, began: tuple[int, float]) -> None:
    seconds = ", ".join(f"{step.arm} {step.step_s:.2f}" for step in sorted(steps, key=lambda step: step.arm))
    rate = (time.monotonic() - began[1]) / max(complete - began[0], 1)
    left = (rounds - complete) * rate / 60
    say(
        f"round {complete}/{rounds} (seed {steps[-1].seed}, step {steps[-1].step}), about {left:.0f} min left; "
        f"seconds: {seconds}"
    )


def _end(child: subprocess.Popen) -> None:
    """Ends the run and all that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(timeout=30)


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([before] if before else [])])


def report(options: Options) -> str:
    """Writes document, tables and figures of what is there; returns the tables.

    Raises:
        ConfigError: there is nothing.
    """
    from darts.bench.figures import write

    found: list[Record] = Records(options.out / RECORDS).read()
    if not found:
        raise ConfigError("--out", str(options.out), "has no records of a bench.", "run it without --report-only.")
    plan = BenchPlan.load(options.out)
    results = Results(found, [arm.name for arm in plan.arms], plan.steps)
    opened = document(
        results,
        arms=[arm.to_dict() for arm in plan.arms],
        settings={"command": ["python", "-m", "darts.bench", *options.given], "overrides": plan.overrides}
        | {name: getattr(plan, name) for name in ("seeds", "steps", "validate_every", "config_name")},
        config=_read(options.out / CONFIG),
        machine=_read(options.out / MACHINE),
        target=options.target,
    )
    save(options.out / DOCUMENT, opened)
    tables = text(results, BASE, options.target)
    (options.out / TABLE).write_text(tables + "\n")
    write(results, options.out)
    return tables


def _composed(options: Options) -> dict[str, Any]:
    """The resolved configuration, checked before an engine starts.

    Raises:
        ConfigError: it cannot be composed, or cannot work for an arm.
    """
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
    if config.critic.enable or (config.critic.enable is None and config.algorithm.adv_estimator == "gae"):
        raise ConfigError(
            "critic.enable",
            config.critic.enable,
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}: the arms of a bench would share the critic.",
            "set it to false, with an estimator that needs none.",
        )
    if config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.type != "fixed":
        raise ConfigError(
            "algorithm.kl_ctrl.type",
            config.algorithm.kl_ctrl.type,
            "the arms of a bench would share the controller.",
            "set it to fixed.",
        )
    block, bypass = composed["darts"], config.algorithm.rollout_correction.bypass_mode
    for arm in options.plan.arms:
        config.darts = arm.block(block)
        config.algorithm.rollout_correction.bypass_mode = arm.bypass or bypass
        try:
            check_run(config)
        except ConfigError as error:
            raise ConfigError("--arms", arm.name, f"cannot be: {error}", "change the arm.") from error
    return composed


def _prepare(options: Options, composed: Any) -> None:
    """Writes what the bench is into its folder, or finds the same there.

    Raises:
        ConfigError: the folder has another bench, or measurements that nothing can be added to.
    """
    options.plan.save(options.out)
    text = json.dumps(composed, indent=1) + "\n"
    here = dict(_leaves(json.loads(text)))
    there = dict(_leaves(_read(options.out / CONFIG))) if (options.out / CONFIG).exists() else here
    other = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if other:
        raise ConfigError(
            "--out",
            str(options.out),
            f"has a bench with {other[0]}={there.get(other[0])}, where it is {here.get(other[0])} now"
            + (f" ({len(other) - 1} other keys differ too)." if len(other) > 1 else "."),
            "choose another folder, or go back to what the bench began with.",
        )
    (options.out / CONFIG).write_text(text)
    if Records(options.out / RECORDS).read() and not (options.out / STATES / POSITION).exists():
        raise ConfigError(
            "--out",
            str(options.out),
            f"has {RECORDS}, but no longer the {STATES}/ to go on from.",
            "look at it with --report-only, or choose another folder.",
        )
    _note_machine(options.out / MACHINE)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a configuration, by dotted path."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _note_machine(path: Path) -> None:
    """Keeps what the bench began on; commits of a later start are added."""
    here = machine()
    there = _read(path) or here | {"commits": []}
    if here["commit"] not in there["commits"]:
        there["commits"].append(here["commit"])
    path.write_text(json.dumps(there) + "\n")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    began = time.monotonic()
    try:
        options = options_of(sys.argv[1:] if given is None else given)
        if not options.report_only:
            composed = _composed(options)
            with _locked(options.out / LOCK) as lock:
                _prepare(options, composed)
                run(options, lock)
        print(f"\n{report(options)}\n")
    except ConfigError as error:
        print(f"[darts] {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"[darts] {error}", file=sys.stderr)
        return 1
    say(f"done in {(time.monotonic() - began) / 60:.0f} min; tables, figures and bench.json are in {options.out}")
    return 0
