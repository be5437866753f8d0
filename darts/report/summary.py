"""A readable end of a run: `python -m darts.report.summary FOLDER`, as `scripts/quickstart.sh` leaves it.

Contract: reads verl's file log (`metrics.jsonl`), the configuration (`hydra/.hydra/config.yaml`) and the last
checkpoint as a Hugging Face model (`checkpoints/`), prints a summary, and exits 1 if the run did not do what it is for:
nothing was dropped, no prompt was saturated or no budgets differed though the rules of its strategy say so, no reward
differed within a group, or the weights did not move. A run of plain verl is summarised too; of it only the last is
asked.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from darts.config import DartsConfig
from darts.evidence.checkpoint import TRACKER
from darts.strategy import strategy_class
from darts.testbed import register_resolver

HYDRA = Path("hydra", ".hydra", "config.yaml")
Steps = list[dict[str, float]]


def read_steps(path: Path) -> Steps:
    """The metrics of each training step, in order; validation before the first step is not one.

    Raises:
        ValueError: the file holds no training step.
    """
    steps = [record for record in _records(path) if "timing_s/step" in record]
    if not steps:
        raise ValueError(f"{path}: no training step was logged; did the run end early?")
    return steps


def read_validation(path: Path) -> list[float]:
    """Validation accuracies in the order in which they were logged."""
    return [
        value
        for record in _records(path)
        for key, value in record.items()
        if key.startswith("val-core/") and "/acc/mean@" in key
    ]


def _records(path: Path) -> Steps:
    return [json.loads(line)["data"] for line in path.read_text().splitlines()]


def _column(steps: Steps, key: str) -> np.ndarray:
    """A metric by step, NaN where it is missing."""
    return np.array([step.get(key, np.nan) for step in steps])


def weight_change(before: Path, after: Path) -> float:
    """Largest absolute difference between two checkpoints' parameters.

    Raises:
        ValueError: a folder without safetensors, or no parameter in common.
    """
    old_weights, new_weights = _parameters(before), _parameters(after)
    common_names = old_weights.keys() & new_weights.keys()
    if not common_names:
        raise ValueError(f"{before} and {after} have no parameter in common.")
    return max((old_weights[name].float() - new_weights[name].float()).abs().max().item() for name in common_names)


def _parameters(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def models(folder: Path) -> tuple[Path, Path]:
    """The model that a run started from, and the one it ended with.

    Raises:
        ValueError: the run saved no checkpoint.
    """
    register_resolver()
    config = OmegaConf.load(folder / HYDRA)
    latest_file = folder / "checkpoints" / TRACKER
    if not latest_file.is_file():
        reason = "no checkpoint, so nobody can say whether the weights moved; set trainer.save_freq"
        raise ValueError(f"{latest_file.parent}: {reason}")
    final_model = folder / "checkpoints" / f"global_step_{latest_file.read_text()}" / "actor" / "huggingface"
    return Path(config.actor_rollout_ref.model.path), final_model


def is_darts(steps: Steps) -> bool:
    """Whether DARTS was on in this run."""
    return any("darts/candidates/launched" in step for step in steps)


def rules_of(folder: Path) -> DartsConfig:
    """The rules by which the run's strategy gives candidates to prompts."""
    config = OmegaConf.load(folder / HYDRA)
    darts_block: Any = OmegaConf.to_container(config.darts)
    darts_config = DartsConfig.from_block(darts_block, config.actor_rollout_ref.rollout.n)
    return strategy_class(darts_config.strategy).rules_of(darts_config)


def failures(steps: Steps, weight_moved: float, rules: DartsConfig | None) -> list[str]:
    """What the run did not do, one line each; empty if all is well. Plain verl has no rules."""
    checks = {"the weights did not move": weight_moved > 0}
    if is_darts(steps) and rules is not None:
        allocation = rules.allocation
        low_budget, mean, high = allocation.low, allocation.mean_candidates, allocation.high
        is_redundant = allocation.mode != "off" and allocation.fallback_mean > rules.group_size
        is_saturating = allocation.mode == "uniform" and mean > high - 1
        warm_steps = steps[allocation.warmup_steps :]
        known = [step for step in warm_steps if step.get("darts/history/known_share", 0) > 0.5]
        adapts = allocation.mode == "adaptive" and mean is not None and low_budget + 1 <= mean <= high - 1 and known
        budget_spreads = _column(known, "darts/allocation/budget_max") - _column(known, "darts/allocation/budget_min")

        def happened(key: str) -> bool:
            return bool((_column(steps, key) > 0).any())

        checks |= {
            "no candidate was dropped": not is_redundant or happened("darts/candidates/dropped"),
            "no prompt was saturated": not is_saturating or happened("darts/group/saturated_share"),
            "no budgets differed by more than one": not adapts or bool((budget_spreads > 1).any()),
            "no reward differed within a group": happened("darts/group/mixed_reward_share"),
        }
    return [text for text, is_met in checks.items() if not is_met]


