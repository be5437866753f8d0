"""Tunes the learning rate of a testbed, the same way for plain verl and for DARTS.

    python -m darts.testbed.tune --testbed overthink --out outputs/tune

Contract: every arm x learning rate is one run of the quickstart with verl, Ray and vLLM; arms alternate in time.
Measured on the validation set (200 prompts x 4 responses) before the first step and after the last: accuracy, and the
99th percentile of response length. A rate is acceptable if accuracy rose by more than two standard errors and p99 kept
at least half of what it was; of the acceptable ones the most accurate is chosen, for each arm by itself. One seed:
rates whose accuracies differ by less than 0.03 are not told apart. Results go to `tune.json` as they come; what is in
there, of the same testbed, steps and assets, is not repeated.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from darts.testbed import LIMITS, assets_dir

ARMS = {"plain": ["darts.enable=false"], "darts": ["darts.allocation.mode=uniform", "darts.allocation.high=11"]}
RATES = (3e-5, 1e-4, 3e-4)


def lengths_and_accuracy(dump: Path, limit: int) -> tuple[np.ndarray, float]:
    """Response lengths in tokens (characters, and the end token where the limit left room) and the accuracy of a dump.

    Args:
        dump: verl's JSON lines of one validation, with `output` (decoded without special tokens) and `score`.
        limit: the response limit, tokens.
    """
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    lengths = np.array([min(len(row["output"]) + 1, limit) for row in rows])
    return lengths, float(np.mean([row["score"] for row in rows]))


def run(testbed: str, arm: str, rate: float, steps: int, out: Path) -> dict[str, float]:
    """One training run. Returns accuracy and 99th percentile of length, before and after.

    Raises:
        RuntimeError: the run failed; its log is named.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "recipe.darts.main_darts", "--config-name", "quickstart", f"testbed={testbed}",
        *ARMS[arm], "data.train_max_samples=-1", f"actor_rollout_ref.actor.optim.lr={rate}",
        f"trainer.total_training_steps={steps}",
        "actor_rollout_ref.rollout.val_kwargs.n=4", f"trainer.validation_data_dir={out}/validation",
        "trainer.save_freq=-1", f"hydra.run.dir={out}/hydra",
    ]  # fmt: skip
    settings = os.environ | {"VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"), "OMP_NUM_THREADS": "1"}
    with open(out / "run.log", "w") as log:
        code = subprocess.run(command, env=settings, stdout=log, stderr=subprocess.STDOUT, timeout=3600).returncode
    if code != 0:
        raise RuntimeError(f"{arm} at {rate:g} ended with exit code {code}; see {out / 'run.log'}")
    limit = LIMITS[testbed].response
    before, first = lengths_and_accuracy(out / "validation" / "0.jsonl", limit)
    after, last = lengths_and_accuracy(out / "validation" / f"{steps}.jsonl", limit)
    return {
        "accuracy_before": first,
        "accuracy_after": last,
        "p99_before": float(np.percentile(before, 99)),
        "p99_after": float(np.percentile(after, 99)),
        "mean_before": float(before.mean()),
        "mean_after": float(after.mean()),
    }


def acceptable(result: dict[str, float]) -> bool:
    """Whether accuracy rose beyond its noise (800 samples) and the tail is still there."""
    error = np.sqrt(sum(result[key] * (1 - result[key]) for key in ("accuracy_before", "accuracy_after")) / 800)
    rose = result["accuracy_after"] - result["accuracy_before"] > 2 * error
    return bool(rose and result["p99_after"] >= result["p99_before"] / 2)


def chosen(results: dict[str, dict[str, float]], arm: str) -> str | None:
    """The name of the arm's most accurate acceptable run."""
    names = [name for name, result in results.items() if name.startswith(f"{arm}@") and acceptable(result)]
    return max(names, key=lambda name: results[name]["accuracy_after"], default=None)


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    rows = ["| arm | learning rate | accuracy | p99 length | mean length | |", "|---|---|---|---|---|---|"]
    best = {chosen(results, arm) for arm in ARMS}
    for name, result in sorted(results.items()):
        arm, rate = name.split("@")
        spans = [
            f"{result[f'{key}_before']:.{digits}f} -> {result[f'{key}_after']:.{digits}f}"
            for key, digits in (("accuracy", 3), ("p99", 0), ("mean", 0))
        ]
        verdict = "chosen" if name in best else "acceptable" if acceptable(result) else "not acceptable"
        rows.append(f"| {arm} | {rate} | {' | '.join(spans)} | {verdict} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", choices=sorted(LIMITS), required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    store = options.out.resolve() / options.testbed / "tune.json"
    what = {
        "testbed": options.testbed,
        "steps": options.steps,
        "assets": hashlib.sha256((assets_dir(options.testbed) / "SHA256SUMS").read_bytes()).hexdigest(),
    }
    kept = json.loads(store.read_text()) if store.is_file() else what | {"runs": {}}
    if {key: kept.get(key) for key in what} != what:
        parser.error(f"{store} holds runs of other steps or assets; choose another --out")
    results = kept["runs"]
    for rate in options.rates:
        for arm in ARMS:
            name = f"{arm}@{rate:g}"
            if name in results:
                continue
            print(f"{options.testbed}: {name} ...", flush=True)
            results[name] = run(options.testbed, arm, rate, options.steps, store.parent / name)
            store.write_text(json.dumps(kept, indent=2) + "\n")
            print(table(results), flush=True)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
