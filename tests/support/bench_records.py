"""Records of a bench that never ran, with values that are easy to compute by hand."""

from __future__ import annotations

from darts.bench.records import StepRecord, ValidationRecord


def step(arm="none", seed=0, number=1, seconds=2.0, **changes) -> StepRecord:
    """Phases of which 1 s are left for the rollout at 2 s; 100 tokens, of which 80 are kept."""
    values = {
        "place": 0, "step_s": seconds, "rollout_s": seconds / 2, "old_log_prob_s": 0.25, "update_s": 0.5,
        "weights_s": 0.125, "launched": 10, "aborted": 2, "tokens_generated": 100, "tokens_kept": 80, "slots": 4,
        "slot_steps": 160, "idle_slot_steps": 60, "kept_mean": 10.0, "kept_p99": 20.0, "kept_max": 21.0,
        "pool_mean": 12.5, "pool_p99": 30.0, "pool_max": 31.0,
    }  # fmt: skip
    return StepRecord(arm=arm, seed=seed, step=number, **values | changes)


def validation(arm="none", seed=0, number=0, accuracy=0.5, **changes) -> ValidationRecord:
    return ValidationRecord(arm=arm, seed=seed, step=number, accuracy=accuracy, **changes)


def bench(seconds: dict[str, list[list[float]]], accuracies: dict[str, list[list[float]]] | None = None, every=1):
    """Steps by arm, seed and step; and accuracies before the first step and after every so many."""
    records = [
        step(arm, seed, number, value)
        for arm, seeds in seconds.items()
        for seed, values in enumerate(seeds)
        for number, value in enumerate(values, 1)
    ]
    return records + [
        validation(arm, seed, every * place, value)
        for arm, seeds in (accuracies or {}).items()
        for seed, values in enumerate(seeds)
        for place, value in enumerate(values)
    ]
