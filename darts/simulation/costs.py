"""GPUs and the engines that they make; seconds of a step besides decoding, and their fit to a plain run.

Contract: pure. `colocated`: all GPUs generate, then all train. `disaggregated`: a share of them generates, the others
train; the phases of a step follow one another all the same, since rollouts are synchronous. Seconds (our choice
throughout):

    rollout  = decoding + rollout_s + candidate_s x candidates launched / engines + contention x hidden log-probs
    log-prob = log_prob_s + log_prob_token_s x trained tokens / training GPUs, less what is hidden under generation
    update   = update_s + update_token_s x trained tokens / training GPUs
    step     = rollout + log-prob + update + sync_s + other_s

1. Tokens are those of responses. What prompts take is in the constants.
2. Training is taken to scale perfectly with the GPUs that train: time per token is in GPU-seconds.
3. `bypass` computes no log-probs. Where the overlap is on, `hidden_share` of them is hidden (docs/overlap.md measured
   93 to 99 %). It is not free where actor and engines share GPUs (`colocated`): each hidden second makes generation
   `contention` seconds longer; 1 is that nothing is won, as on CPUs that both keep busy (our choice: measure it).
4. `fit` reads plain runs, and nothing is fitted per strategy. Slopes are Theil and Sen's (medians of pairs), so that
   single slow steps do not turn a line; constants are such that the mean over the steps comes out, since means are what
   is compared. The first step of a run is left out where it has more than three, since it warms up.
5. What a rollout takes besides decoding is prefill and requests, so it is counted per candidate (`candidate_share`). A
   plain run always launches as many, so it cannot tell. With a share of 0 more candidates would be free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darts.evidence.trace import TracedStep
from darts.latency import LatencyCurve, makespan
from darts.simulation import SimulationError

MOST_STEPS = 300
"""Steps of a run that a fit takes: the last ones."""
CANDIDATE_SHARE = 1.0
"""The part of what a rollout takes besides decoding that grows with the number of candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a run has. Example: `Cluster(gpus=64, tensor_parallel=4)` has 16 engines.

    Raises:
        SimulationError: not one engine, engines that do not fill the GPUs, or no GPU to train on.
    """

    gpus: int
    tensor_parallel: int = 1
    placement: str = "colocated"
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
        """GPUs that generate; where disaggregated the paper's half."""
        return self.gpus if self.placement == "colocated" else self.gpus // 2

    @property
    def engines(self) -> int:
        """Replicas of the model that generate."""
        return self.rollout_gpus // self.tensor_parallel

    @property
    def train_gpus(self) -> int:
        """GPUs that compute log-probs and updates."""
        return self.gpus if self.placement == "colocated" else self.gpus - self.rollout_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step by phase. Example: rollout=61.2, log_prob=4.5, update=18.1, sync=2.0, other=3.0."""

    rollout: float
    log_prob: float
    update: float
    sync: float
    other: float

    @property
    def step(self) -> float:
        """All of them."""
        return self.rollout + self.log_prob + self.update + self.sync + self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What the module's contract names. Defaults are orders of magnitude for a 7B model on H100s (our choice: 2 and 8
    FLOPs per parameter and token at 400 TFLOPS); fit them to a run of yours."""

    rollout_s: float = 1.0
    candidate_s: float = 0.0  # engine-seconds
    log_prob_s: float = 0.5
    log_prob_token_s: float = 40e-6  # GPU-seconds
    hidden_share: float = 0.98
    contention: float = 1.0  # seconds of generation per hidden second, colocated
    update_s: float = 1.0
    update_token_s: float = 160e-6  # GPU-seconds
    sync_s: float = 2.0
    other_s: float = 1.0

    def time(
        self, cluster: Cluster, decode_s: float, launched: int, tokens: int, *, bypass: bool, overlap: bool
    ) -> StepTime:
        """One step that decoded for `decode_s`, launched so many candidates, and trains on responses of so many tokens.

        Args:
            bypass: the servers' log-probs are taken.
            overlap: log-probs are computed while generation runs.
        """
        log_prob = 0.0 if bypass else self.log_prob_s + self.log_prob_token_s * tokens / cluster.train_gpus
        hidden_s = log_prob * self.hidden_share * overlap
        slower_s = self.contention * hidden_s if cluster.placement == "colocated" else 0.0
        return StepTime(
            rollout=decode_s + self.rollout_s + self.candidate_s * launched / cluster.engines + slower_s,
            log_prob=log_prob - hidden_s,
            update=self.update_s + self.update_token_s * tokens / cluster.train_gpus,
            sync=self.sync_s,
            other=self.other_s,
        )


