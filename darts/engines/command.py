"""The command that measures the latency curve of an engine and writes it to a file.

    python -m darts.engines profile --out curve.json                                       the quickstart's model
    python -m darts.engines profile --out curve.json --config-name darts_trainer \\
        actor_rollout_ref.model.path=/models/mine actor_rollout_ref.rollout.tensor_model_parallel_size=4

Contract: composes the configuration as `recipe.darts.main_darts` does, and starts one engine as a training run with it
would, with the model's own weights, on a Ray of its own. A setting that cannot work is one line on stderr and exit code
2, before anything is started; an engine that cannot be measured is exit code 1. The file is replaced in one go, at the
end.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darts.checks.model import MODEL_KEY, model_config, vocabulary
from darts.config import ConfigError
from darts.engines.measure import MOST_PROMPT_TOKENS, TOKENS, ProfileError, Workload, profile_servers
from darts.evidence.log import OptionParser, logger, refuse
from darts.evidence.profile import KEY, LatencyProfile


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m darts.engines",
        description="Measures how long a decoding step of a rollout engine takes, by the number of running sequences, "
        "and writes the file that darts.latency.profile=FILE reads. Starts one engine, as a training run with this "
        "configuration would, on a Ray of its own.",
    )
    parser.add_argument("command", choices=["profile"], help="what to do")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for recipe.darts.main_darts")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the profile, JSON; replaced if it exists")
    add("--model", metavar="PATH", help=f"short for {MODEL_KEY}=PATH")
    add("--config-name", default="quickstart", help="e.g. darts_trainer (default: %(default)s)")
    add("--config-dir", type=Path, metavar="DIR", help="where it lies (default: the project's configs)")
    add("--largest", type=int, metavar="N", help="largest batch size (default: rollout.max_num_seqs)")
    fitting_default = f"default: {TOKENS}, or what fits into the context"
    add("--tokens", type=int, metavar="N", help=f"steps to be timed ({fitting_default})")
    longest_default = f"default: the longest prompt, at most {MOST_PROMPT_TOKENS}"
    add("--prompt-tokens", type=int, metavar="N", help=longest_default)
    add("--limit-s", type=float, default=180.0, metavar="S", help="for the measurement (default: %(default)s)")
    add("--verbose", action="store_true", help="show what the engine logs")
    options = parser.parse_intermixed_args(given)
    if not options.limit_s > 0:
        parser.error(f"--limit-s {options.limit_s:g}: must be positive")
    folder = next(parent for parent in options.out.absolute().parents if parent.exists())
    if options.out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--out {options.out}: a file cannot be written there")
    return options


def _configure(options: argparse.Namespace) -> Any:
    """The configuration of one standalone engine. Raises what `main` refuses."""
    from darts.checks.run import refuse_unknown_overrides
    from darts.engines.start import engine_config
    from verl_patches.device import is_cpu_only

    refuse_unknown_overrides(options.overrides)
    overrides = [] if options.config_name != "quickstart" or is_cpu_only() else ["platform=gpu"]
    overrides += options.overrides + ([f"{MODEL_KEY}={options.model}"] if options.model else [])
    config = engine_config(
        *overrides,
        response_length=None,
        max_model_len=None,
        config_name=options.config_name,
        config_dir=options.config_dir,
    )
    name = config.actor_rollout_ref.rollout.name
    if name != "vllm":
        raise ConfigError("actor_rollout_ref.rollout.name", name, "DARTS drives vLLM servers.", "set it to vllm.")
    return config


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 if it could not be measured, 2 for options that cannot work."""
    options = _parse(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    workload = {name: getattr(options, name) for name in ("largest", "tokens", "prompt_tokens")}
    try:
        config = _configure(options)
        model = config.actor_rollout_ref.model.path
        Workload.plan(config.actor_rollout_ref.rollout, vocabulary(model_config(model)), **workload)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        refuse(" ".join(str(error).split()))
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    from darts.engines.start import gpus_per_engine, local_ray, start_servers
    from verl_patches.vllm_stream_server import StreamingReplica

    start_s = time.monotonic()
    logger.info(f"starting one engine of {model}, which takes a minute or more ...")
    ray_session = local_ray(gpus_per_engine(config), get_ppo_ray_runtime_env(config)["env_vars"], options.verbose)
    with ray_session, start_servers(config, StreamingReplica) as manager:
        logger.info(f"it runs after {time.monotonic() - start_s:.0f} s; measuring for at most {options.limit_s:g} s")
        try:
            profile = asyncio.run(
                profile_servers(
                    manager.server_handles,
                    model,
                    limit_s=options.limit_s,
                    **workload,
                    seeded=config.get("darts", {}).get("seed") is not None,
                    command=f"python -m darts.engines {' '.join(sys.argv[1:] if given is None else given)}",
                    say=logger.info,
                )
            )
        except ProfileError as error:
            logger.error(error)
            return 1
    profile.save(options.out)
    print(table(profile))
    logger.info(
        f"written to {options.out} after {time.monotonic() - start_s:.0f} s; use it by {KEY}={options.out.absolute()}"
    )
    return 0


def table(profile: LatencyProfile) -> str:
    """A profile for people."""
    rows = [
        f"{batch_size:9d}  {seconds * 1e3:11.3f}  {batch_size / seconds:9,.0f}"
        for batch_size, seconds in zip(profile.batch_sizes, profile.seconds, strict=True)
    ]
    title = f"\n{profile.model} on {profile.device}, tensor parallel {profile.tensor_parallel}"
    return "\n".join([title, f"{'sequences':>9}  {'ms per step':>11}  {'tokens/s':>9}", *rows]) + "\n"
