"""GPUs, and the engines that they make.

Contract: pure. `colocated`: all GPUs generate, then all train. `disaggregated`: a share of them generates, the others
train; the phases of a step follow one another all the same, since rollouts are synchronous.
"""

from dataclasses import dataclass

import numpy as np

from darts.latency import LatencyCurve
from darts.simulation import SimulationError
from darts.simulation.rollout import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a run has. Example: `Cluster(gpus=64, tensor_parallel=4)` has 16 engines.

    Raises:
        SimulationError: not one engine, engines that do not fill the GPUs, or no GPU to train on.
    """

    gpus: int
    tensor_parallel: int = 1
    placement: str = "colocated"
    rollout_share: float = 0.5  # of the GPUs, where disaggregated (the paper's half)
    max_num_seqs: int = 1024  # of an engine
    abort_s: float = 0.0  # from the decision to abort to its arrival at the engine

    def __post_init__(self) -> None:
        is_uneven = self.tensor_parallel < 1 or self.rollout_gpus % self.tensor_parallel
        if is_uneven or self.engines < 1 or self.train_gpus < 1:
            raise SimulationError(
                f"gpus={self.gpus}, tensor_parallel={self.tensor_parallel}, {self.placement}: at least one engine and "
                f"one GPU that trains are needed, and engines must fill the {self.rollout_gpus} GPUs that generate; "
                "take another number of GPUs, or another tensor-parallel size."
            )
        if self.max_num_seqs < 1 or not 0 <= self.abort_s < np.inf:
            raise SimulationError(
                f"max_num_seqs={self.max_num_seqs}, abort_s={self.abort_s}: an engine runs at least 1 sequence, and "
                "seconds are finite and not negative."
            )

    @property
    def rollout_gpus(self) -> int:
        """GPUs that generate."""
        return self.gpus if self.placement == "colocated" else int(self.gpus * self.rollout_share)

    @property
    def engines(self) -> int:
        """Replicas of the model that generate."""
        return self.rollout_gpus // self.tensor_parallel

    @property
    def train_gpus(self) -> int:
        """GPUs that compute log-probs and updates."""
        return self.gpus if self.placement == "colocated" else self.gpus - self.rollout_gpus

    def fleet(self, curve: LatencyCurve, candidates: int) -> Fleet:
        """The engines, for rollouts of at most so many candidates."""
        most_running = min(self.max_num_seqs, candidates)
        step_seconds = curve(np.arange(most_running + 1)).tolist()
        return Fleet(engines=self.engines, slots=self.max_num_seqs, step_seconds=step_seconds, abort_s=self.abort_s)
