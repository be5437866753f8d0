"""How much of a bench's log-probs and updates is padding, and what its speed-ups would be without: an estimate.

    .venv/bin/python -m benchmarks.padding outputs/bench/overthink

Contract. Without a GPU verl packs nothing: a micro-batch is padded to its longest row. The kept lengths of every step
(traces of `python -m darts.bench`) are put into verl's own order for one rank (`_balance_batch`, 0.9.1), or from short
to long for `sorted`, and cut into micro-batches of the bench's size; a prompt counts with the step's mean. Without
padding, log-probs and update would take their seconds over that ratio.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from verl.utils.seqlen_balancing import calculate_workload

from darts.bench.report import load
from darts.testbed.rollouts_report import table


def balanced(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of rows on one rank: the small ones at both ends."""
    workload = calculate_workload(torch.from_numpy(tokens)).numpy()
    rows = np.lexsort((np.arange(len(tokens)), workload))
    return np.concatenate([rows[::2], rows[1::2][::-1]])


def padding_of(tokens: NDArray[np.int64], order: NDArray[np.int64], size: int) -> tuple[int, int]:
    """Padded and real tokens of a step, in micro-batches of `size` rows."""
    ordered = tokens[order]
    longest = [ordered[first : first + size].max() * len(ordered[first : first + size])
               for first in range(0, len(ordered), size)]  # fmt: skip
    return int(sum(longest)), int(tokens.sum())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="FOLDER", help="--out of a bench on one training rank")
    folder = parser.parse_args().bench
    opened, results = load(folder / "bench.json")
    size = opened["config"]["actor_rollout_ref"]["actor"]["ppo_micro_batch_size_per_gpu"]
    strategies = {arm["name"]: arm["strategy"] for arm in opened["arms"]}
    ratios, seconds = {}, {}
    for arm in results.arms:
        counted = []
        for path in sorted(folder.glob(f"traces/seed*/{arm}.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                prompt, rollout = line["metrics"]["prompt_length/mean"], line["rollout"]
                kept = [
                    length + prompt
                    for lengths, fates in zip(rollout["length"], rollout["fate"], strict=True)
                    for length, fate in zip(lengths, fates, strict=True)
                    if fate in "kf"
                ]
                tokens = np.array(kept).round().astype(np.int64)
                order = np.argsort(tokens, kind="stable") if strategies[arm] == "sorted" else balanced(tokens)
                counted.append(padding_of(tokens, order, size))
        padded, real = np.sum(counted, axis=0)
        ratios[arm] = padded / real
        for last in (False, True):
            padded_s = results.mean(arm, "old_log_prob_s", last) + results.mean(arm, "update_s", last)
            seconds[arm, last] = results.mean(arm, "step_s", last) - padded_s * (1 - 1 / ratios[arm])
    base = opened["base"]
    rows = [
        [arm, f"{ratios[arm]:.2f}", *(f"{seconds[base, last] / seconds[arm, last]:.2f}" for last in (False, True))]
        for arm in results.arms
    ]
    print(table(["arm", "padded over real tokens", "speed-up without padding", "last third"], rows))


if __name__ == "__main__":
    main()
