"""The cost model that a run starts with: the refinement in its checkpoint, a profile's, or a measurement's.

Contract. Called once, before the first rollout, while the engines are awake. A refinement counts if it is of these
engines, or of the profile that the settings name. Engines that cannot be measured are a warning: the run then goes
without a cost model.
"""

import asyncio
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from darts.checks.model import model_id
from darts.checks.run import latency_profile
from darts.config import DartsConfig
from darts.engines.measure import ProfileError, engine_device, profile_servers
from darts.evidence.log import logger
from darts.evidence.profile import LatencyProfile
from darts.forecast import CostModel


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
    latency_settings = darts.latency
    profile = latency_profile(config, darts)
    if profile is not None:
        engine_name = asyncio.run(asyncio.wait_for(engine_device(servers[0]), latency_settings.profile_s))
        profile.require(latency_settings.profile, profile.model_id, profile.tensor_parallel, engine_name)
    if latency_settings.profile == "off" or (latency_settings.profile == "auto" and not adaptive):
        return None
    if saved is not None:
        if profile is not None and saved.source == source_of(profile):
            return saved
        if profile is None and saved.source.startswith(engine_of(config)):
            return saved
    if profile is None:
        if saved is not None:
            logger.info(f"the checkpoint's latency model is of another engine ({saved.source})")
        profile = _measured_profile(config, darts, servers)
    return None if profile is None else CostModel(profile.curve(), source_of(profile))


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
        warnings.warn(
            f"darts.latency.profile=auto: {error} There is no cost model: the mean number of candidates is "
            f"{darts.allocation.fallback_mean:g}.",
            stacklevel=2,
        )
        return None
    try:
        profile.save(profile_path)
        logger.info(f"the latency profile is in {profile_path}")
    except OSError as cause:
        warnings.warn(f"{profile_path}: the latency profile cannot be kept: {cause}", stacklevel=2)
    return profile


def source_of(profile: LatencyProfile) -> str:
    """Tells one profile from another, in the state."""
    return f"{profile.model_id}, tensor parallel {profile.tensor_parallel}, {profile.device}, {profile.date}"


def engine_of(config: DictConfig) -> str:
    """How the source of a profile of this run's engines begins."""
    actor_config = config.actor_rollout_ref
    return f"{model_id(actor_config.model.path)}, tensor parallel {actor_config.rollout.tensor_model_parallel_size}, "
