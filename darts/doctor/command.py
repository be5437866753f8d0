"""The command: which facts, in which order, and what the exit code is.

    python -m darts.doctor                                 this machine
    python -m darts.doctor --communication                 and all nodes and GPUs of the cluster in RAY_ADDRESS
    python -m darts.doctor --communication --ranks 4       four processes where there is no GPU

Contract: one line per fact, as soon as it is known; exit code 1 if one is FAILED, 2 for options that make no sense.
torch, verl and Ray are imported when their facts are asked for.
"""

import argparse
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from darts.doctor.facts import (
    FAILED,
    OK,
    SETUP,
    WARNING,
    Fact,
    installed,
    installed_for,
    judge_gpus,
    judge_headers,
    list_gpus,
    machine_facts,
    version_facts,
)
from darts.evidence.log import OptionParser, logger

GROUPS = ("versions", "plugin", "device", "machine")
PADDED = "or actor_rollout_ref.model.override_config.attn_implementation=sdpa with model.use_remove_padding=False"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(prog="python -m darts.doctor", description="What is there, and will it work?")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="these facts alone")
    parser.add_argument(
        "--communication",
        action="store_true",
        help="also the nodes of the Ray cluster in RAY_ADDRESS (else a local Ray is started), and all-reduce between "
        "one process per GPU",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="processes on a machine without GPUs (default: 2)")
    parser.add_argument(
        "--limit-s", type=float, default=60.0, metavar="S", help="limit of every single wait (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the facts for machines; replaced if it exists")
    options = parser.parse_args(arguments)
    if options.ranks is not None:
        if not options.communication:
            parser.error(f"--ranks {options.ranks}: only with --communication")
        if options.ranks < 2:
            parser.error(f"--ranks {options.ranks}: must be at least 2, or there is nothing to communicate")
        if installed_for() == "gpu":
            parser.error(f"--ranks {options.ranks}: with GPUs there is one process per GPU; leave it out")
    if not 1 <= options.limit_s < math.inf:
        parser.error(f"--limit-s {options.limit_s:g}: must be at least 1")
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK):
        parser.error(f"--json {options.json}: a file cannot be written there")
    return options


def plugin_facts() -> Iterator[Fact]:
    """verl and vLLM load the plugin by themselves, in every process; a run without it would be plain verl."""
    try:
        import verl  # noqa: F401

        was_loaded = "verl_patches.register" in sys.modules
        from verl_patches import register  # raises what verl logs at DEBUG only

        plugin_state = register.assert_active()
    except Exception as error:
        yield Fact("plugin in verl", FAILED, f"{type(error).__name__}: {error}", SETUP)
    else:
        fix = "unset VERL_USE_EXTERNAL_PLUGINS, or name the plugin in it"
        value = ", ".join(("active", *plugin_state.applied)) if was_loaded else "verl did not load it"
        yield Fact("plugin in verl", OK if was_loaded else FAILED, value, fix="" if was_loaded else fix)
    points = [point for point in entry_points(group="vllm.general_plugins") if "verl_patches" in point.value]
    allowed_plugins = os.environ.get("VLLM_PLUGINS")
    if not points:
        yield Fact("plugin in vLLM", FAILED, "no entry point 'vllm.general_plugins'", SETUP)
    elif allowed_plugins is not None and points[0].name not in allowed_plugins.split(","):
        value = f"VLLM_PLUGINS={allowed_plugins} leaves it out"
        yield Fact("plugin in vLLM", FAILED, value, f"add {points[0].name} to it, or unset it")
    else:
        yield _importable("plugin in vLLM", points[0].module, f"{points[0].name} ({points[0].value})", SETUP)


def device_facts(elsewhere: bool = False) -> Iterator[Fact]:
    """The accelerator, and what only runs with it need."""
    import torch

    from verl_patches.device import is_cpu_only

    if is_cpu_only():
        yield Fact("device", OK, "no GPU: platform=cpu, with logical GPUs; for tries, not for timing")
        return
    seen_gpus, error_text = torch.cuda.device_count(), ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as init_error:
        seen_gpus, error_text = 0, str(init_error).splitlines()[0]
    yield from judge_gpus(list_gpus(), seen_gpus, torch.version.cuda, error_text, elsewhere)
    if installed("flash-attn") is None:
        value = "missing: verl's default attention, flash_attention_2, cannot be loaded"
        yield Fact("flash-attn", WARNING, value, f"install it (docs/smoke.md), {PADDED}")
    else:
        yield _importable("flash-attn", "flash_attn", str(installed("flash-attn")), "build it anew for this torch")
    cupy = "missing or broken: darts.placement=disaggregated cannot send weights"
    yield _importable("cupy", "cupy", cupy, SETUP, status=WARNING)
    if not (shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")):
        yield Fact("C compiler", FAILED, "none: Triton needs one", "install gcc, or set CC")
    yield judge_headers(sysconfig.get_paths()["include"], sysconfig.get_python_version())
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        value = "missing: vLLM (FlashInfer) compiles some kernels when they are first used"
        fix = f"install CUDA {torch.version.cuda}'s nvcc if an engine asks for it"
        yield Fact("nvcc", WARNING, value, fix)


def _importable(name: str, module: str, value: str, fix: str, status: str = FAILED) -> Fact:
    try:
        imported_module = import_module(module)
    except Exception as error:
        return Fact(name, status, f"{value}: {type(error).__name__}: {error}", fix)
    return Fact(name, OK, getattr(imported_module, "__version__", value))


def _all_facts(options: argparse.Namespace) -> Iterator[Fact]:
    if "versions" in options.only:
        yield from version_facts()
    if "plugin" in options.only:
        yield from plugin_facts()
    if "device" in options.only:
        yield from device_facts(elsewhere=options.communication and bool(os.environ.get("RAY_ADDRESS")))
    if "machine" in options.only:
        yield from machine_facts()
    if options.communication:
        from darts.doctor.communication import communication_facts

        yield from communication_facts(options.ranks or 2, options.limit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parse(arguments)
    start_s, facts = time.monotonic(), []
    for fact in _all_facts(options):
        facts.append(fact)
        print(fact.line(), flush=True)
    counts, seconds = Counter(fact.status for fact in facts), time.monotonic() - start_s
    summary = f"{counts[OK]} ok, {counts[WARNING]} warnings, {counts[FAILED]} failed, in {seconds:.0f} s"
    logger.info(f"doctor: {summary}")
    if options.json is not None:
        from darts.evidence.machine import machine

        document = {"format": "darts.doctor", "version": 1, "machine": machine(), "facts": [asdict(f) for f in facts]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if counts[FAILED] else 0
