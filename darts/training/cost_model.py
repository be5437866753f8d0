"""The cost model that a run starts with: the refinement in its checkpoint, a profile's, or a measurement's.

Contract. Called once, before the first rollout, while the engines are awake. A refinement counts if it is of engines
like these, and of the profile that the settings name if they name one; otherwise it is measured, or read, anew, which a
line says. Engines that cannot be measured are a warning: the run then goes without a cost model.
"""

import asyncio
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from darts.checks.model import model_id
from darts.checks.run import latency_profile
from darts.config import DartsConfig
from darts.engines.measure import ProfileError, engine_device, kv_capacity, profile_servers
from darts.evidence.log import logger
from darts.evidence.profile import LatencyProfile
from darts.forecast import CostModel, MeasuredEngines


def first_cost_model(
    config: DictConfig, darts: DartsConfig, servers: list[Any], saved: CostModel | None, adaptive: bool
) -> CostModel | None:
    """What `darts.latency.profile` asks for.

    Args:
        config: the run's.
        darts: its block `darts:`.
        servers: handles of the rollout servers.
        saved: of the state that the run resumes from.
        adaptive: whether budgets depend on it.
    """
    latency_settings, profile = darts.latency, latency_profile(config, darts)
    if latency_settings.profile == "off" or (latency_settings.profile == "auto" and not adaptive):
        return None
    try:
        engines = asyncio.run(asyncio.wait_for(_engines_of(config, servers), latency_settings.profile_s))
    except asyncio.TimeoutError:
        _warn_of_no_model(darts, f"a server did not answer within {latency_settings.profile_s:g} s: look at its log.")
        return None
    if profile is not None:
        profile.require(latency_settings.profile, profile.model_id, profile.tensor_parallel, engines.device)
    # 1. The refinement in the state, if it is of the same engines and the same file.
    if saved is not None:
        is_other_file = profile is not None and saved.source != source_of(profile)
        differences = ["of no known engines"] if saved.engines is None else engines.differences(saved.engines)
        if not differences and not is_other_file:
            saved.engines = engines
            return saved
        reason = ", ".join(differences) or f"of another profile ({saved.source})"
        logger.warning(f"the checkpoint's latency model is of another engine ({reason}): it is not used")
    # 2. The file, or a measurement.
    if profile is None:
        profile = _measured_profile(config, darts, servers)
    return None if profile is None else CostModel(profile.curve(), source_of(profile), engines=engines)


async def _engines_of(config: DictConfig, servers: list[Any]) -> MeasuredEngines:
    """The engines of this run, as configured and as a server tells."""
    actor_config = config.actor_rollout_ref
    rollout = actor_config.rollout
    return MeasuredEngines(
        model=model_id(actor_config.model.path),
        device=await engine_device(servers[0]),
        tensor_parallel=rollout.tensor_model_parallel_size,
        engines=len(servers) * rollout.data_parallel_size,
        max_num_seqs=rollout.max_num_seqs,
        kv_tokens=await kv_capacity(servers[0]),
    )


def _measured_profile(config: DictConfig, darts: DartsConfig, servers: list[Any]) -> LatencyProfile | None:
    """Measures the engines; None, with a warning, where they cannot be measured."""
    profile_path, limit_s = Path(config.trainer.default_local_dir) / "latency.json", darts.latency.profile_s
    logger.info(f"measuring the engines for at most {limit_s:g} s (darts.latency.profile=auto)")
    pending_profile = profile_servers(
        servers, config.actor_rollout_ref.model.path, limit_s=limit_s, seeded=darts.seed is not None, say=logger.info
    )
    try:
        profile = asyncio.run(pending_profile)
    except (ProfileError, ValueError) as error:  # ValueError: the settings leave nothing to measure
        _warn_of_no_model(darts, str(error))
        return None
    try:
        profile.save(profile_path)
        logger.info(f"the latency profile is in {profile_path}")
    except OSError as cause:
        warnings.warn(f"{profile_path}: the latency profile cannot be kept: {cause}", stacklevel=2)
    return profile


def _warn_of_no_model(darts: DartsConfig, reason: str) -> None:
    warnings.warn(
        f"darts.latency.profile={darts.latency.profile}: {reason} "
        f"There is no cost model: the mean number of candidates is {darts.allocation.fallback_mean:g}.",
        stacklevel=3,
    )


def source_of(profile: LatencyProfile) -> str:
    """Tells one profile from another, in the state."""
    return f"{profile.model_id}, tensor parallel {profile.tensor_parallel}, {profile.device}, {profile.date}"
