"""What a bench runs, as a file of its folder: arms, seeds, steps, and the configuration that all arms share.

Contract: no verl import, so that a bad command is refused at once; `compose` needs Hydra, and verl's configuration
files. The plan of a folder never changes, but for more seeds: what was measured belongs to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from pydantic import TypeAdapter

from darts import CONFIG_DIR
from darts.bench.arms import BenchArm
from darts.bench.states import OVERRIDES
from darts.config import ConfigError
from darts.evidence import documents

PLAN, RECORDS, STATES, TRACES, CONFIG = "plan.json", "records.jsonl", "states", "traces", "config.json"
OF_A_BENCH = (
    *OVERRIDES, "trainer.resume_mode=disable", "trainer.val_before_train=false", "trainer.test_freq=-1",
    "trainer.save_freq=-1", "trainer.total_epochs=1", "trainer.logger=[console]", "darts.strategy=darts",
    "darts.trace=null",
)  # fmt: skip
"""What a bench needs of any configuration."""


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What a bench runs."""

    arms: list[BenchArm]
    seeds: int  # 0, 1, ...
    steps: int
    validate_every: int  # steps; the last is validated always; 0: no validation at all
    config_name: str = "bench"
    config_dir: str = str(CONFIG_DIR)
    overrides: list[str]  # of the configuration, for all arms
    trainer: str = "darts.bench.trainer.ArmsTrainer"  # or a subclass

    def save(self, folder: Path) -> None:
        """Into the folder, which is made.

        Raises:
            ConfigError: it has another plan.
        """
        if (folder / PLAN).exists():
            there = self.load(folder)
            other = [name for name in vars(self) if name != "seeds" and getattr(self, name) != getattr(there, name)]
            if other or self.seeds < there.seeds:
                name = other[0] if other else "seeds"
                rule = f"has a bench with other {name} ({getattr(there, name)}), and goes on with the same alone."
                fix = "choose another folder, remove this one, or repeat the command that began it."
                raise ConfigError("--out", str(folder), rule, fix)
        documents.write(folder / PLAN, JSON.dump_json(self, indent=1).decode() + "\n")

    @classmethod
    def load(cls, bench_folder: Path) -> "BenchPlan":
        """What `save` wrote."""
        return JSON.validate_json((bench_folder / PLAN).read_bytes())

    def turns(self) -> Iterator[tuple[int, int]]:
        """Seed and step of all rounds, in their order."""
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


JSON = TypeAdapter(BenchPlan)
