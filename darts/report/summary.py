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

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from darts.config import DartsConfig
from darts.evidence.checkpoint import TRACKER
from darts.strategy import strategy_class
from darts.testbed import register_resolver


def read_steps(path: Path) -> list[dict[str, float]]:
    """The metrics of each training step, in order; validation before the first step is not one.

    Raises:
        ValueError: the file holds no training step.
    """
    records = [json.loads(line)["data"] for line in path.read_text().splitlines()]
    steps = [record for record in records if "timing_s/step" in record]
    if not steps:
        raise ValueError(f"{path}: no training step was logged; did the run end early?")
    return steps


def read_validation(path: Path) -> list[float]:
    """Validation accuracies in the order in which they were logged."""
    records = [json.loads(line)["data"] for line in path.read_text().splitlines()]
    return [
        value
        for record in records
        for key, value in record.items()
        if key.startswith("val-core/") and "/acc/mean@" in key
    ]


def weight_change(before: Path, after: Path) -> float:
    """Largest absolute difference between two checkpoints' parameters.

    Raises:
        ValueError: a folder without safetensors, or no parameter in common.
    """
    old, new = _parameters(before), _parameters(after)
    common = old.keys() & new.keys()
    if not common:
        raise ValueError(f"{before} and {after} have no parameter in common.")
    return max((old[name].float() - new[name].float()).abs().max().item() for name in common)


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
    config = OmegaConf.load(folder / "hydra" / ".hydra" / "config.yaml")
    latest = folder / "checkpoints" / TRACKER
    if not latest.is_file():
        raise ValueError(
            f"{latest.parent}: no checkpoint, so nobody can say whether the weights moved; set trainer.save_freq"
        )
    after = folder / "checkpoints" / f"global_step_{latest.read_text()}" / "actor" / "huggingface"
    return Path(config.actor_rollout_ref.model.path), after


def is_darts(steps: list[dict[str, float]]) -> bool:
    """Whether DARTS was on in this run."""
    return any("darts/candidates/launched" in step for step in steps)


def rules_of(folder: Path) -> DartsConfig:
    """The rules by which the run's strategy gives candidates to prompts."""
    config = OmegaConf.load(folder / "hydra" / ".hydra" / "config.yaml")
    block: Any = OmegaConf.to_container(config.darts)
    darts = DartsConfig.from_block(block, config.actor_rollout_ref.rollout.n)
    return strategy_class(darts.strategy).rules_of(darts)


def failures(steps: list[dict[str, float]], moved: float, rules: DartsConfig | None) -> list[str]:
    """What the run did not do, one line each; empty if all is well. Plain verl has no rules."""
    checks = {"the weights did not move": moved > 0}
    if is_darts(steps) and rules is not None:
        allocation = rules.allocation
        low, mean, high = allocation.low, allocation.mean_candidates, allocation.high
        is_redundant = allocation.mode != "off" and allocation.fallback_mean > rules.group_size
        saturates = allocation.mode == "uniform" and mean > high - 1
        warm = steps[allocation.warmup_steps :]
        known = [step for step in warm if step.get("darts/history/known_share", 0) > 0.5]
        adapts = allocation.mode == "adaptive" and mean is not None and low + 1 <= mean <= high - 1 and known
        spreads = [step["darts/allocation/budget_max"] - step["darts/allocation/budget_min"] for step in known]
        checks |= {
            "no candidate was dropped": not is_redundant
            or sum(step.get("darts/candidates/dropped", 0) for step in steps) > 0,
            "no prompt was saturated": not saturates
            or any(step.get("darts/group/saturated_share", 0) > 0 for step in steps),
            "no budgets differed by more than one": not adapts or max(spreads) > 1,
            "no reward differed within a group": any(
                step.get("darts/group/mixed_reward_share", 0) > 0 for step in steps
            ),
        }
    return [text for text, holds in checks.items() if not holds]


def summarise(steps: list[dict[str, float]], validation: list[float], moved: float) -> str:
    """The summary as text; figures that change over the run as first step -> last step."""

    def total(key: str) -> float:
        return sum(step.get(key, 0.0) for step in steps)

    def mean(key: str, of: list[dict[str, float]]) -> float:
        return sum(step.get(key, float("nan")) for step in of) / len(of)

    def first_to_last(key: str, form: str) -> str:
        return f"{form.format(steps[0].get(key, float('nan')))} -> {form.format(steps[-1].get(key, float('nan')))}"

    warm = steps[1:] or steps
    kept = ", the kept" if is_darts(steps) else ""
    rows = [
        ("steps", f"{len(steps)}{'' if is_darts(steps) else ', plain verl'}"),
        ("seconds a step", f"{mean('timing_s/step', warm):.1f}, of which rollout {mean('timing_s/gen', warm):.1f}"),
        ("mean length", f"{first_to_last('response_length/mean', '{:.0f}')} tokens{kept}"),
        ("accuracy in training", f"{first_to_last('critic/score/mean', '{:.2f}')}{kept}"),
        ("validation accuracy", " -> ".join(f"{value:.2f}" for value in validation) or "not measured"),
        ("weights moved", f"by at most {moved:.1e}"),
    ]
    if is_darts(steps):
        launched, dropped = total("darts/candidates/launched"), total("darts/candidates/dropped")
        stops = [step["darts/early_stop/stop_s_mean"] for step in steps if "darts/early_stop/stop_s_mean" in step]
        stopped_in = f", stopped in {1000 * sum(stops) / len(stops):.0f} ms" if stops else ""
        generated, wasted = total("darts/tokens/generated"), total("darts/tokens/dropped")
        rows += [
            ("mean length, pool", f"{first_to_last('darts/length/pool_mean', '{:.0f}')} tokens, with what was aborted"),
            ("accuracy, pool", f"{first_to_last('darts/reward/pool_mean', '{:.2f}')}, all that ended"),
            ("dropped", f"{dropped:.0f} of {launched:.0f} candidates, {wasted:.0f} of {generated:.0f} tokens"),
            ("aborted", f"{total('darts/candidates/aborted'):.0f} candidates{stopped_in}"),
            ("budgets", budgets(steps)),
            ("saturated", f"{mean('darts/group/saturated_share', steps):.0%} of the groups"),
            ("groups that teach", f"{mean('darts/group/mixed_reward_share', steps):.0%} (rewards differ)"),
        ]
    return "\n".join(f"  {name:<22}{value}" for name, value in rows)


def budgets(steps: list[dict[str, float]]) -> str:
    """How many candidates prompts got, and how well the spread of their lengths was known before."""
    least = min(step.get("darts/allocation/budget_min", float("nan")) for step in steps)
    most = max(step.get("darts/allocation/budget_max", float("nan")) for step in steps)
    known = [key for step in steps if (key := step.get("darts/history/std_correlation")) is not None]
    forecast = f"; predicted std correlates by {sum(known) / len(known):.2f} with observed" if known else ""
    return f"{least:.0f} to {most:.0f} candidates{forecast}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the summary; the exit code says whether the run did its work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/quickstart.sh left behind, e.g. outputs/quickstart")
    folder = parser.parse_args(arguments).folder
    try:
        steps, moved = read_steps(folder / "metrics.jsonl"), weight_change(*models(folder))
        rules = rules_of(folder) if is_darts(steps) else None
    except (OSError, ValueError) as error:
        print(f"no summary: {error}", file=sys.stderr)
        return 1
    print("Summary of the run")
    print(summarise(steps, read_validation(folder / "metrics.jsonl"), moved))
    problems = failures(steps, moved, rules)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
