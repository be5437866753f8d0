"""A testbed that runs anywhere: a synthetic task and a tiny model that really has long tails.

`overthink`: responses carry needless re-checks, so their lengths have a long tail that hardly
matters for the reward (Pattern I on easy problems, Pattern II on hard ones). `depth`: every step
that is carried out makes the answer more often right (Pattern II throughout). `long`: the regime of
the paper: rollouts are most of a step, and the hardest prompts have responses that reach the limit;
re-checks are verbose and needless, on easy problems by anyone (Pattern I on the easiest), on others by
who is careful (Pattern II on those between).

The checkpoints and data under ``assets/`` are what ``python -m darts.testbed.make`` gives.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The lengths that a testbed is measured and trained with, in tokens (one byte each)."""

    prompt: int  # longest prompt, chat template included
    response: int  # longest response, end-of-sequence token included


LIMITS: dict[str, Limits] = {
    "overthink": Limits(prompt=48, response=256),
    "depth": Limits(prompt=48, response=128),
    "long": Limits(prompt=36, response=2560),
}


def assets_dir(name: str) -> Path:
    """The folder of the committed testbed `name`: ``model/``, ``train.parquet``, ``val.parquet``."""
    if name not in LIMITS:
        raise ValueError(f"testbed name={name!r} must be one of {sorted(LIMITS)}")
    return Path(__file__).parent / "assets" / name


def register_resolver() -> None:
    """Makes `${darts_testbed:NAME}` in a configuration the folder of testbed NAME, wherever it is installed."""
    OmegaConf.register_new_resolver("darts_testbed", lambda name: str(assets_dir(name)), replace=True)
