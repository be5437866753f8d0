"""What a bench runs, as a file of its folder: arms, seeds, steps, and the configuration that all arms share.

Contract: no verl import, so that a bad command is refused at once; `compose` needs Hydra, and verl's configuration
files. The plan of a folder never changes, but for more seeds: what was measured belongs to it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from omegaconf import DictConfig

from darts import CONFIG_DIR
from darts.bench.arms import BenchArm
from darts.bench.states import OVERRIDES
from darts.config import ConfigError

PLAN, RECORDS, STATES, TRACES, CONFIG = "plan.json", "records.jsonl", "states", "traces", "config.json"
OF_A_BENCH = (
    *OVERRIDES, "trainer.resume_mode=disable", "trainer.val_before_train=false", "trainer.test_freq=-1",
    "trainer.save_freq=-1", "trainer.total_epochs=1", "trainer.logger=[console]", "darts.strategy=darts",
    "darts.trace=null",
)  # fmt: skip
"""What a bench needs of any configuration."""
Turn = tuple[int, int]
"""Seed and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What a bench runs."""

    arms: list[BenchArm]
    seeds: int  # 0, 1, ...
    steps: int
    validate_every: int  # steps; the last is validated always; 0: no validation at all
    config_name: str = "bench"
    config_dir: str = str(CONFIG_DIR)
    overrides: list[str]  # of the configuration, for all arms

    def save(self, folder: Path) -> None:
        """Into the folder, which is made.

        Raises:
            ConfigError: it has another plan.
        """
        if (folder / PLAN).exists():
            there = self.load(folder)
            other = [
                f.name for f in fields(self) if f.name != "seeds" and getattr(self, f.name) != getattr(there, f.name)
            ]
            if other or self.seeds < there.seeds:
                name = other[0] if other else "seeds"
                rule = f"has a bench with other {name} ({getattr(there, name)}), and goes on with the same alone."
                fix = "choose another folder, remove this one, or repeat the command that began it."
                raise ConfigError("--out", str(folder), rule, fix)
        folder.mkdir(parents=True, exist_ok=True)
        plan = {field.name: getattr(self, field.name) for field in fields(self)}
        plan["arms"] = [asdict(arm) for arm in self.arms]
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n")

    @classmethod
    def load(cls, bench_folder: Path) -> "BenchPlan":
        """What `save` wrote."""
        plan_values = json.loads((bench_folder / PLAN).read_text())
        return cls(**plan_values | {"arms": [BenchArm(**bench_arm) for bench_arm in plan_values["arms"]]})

    def turns(self) -> Iterator[Turn]:
        """All rounds in their order."""
        yield from ((seed, step) for seed in range(self.seeds) for step in range(1, self.steps + 1))

    def validates(self, step_number: int) -> bool:
        """Whether the arms are validated after this step."""
        return self.validate_every > 0 and (step_number % self.validate_every == 0 or step_number == self.steps)

    def compose(self, bench_folder: Path) -> DictConfig:
        """The configuration of the run, whose results go to the folder."""
        from hydra import compose, initialize_config_dir

        from darts.checks.paths import settle_paths
        from darts.testbed import register_resolver

        register_resolver()
        run_overrides = [f"trainer.total_training_steps={self.steps}", f"trainer.default_local_dir={bench_folder}"]
        with initialize_config_dir(self.config_dir, version_base=None):
            composed_config = compose(self.config_name, overrides=[*self.overrides, *OF_A_BENCH, *run_overrides])
        settle_paths(composed_config)
        return composed_config
