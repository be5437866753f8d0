"""What `python -m darts.simulation` is given: options, and what they make.

Contract: everything that is wrong is a `SimulationError`, `TraceError` or `ConfigError` before anything is replayed.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from darts.config import STRATEGIES, ConfigError, DartsConfig
from darts.evidence.log import OptionParser
from darts.evidence.profile import LatencyProfile
from darts.evidence.trace import read_steps
from darts.latency import LatencyCurve
from darts.simulation import SimulationError
from darts.simulation.costs import CANDIDATE_SHARE, Cluster, StepCosts, fit
from darts.simulation.replay import ReplayArm, Setting
from darts.simulation.search import with_settings
from darts.simulation.trace import LengthTrace, read_trace
from darts.strategy import make_strategy

LEAST_STEPS = 20
"""A replay has no fewer by itself: rounds of some strategies come in cycles of four or five (our choice)."""
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BUILTIN = {
    # A 14B model over 4 GPUs with 148 TFLOPS and 4 TB/s each.
    "h20-like": (0.0078, 0.0080, 0.0083, 0.0088, 0.0122, 0.019, 0.033, 0.062, 0.119),
    # A 7B model on one GPU with 990 TFLOPS and 3.35 TB/s.
    "h100-like": (0.0077, 0.0079, 0.0082, 0.0087, 0.0097, 0.0119, 0.0180, 0.034, 0.066),
    # Memory-bound throughout: a step hardly grows with the batch.
    "flat": (0.0200, 0.0202, 0.0204, 0.0208, 0.0216, 0.0232, 0.0264, 0.0328, 0.0456),
}
"""Seconds of a step at `SIZES`: estimates of GPUs that nobody measured here (our choice), for a first look: as long as
reading the weights and each sequence's cache of 1,500 tokens takes at 80 % of the memory's bandwidth, or computing at
50 % of the peak where that is longer, plus launches and communication."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `command` and the arguments as `given`; ends the program with what is no such option."""
    parser = OptionParser(prog="python -m darts.simulation", description="Replays lengths through strategies.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="replay | plan | validate | table")
    common_options = _common()
    replay = commands.add_parser("replay", parents=[common_options], help="strategies side by side")
    replay.add_argument(
        "--strategy",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help=f"may be repeated; {', '.join(STRATEGIES)} (default: all), or package.module.Class",
    )
    replay.add_argument("--seeds", type=_positive, default=1, metavar="N", help="replays with other draws (default: 1)")
    replay.add_argument("--png", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    replay.add_argument(
        "--shaping",
        nargs=2,
        metavar=("PLAIN", "SHAPED"),
        help="a MODEL of how darts moves later lengths, fitted to the darts.jsonl of a plain and of a darts run",
    )
    commands.add_parser("plan", parents=[common_options], help="searches M_up, L, lambda and strategy")
    check = commands.add_parser("validate", parents=[common_options], help="simulated against measured seconds")
    check.add_argument("--bench", type=Path, required=True, metavar="FILE", help="JSON of the benchmark of strategies")
    check.add_argument(
        "--traces",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="lengths of the arms' own runs, ARM.jsonl, a folder for each seed (default: TRACE for all)",
    )
    table = commands.add_parser("table", help="a table of what --json wrote, as Markdown")
    table.add_argument("document", type=Path, metavar="FILE", help="what --json wrote")
    table.add_argument("--name", default="rows", help="rows, speed-ups, gaps or verdict (default: %(default)s)")
    table.add_argument("--gpus", type=_positive, nargs="+", default=[], metavar="N", help="of a replay (default: all)")
    given_words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given_words, argparse.Namespace(given=given_words))
    if options.command in ("plan", "validate") and len(options.gpus) > 1:
        parser.error(f"--gpus {' '.join(map(str, options.gpus))}: {options.command} takes one number")
    return options


def _common() -> argparse.ArgumentParser:
    common_options = OptionParser(add_help=False)
    add = common_options.add_argument
    add("trace", metavar="TRACE", help="CSV of lengths (.gz), or the darts.jsonl of a run")
    add("--gpus", type=_positive, nargs="+", default=[64], metavar="N", help="default: 64")
    add("--tensor-parallel", type=_positive, default=1, metavar="N", help="GPUs of an engine (default: 1)")
    add("--placement", choices=["colocated", "disaggregated"], default="colocated", help="default: %(default)s")
    add("--max-num-seqs", type=_positive, default=1024, metavar="N", help="of an engine (default: %(default)s)")
    add("--curve", default="h100-like", metavar="FILE", help=f"or {', '.join(BUILTIN)} (default: %(default)s)")
    add("--group-size", type=_positive, default=8, metavar="M", help="rollout.n (default: %(default)s)")
    add("--prompts", type=_positive, metavar="N", help="that a step trains on (default: the trace's)")
    add(
        "--response-length",
        type=_positive,
        metavar="N",
        help="limit in tokens; what is longer is cut (default: the trace's)",
    )
    add("--steps", type=_positive, metavar="N", help=f"default: the trace's, at least {LEAST_STEPS}")
    add("--first", type=int, metavar="STEP", help="leave out the trace's steps before")
    add("--last", type=int, metavar="STEP", help="leave out the trace's steps after")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of the block darts:, may be repeated")
    add("--abort-s", type=_seconds, default=0.0, metavar="S", help="until an abort arrives (default: 0)")
    add(
        "--fit",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="darts.jsonl of a plain run, or of several seeds: costs of a step besides decoding",
    )
    add("--fit-gpus", type=_positive, metavar="N", help="GPUs of these runs (default: the first of --gpus)")
    add(
        "--candidate-share",
        type=_seconds,
        default=CANDIDATE_SHARE,
        metavar="SHARE",
        help="of what their rollouts take besides decoding, what grows with the candidates (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="the figures")
    cost_names = ", ".join(StepCosts.__dataclass_fields__)
    add("--cost", action="append", default=[], metavar="NAME=VALUE", help=f"one of {cost_names}; may be repeated")
    return common_options


def inputs_of(options: argparse.Namespace) -> tuple[LengthTrace, list[Setting], int]:
    """The trace, what surrounds the strategies for each number of GPUs, and how many steps are to be replayed."""
    # 1. What is to be written can be.
    for name in ("json", "png"):
        path = getattr(options, name, None)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SimulationError(f"--{name} {path}: a file cannot be written there; name one in a folder that exists.")
    if getattr(options, "png", None) and importlib.util.find_spec("matplotlib") is None:
        raise SimulationError("--png: needs matplotlib; install verl-darts[report].")
    # 2. What is replayed, and what a step takes.
    trace = read_trace(options.trace).between(options.first, options.last)
    if options.response_length is not None:
        trace = trace.limited(options.response_length)
    curve, _ = load_curve(options.curve)
    costs = StepCosts()
    if options.fit is not None:
        ran_on = _cluster(options, options.fit_gpus or options.gpus[0])
        plain_runs = {path: read_steps(path, lambda step: step)[0] for path in options.fit}
        costs = fit(plain_runs, curve, ran_on, options.candidate_share)
    for cost_text in options.cost:
        cost_name, _, value = cost_text.partition("=")
        try:
            costs = replace(costs, **{cost_name: _seconds(value)})
        except (TypeError, ValueError):
            known = ", ".join(StepCosts.__dataclass_fields__)
            raise SimulationError(f"--cost {cost_text}: must be NAME=VALUE, not negative; names are {known}.") from None
    settings = [
        Setting(
            num_prompts=options.prompts or trace.prompts_per_step,
            group_size=options.group_size,
            response_length=options.response_length or trace.response_length,
            curve=curve,
            cluster=_cluster(options, gpus),
            costs=costs,
        )
        for gpus in options.gpus
    ]
    return trace, settings, options.steps or max(len(trace.steps), LEAST_STEPS)


def load_curve(name: str) -> tuple[LatencyCurve, str]:
    """A built-in curve by its name, or that of a file: a profile, or `LatencyCurve.to_dict()` as JSON.

    Returns:
        The curve, and one line that says what it is.

    Raises:
        SimulationError: neither a known name nor a file that holds a curve.
    """
    if name in BUILTIN:
        return LatencyCurve(SIZES, BUILTIN[name]), f"{name} (built in: an estimate, not measured)"
    curve_path = Path(name)
    if not curve_path.is_file():
        raise SimulationError(
            f"--curve {name}: neither a file nor one of {', '.join(BUILTIN)}; measure one with "
            "`python -m darts.engines profile --out FILE`."
        )
    try:
        curve_state = json.loads(curve_path.read_text())
        if isinstance(curve_state, dict) and set(curve_state) == {"batch_sizes", "seconds"}:
            return LatencyCurve.from_dict(curve_state), f"{curve_path}"
        profile = LatencyProfile.load(curve_path)
        return profile.curve(), f"{curve_path} ({profile.device}, tensor parallel {profile.tensor_parallel})"
    except (ConfigError, OSError, UnicodeDecodeError, ValueError) as error:
        error_text = " ".join(str(error).split())
        raise SimulationError(f"--curve {curve_path}: holds no latency curve: {error_text}") from None


def arms_of(options: argparse.Namespace) -> list[ReplayArm]:
    """`--strategy NAME[:KEY=VALUE,...]`: a strategy with settings of its own, beside those of `--set`."""
    arms = []
    for strategy_text in options.strategy or STRATEGIES:
        strategy_name, _, own_settings = strategy_text.partition(":")
        block = block_of([*options.set, *own_settings.split(",")] if own_settings else options.set)
        block["strategy"] = strategy_name
        # Refuses what cannot work.
        make_strategy(DartsConfig.from_block({"placement": options.placement, **block}, options.group_size), 1)
        arms.append(ReplayArm(name=strategy_text, block=block))
    return arms


def block_of(settings: Sequence[str]) -> dict[str, Any]:
    """`darts.selection.num_long=2` and the like as a block `darts:`; the prefix may be left out."""
    block: dict[str, Any] = {}
    for setting_text in settings:
        key, equals_sign, value_text = setting_text.partition("=")
        key = key.removeprefix("darts.")
        if not (equals_sign and all(key.split("."))):
            raise SimulationError(f"--set {setting_text}: must be KEY=VALUE, e.g. darts.selection.num_long=2.")
        try:
            value = json.loads(value_text)
        except ValueError:
            value = value_text
        block = with_settings(block, {key: value})
    return block


def _cluster(options: argparse.Namespace, gpus: int) -> Cluster:
    names = ("tensor_parallel", "placement", "max_num_seqs", "abort_s")
    return Cluster(gpus=gpus, **{name: getattr(options, name) for name in names})


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError(text)
    return value
