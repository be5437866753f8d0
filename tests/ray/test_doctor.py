"""The doctor on real processes: a local Ray with two gloo ranks, two nodes, a rank that never answers, no cluster."""

import json
import os
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

SILENT = """
import sys, time
import ray
from darts.doctor.__main__ import main
from darts.doctor import communication

class Silent(communication.Rank):
    def {method}(self, *arguments):
        if self.number == 1:
            time.sleep(3600)
        if {others_wait}:
            self.entered += 1
            time.sleep(3600)
        return super().{method}(*arguments)

usual = communication.communication_facts
communication.communication_facts = lambda ranks, limit_s: usual(ranks, limit_s, Silent)
sys.exit(main(["--only", "machine", "--communication", "--limit-s", "{limit_s}"]))
"""


def doctor(*given, **variables):
    """A command of its own, in the environment but for `variables`; its exit code and lines."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = ["-m", "darts.doctor", *given] if len(given) != 1 else ["-c", *given]
    run = subprocess.run(
        [sys.executable, *command], env=environment | variables, capture_output=True, text=True, timeout=2400
    )
    assert run.stdout, run.stderr
    return run.returncode, run.stdout.splitlines()


def named(lines, name):
    """The one line of a fact, without its name."""
    (found,) = (line for line in lines if line[9:].startswith(name))
    return found


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster on this machine: two (logical) GPUs on one node, one on the other."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_two_ranks_on_a_ray_of_its_own(tmp_path):
    path = tmp_path / "facts.json"
    code, lines = doctor("--communication", "--ranks", "2", "--limit-s", "500", "--json", str(path))
    assert code == 0, lines
    assert " 1, with GPUs: " in named(lines, "nodes ")
    assert named(lines, "versions ").endswith("the same as here")
    assert "active, cpu platform" in named(lines, "plugin in verl")
    line = named(lines, "all-reduce within the node")
    assert line.startswith("ok ")
    assert "2 ranks, sums right" in line
    assert float(line.split(" GB/s")[0].split()[-1]) > 0
    assert [fact["status"] for fact in json.loads(path.read_text())["facts"]].count("FAILED") == 0


@pytest.mark.slow
def test_all_nodes_of_a_cluster(two_nodes):
    code, lines = doctor("--only", "machine", "--communication", RAY_ADDRESS=two_nodes)
    assert code == 0, lines
    assert " 2, with GPUs: " in named(lines, "nodes ")
    assert "2 ranks, sums right" in named(lines, "all-reduce within nodes")
    assert "3 ranks, sums right" in named(lines, "all-reduce across nodes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "what", "others_wait"),
    [("join", "joining the group", False), ("reduce", "all-reduce within the node", True)],
    ids=["torch ends the wait of the others", "the others wait for ever"],
)
def test_the_rank_that_does_not_answer_is_named(method, what, others_wait):
    code, lines = doctor(SILENT.format(method=method, limit_s=30, others_wait=others_wait))
    assert code == 1
    line = named(lines, "all-reduce ")
    assert line.startswith("FAILED ")
    assert f"{what}: rank 1 (" in line
    assert "rank 0" not in line
    assert "did not answer within 30 s" in line


def test_a_cluster_that_is_not_there_fails():
    code, lines = doctor("--only", "machine", "--communication", RAY_ADDRESS="127.0.0.1:9")
    assert code == 1
    assert "RAY_ADDRESS=127.0.0.1:9: " in named(lines, "Ray ")


@pytest.mark.slow
def test_gpus_in_use_are_said(two_nodes):
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import ray, sys\nray.init(log_to_driver=False)\n"
            "@ray.remote(num_gpus=1)\nclass Run:\n    def here(self): return 1\n"
            "run = Run.remote(); ray.get(run.here.remote()); print('holds', flush=True); sys.stdin.read()",
        ],
        env=os.environ | {"RAY_ADDRESS": two_nodes}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "holds" in holder.stdout.readline()
        code, lines = doctor("--only", "machine", "--communication", RAY_ADDRESS=two_nodes)
    finally:
        holder.stdin.close()
        holder.wait(300)
    assert code == 1
    assert "2 of 3 GPUs are free" in named(lines, "all-reduce ")


def test_a_plugin_that_is_switched_off_fails():
    code, lines = doctor("--only", "plugin", VLLM_PLUGINS="other", VERL_USE_EXTERNAL_PLUGINS="none")
    assert code == 1
    assert named(lines, "plugin in verl").startswith("FAILED ")
    assert "VLLM_PLUGINS=other leaves it out" in named(lines, "plugin in vLLM")
