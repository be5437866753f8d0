"""Waits for the nodes of a Ray cluster: `wait_for_ray.py HOST:PORT --nodes n1 n2 --gpus 8 --limit 300`.

Contract: exit code 0 as soon as every node of `--nodes` (by its `ray start --node-name`) is alive with at least
`--gpus` GPUs, 1 after `--limit` seconds. A line every `PROGRESS_S` seconds, and the last one, name the nodes that are
missing.
"""

import argparse
import logging
import sys
import time

import ray

PROGRESS_S = 10


def missing(node_names: list[str], min_gpus: int, ray_nodes: list[dict]) -> list[str]:
    """What is missing, node by node, e.g. `["n2", "n3 (7 of 8 GPUs)"]`."""
    gpus_by_node = {node["NodeName"]: node["Resources"].get("GPU", 0) for node in ray_nodes if node["Alive"]}
    return [
        node if node not in gpus_by_node else f"{node} ({gpus_by_node[node]:g} of {min_gpus} GPUs)"
        for node in node_names
        if gpus_by_node.get(node, -1) < min_gpus
    ]


def main() -> int:
    """Polls, and says what it sees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--nodes", nargs="+", required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of each node")
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    options = parser.parse_args()
    start_time, last_report_s = time.monotonic(), 0.0
    while True:
        try:
            if not ray.is_initialized():
                ray.init(options.address, log_to_driver=False, logging_level=logging.ERROR)
            missing_nodes = missing(options.nodes, options.gpus, ray.nodes())
        except (ConnectionError, RuntimeError) as error:  # the head has only begun
            missing_nodes = [f"{node} ({str(error).splitlines()[0]})" for node in options.nodes[:1]] + options.nodes[1:]
        waited_s, num_nodes = time.monotonic() - start_time, len(options.nodes)
        if not missing_nodes:
            print(f"Ray is there after {waited_s:.0f} s: {num_nodes} nodes", flush=True)
            return 0
        if waited_s > min(options.limit, last_report_s + PROGRESS_S):
            there = f"{num_nodes - len(missing_nodes)} of {num_nodes} nodes are there after {waited_s:.0f} s"
            print(f"{there}; missing: {', '.join(missing_nodes)}", flush=True)
            last_report_s = waited_s
        if waited_s > options.limit:
            return 1
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
