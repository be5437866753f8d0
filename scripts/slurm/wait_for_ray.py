"""Waits for the nodes of a Ray cluster: `wait_for_ray.py HOST:PORT --nodes n1 n2 --gpus 8 --limit 300`.

Contract: exit code 0 as soon as every node of `--nodes` (by its `ray start --node-name`) is alive with at least
`--gpus` GPUs, 1 after `--limit` seconds. A line every
`PROGRESS_S` seconds, and the last one, name the nodes that are missing.
"""

import argparse
import logging
import sys
import time

import ray

PROGRESS_S = 10


def missing(nodes: list[str], gpus: int, cluster: list[dict]) -> list[str]:
    """What is missing, node by node, e.g. `["n2", "n3 (7 of 8 GPUs)"]`."""
    have = {node["NodeName"]: node["Resources"].get("GPU", 0) for node in cluster if node["Alive"]}
    return [
        node if node not in have else f"{node} ({have[node]:g} of {gpus} GPUs)"
        for node in nodes
        if have.get(node, -1) < gpus
    ]


def main() -> int:
    """Polls, and says what it sees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--nodes", nargs="+", required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of each node")
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    options = parser.parse_args()
    start = said = time.monotonic()
    while True:
        try:
            if not ray.is_initialized():
                ray.init(options.address, log_to_driver=False, logging_level=logging.ERROR)
            lacking = missing(options.nodes, options.gpus, ray.nodes())
        except (ConnectionError, RuntimeError) as error:  # the head has only begun
            lacking = [f"{node} ({str(error).splitlines()[0]})" for node in options.nodes[:1]] + options.nodes[1:]
        now = time.monotonic()
        if not lacking:
            print(f"Ray is there after {now - start:.0f} s: {len(options.nodes)} nodes", flush=True)
            return 0
        over = now - start > options.limit
        if over or now - said > PROGRESS_S:
            there, names = len(options.nodes) - len(lacking), ", ".join(lacking)
            print(
                f"{there} of {len(options.nodes)} nodes are there after {now - start:.0f} s; missing: {names}",
                flush=True,
            )
            said = now
        if over:
            return 1
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
