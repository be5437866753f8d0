"""A readable end of a run: `python -m darts.report.summary FOLDER`, as `scripts/quickstart.sh` leaves it.

Contract: reads verl's file log (`metrics.jsonl`), the configuration (`hydra/.hydra/config.yaml`) and the last
checkpoint as a Hugging Face model (`checkpoints/`), prints a summary, and exits 1 if the run did not do what it is for:
nothing was dropped, no prompt was saturated or no budgets differed though the rules of its strategy say so, no reward
differed within a group, or the weights did not move. A run of plain verl is summarised too; of it only the last is
asked.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from darts.config import PLANNED, DartsConfig
from darts.evidence.checkpoint import TRACKER
from darts.strategy import strategy_class
from darts.testbed import register_resolver

LAUNCHED = "darts/candidates/launched"  # DARTS was on in a run that has it


def read_metrics(path: Path) -> tuple[pd.DataFrame, list[float]]:
    """The metrics of the training steps, a row each, and the validation accuracies in the order of their records;
    `ValueError` without a training step."""
    records = pd.DataFrame([json.loads(line)["data"] for line in path.read_text().splitlines()])
    if "timing_s/step" not in records:
        raise ValueError(f"{path}: no training step was logged; did the run end early?")
    validation_scores = records.filter(regex="^val-core/.*/acc/mean@").to_numpy().ravel().tolist()
    return records.dropna(subset="timing_s/step"), [score for score in validation_scores if not math.isnan(score)]


def _column(steps: pd.DataFrame, key: str) -> pd.Series:
    """A metric by step, NaN where it is missing."""
    return steps.get(key, pd.Series(math.nan, index=steps.index))


def weight_change(before: Path, after: Path) -> float:
    """Largest absolute difference between two checkpoints' parameters; `ValueError` for a folder without safetensors,
    or no parameter in common."""
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


def failures(steps: pd.DataFrame, weight_moved: float, config: DictConfig) -> list[str]:
    """What the run did not do, one line each; empty if all is well."""
    checks = {"the weights did not move": weight_moved > 0}
    if LAUNCHED in steps:
        block: Any = OmegaConf.to_container(config.darts)
        darts_config = DartsConfig.from_block(block, config.actor_rollout_ref.rollout.n)
        rules = strategy_class(darts_config.strategy).rules_of(darts_config)
        allocation, mean = rules.allocation, rules.allocation.mean_candidates
        is_given = not isinstance(mean, str)
        is_redundant = allocation.mode != "off" and mean != PLANNED and allocation.fallback_mean > rules.group_size
        is_saturating = allocation.mode == "uniform" and is_given and mean > allocation.high - 1
        may_differ = allocation.mode == "adaptive" and is_given and allocation.low + 1 <= mean <= allocation.high - 1
        warm_steps = steps[allocation.warmup_steps :]
        known_steps = warm_steps[_column(warm_steps, "darts/history/known_share") > 0.5]
        low, high = (_column(known_steps, f"darts/allocation/budget_{end}") for end in ("min", "max"))

        def happened(key: str) -> bool:
            return (_column(steps, key) > 0).any()

        checks |= {
            "no candidate was dropped": not is_redundant or happened("darts/candidates/dropped"),
            "no prompt was saturated": not is_saturating or happened("darts/group/saturated_share"),
            "no budgets differed by more than one": not may_differ or known_steps.empty or (high - low > 1).any(),
            "no reward differed within a group": happened("darts/group/mixed_reward_share"),
        }
    return [text for text, is_met in checks.items() if not is_met]


def summarise(steps: pd.DataFrame, validation_scores: list[float], weight_moved: float) -> str:
    """The summary as text; figures that change over the run as first step -> last step."""

    def change(key: str, number_form: str) -> str:
        step_values = _column(steps, key)
        return f"{step_values.iloc[0]:{number_form}} -> {step_values.iloc[-1]:{number_form}}"

    def mean(name: str, number_form: str, scale: float = 1) -> str:
        """The mean over the steps; empty where it is not known."""
        mean_value = scale * _column(steps, f"darts/{name}").mean()
        return "" if math.isnan(mean_value) else number_form.format(mean_value)

    later_steps = steps[1:] if len(steps) > 1 else steps
    step_s, rollout_s = (_column(later_steps, f"timing_s/{name}").mean() for name in ("step", "gen"))
    of_plain, kept_note = ("", ", the kept") if LAUNCHED in steps else (", plain verl", "")
    rows = {
        "steps": f"{len(steps)}{of_plain}",
        "seconds a step": f"{step_s:.1f}, of which rollout {rollout_s:.1f}",
        "mean length": f"{change('response_length/mean', '.0f')} tokens{kept_note}",
        "accuracy in training": f"{change('critic/score/mean', '.2f')}{kept_note}",
        "validation accuracy": " -> ".join(f"{score:.2f}" for score in validation_scores) or "not measured",
        "weights moved": f"by at most {weight_moved:.1e}",
    }
    if LAUNCHED in steps:
        names = (
            "candidates/launched",
            "candidates/dropped",
            "candidates/aborted",
            "tokens/generated",
            "tokens/dropped",
        )
        launched, dropped, aborted, generated, wasted = (
            f"{_column(steps, f'darts/{name}').sum():.0f}" for name in names
        )
        low, high = (_column(steps, f"darts/allocation/budget_{end}") for end in ("min", "max"))
        correlation = mean("history/std_correlation", "; predicted std correlates by {:.2f} with observed")
        rows |= {
            "mean length, pool": f"{change('darts/length/pool_mean', '.0f')} tokens, with what was aborted",
            "accuracy, pool": f"{change('darts/reward/pool_mean', '.2f')}, all that ended",
            "dropped": f"{dropped} of {launched} candidates, {wasted} of {generated} tokens",
            "aborted": f"{aborted} candidates{mean('early_stop/stop_s_mean', ', stopped in {:.0f} ms', 1000)}",
            "budgets": f"{low.min():.0f} to {high.max():.0f} candidates{correlation}",
            "saturated": mean("group/saturated_share", "{:.0%} of the groups"),
            "groups that teach": mean("group/mixed_reward_share", "{:.0%} (rewards differ)"),
        }
    return "\n".join(f"  {name:<22}{value}" for name, value in rows.items())


def main(arguments: list[str] | None = None) -> int:
    """Prints the summary; the exit code says whether the run did its work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/quickstart.sh left behind, e.g. outputs/quickstart")
    folder = parser.parse_args(arguments).folder
    try:
        steps, validation_scores = read_metrics(folder / "metrics.jsonl")
        register_resolver()
        config = OmegaConf.load(folder / "hydra" / ".hydra" / "config.yaml")
        latest_file = folder / "checkpoints" / TRACKER
        if not latest_file.is_file():
            reason = "no checkpoint, so nobody can say whether the weights moved; set trainer.save_freq"
            raise ValueError(f"{latest_file.parent}: {reason}")
        final_model = latest_file.parent / f"global_step_{latest_file.read_text()}" / "actor" / "huggingface"
        weight_moved = weight_change(Path(config.actor_rollout_ref.model.path), final_model)
        problems = failures(steps, weight_moved, config)
    except (OSError, ValueError) as error:
        print(f"no summary: {error}", file=sys.stderr)
        return 1
    print("Summary of the run")
    print(summarise(steps, validation_scores, weight_moved))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