def fit(
    runs: Mapping[Path, Sequence[TracedStep]],
    curve: LatencyCurve,
    cluster: Cluster,
    candidate_share: float = CANDIDATE_SHARE,
) -> StepCosts:
    """The costs of plain runs (`darts.strategy=none`) that differ in their seeds alone.

    Args:
        runs: their steps, by the path of the JSONL.
        candidate_share: of what a rollout takes besides decoding, what grows with the number of candidates.

    Raises:
        SimulationError: a run without a step with a rollout and times, or with one that is not of a plain run.
    """
    timed_steps = [step for path, steps in runs.items() for step in _timed(path, steps)]

    def seconds(phase_name: str) -> NDArray[np.float64]:
        return np.array([step.metrics.get(f"timing_s/{phase_name}", 0.0) for step in timed_steps])

    # 1. What each rollout took besides decoding.
    all_lengths = [np.concatenate(list(step.lengths)) for step in timed_steps]
    step_tokens = np.array([lengths.sum() for lengths in all_lengths], dtype=np.float64)
    decode_seconds = [
        makespan([lengths[engine :: cluster.engines] for engine in range(cluster.engines)], curve, cluster.max_num_seqs)
        for lengths in all_lengths
    ]
    overhead_s = max(float(np.mean(seconds("gen") - decode_seconds)), 0.0)
    # 2. The other phases: by token where they grow with the tokens, else the mean.
    phases = ("gen", "old_log_prob", "update_actor", "update_weights", "save_checkpoint")
    rest_seconds = seconds("step") - sum(seconds(name) for name in phases)
    log_prob_s, log_prob_token_s = line(step_tokens / cluster.train_gpus, seconds("old_log_prob"))
    update_s, update_token_s = line(step_tokens / cluster.train_gpus, seconds("update_actor"))
    per_candidate = candidate_share * overhead_s * cluster.engines / np.mean([len(lengths) for lengths in all_lengths])
    return StepCosts(
        rollout_s=(1 - candidate_share) * overhead_s,
        candidate_s=float(per_candidate),
        log_prob_s=log_prob_s,
        log_prob_token_s=log_prob_token_s,
        update_s=update_s,
        update_token_s=update_token_s,
        sync_s=float(np.mean(seconds("update_weights"))),
        other_s=max(float(np.mean(rest_seconds)), 0.0),
    )


def _timed(path: Path, steps: Sequence[TracedStep]) -> list[TracedStep]:
    """The steps of a plain run that count."""
    timed_steps = [step for step in steps if step.keys and {"timing_s/gen", "timing_s/step"} <= step.metrics.keys()]
    if not timed_steps:
        raise SimulationError(
            f"{path}, line {steps[0].line}: no step has a rollout, timing_s/gen and timing_s/step; give the "
            "darts.jsonl of a run with darts.strategy=none."
        )
    for step in timed_steps:
        if set("".join(step.fates)) - set("kf"):
            raise SimulationError(
                f"{path}, line {step.line}: has candidates that were dropped, aborted or lost, so it is no plain run; "
                "give the darts.jsonl of a run with darts.strategy=none."
            )
    return (timed_steps[1:] if len(timed_steps) > 3 else timed_steps)[-MOST_STEPS:]


def line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of y over x by Theil and Sen, and the constant with which the mean comes out; through the origin, or flat,
    where one would be negative."""
    first_index, second_index = np.triu_indices(len(x), 1)
    x_differ = x[first_index] != x[second_index]
    slopes = (y[second_index] - y[first_index])[x_differ] / (x[second_index] - x[first_index])[x_differ]
    slope = float(np.median(slopes)) if len(slopes) else 0.0
    constant = float(np.mean(y - slope * x))
    if slope < 0:
        return float(np.mean(y)), 0.0
    return (0.0, float(np.mean(y) / np.mean(x))) if constant < 0 else (constant, slope)