def summarise(steps: Steps, validation_scores: list[float], weight_moved: float) -> str:
    """The summary as text; figures that change over the run as first step -> last step."""

    def total(key: str) -> float:
        return np.nansum(_column(steps, key))

    def change(key: str, number_form: str) -> str:
        step_values = _column(steps, key)
        return f"{step_values[0]:{number_form}} -> {step_values[-1]:{number_form}}"

    step_s, rollout_s = (_column(steps[1:] or steps, f"timing_s/{name}").mean() for name in ("step", "gen"))
    of_plain, kept_note = ("", ", the kept") if is_darts(steps) else (", plain verl", "")
    rows = [
        ("steps", f"{len(steps)}{of_plain}"),
        ("seconds a step", f"{step_s:.1f}, of which rollout {rollout_s:.1f}"),
        ("mean length", f"{change('response_length/mean', '.0f')} tokens{kept_note}"),
        ("accuracy in training", f"{change('critic/score/mean', '.2f')}{kept_note}"),
        ("validation accuracy", " -> ".join(f"{value:.2f}" for value in validation_scores) or "not measured"),
        ("weights moved", f"by at most {weight_moved:.1e}"),
    ]
    if is_darts(steps):
        launched, dropped, aborted = (total(f"darts/candidates/{fate}") for fate in ("launched", "dropped", "aborted"))
        tokens_generated, wasted = (total(f"darts/tokens/{fate}") for fate in ("generated", "dropped"))
        stop_s = _column(steps, "darts/early_stop/stop_s_mean")
        stopped_in = f", stopped in {1000 * np.nanmean(stop_s):.0f} ms" if np.isfinite(stop_s).any() else ""
        saturated, mixed_share = (_column(steps, f"darts/group/{name}_share") for name in ("saturated", "mixed_reward"))
        rows += [
            ("mean length, pool", f"{change('darts/length/pool_mean', '.0f')} tokens, with what was aborted"),
            ("accuracy, pool", f"{change('darts/reward/pool_mean', '.2f')}, all that ended"),
            ("dropped", f"{dropped:.0f} of {launched:.0f} candidates, {wasted:.0f} of {tokens_generated:.0f} tokens"),
            ("aborted", f"{aborted:.0f} candidates{stopped_in}"),
            ("budgets", _budgets(steps)),
            ("saturated", f"{saturated.mean():.0%} of the groups"),
            ("groups that teach", f"{mixed_share.mean():.0%} (rewards differ)"),
        ]
    return "\n".join(f"  {name:<22}{value}" for name, value in rows)


def _budgets(steps: Steps) -> str:
    """How many candidates prompts got, and how well the spread of their lengths was known before."""
    low, high = (_column(steps, f"darts/allocation/budget_{end}") for end in ("min", "max"))
    correlation = _column(steps, "darts/history/std_correlation")
    text = f"{low.min():.0f} to {high.max():.0f} candidates"
    if np.isfinite(correlation).any():
        text += f"; predicted std correlates by {np.nanmean(correlation):.2f} with observed"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Prints the summary; the exit code says whether the run did its work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/quickstart.sh left behind, e.g. outputs/quickstart")
    folder = parser.parse_args(arguments).folder
    try:
        steps, weight_moved = read_steps(folder / "metrics.jsonl"), weight_change(*models(folder))
        rules = rules_of(folder) if is_darts(steps) else None
    except (OSError, ValueError) as error:
        print(f"no summary: {error}", file=sys.stderr)
        return 1
    print("Summary of the run")
    print(summarise(steps, read_validation(folder / "metrics.jsonl"), weight_moved))
    problems = failures(steps, weight_moved, rules)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
