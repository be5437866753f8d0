"""Runs on one machine do not share sockets of weights: what `verl_patches.weights.run_id` relies on in verl 0.9.1."""

import inspect
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from verl.workers.rollout.vllm_rollout import vllm_async_server, vllm_rollout
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

import verl_patches.weight_sync  # noqa: F401  (applies the patches)
from verl_patches import vllm_plugin
from verl_patches.patching import original
from verl_patches.weights import run_id


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As in the process of an engine whose server has set verl's variables; put back at the end."""
    monkeypatch.setenv("VERL_REPLICA_RANK", "3")
    monkeypatch.setenv(run_id.JOB, "01000000")
    monkeypatch.setenv(run_id.RUN, "")


def looked_for_by_an_engine() -> str:
    engine = SimpleNamespace(model_runner=None, local_rank=1)
    return vLLMColocateWorkerExtension._get_zmq_handle(engine)


def bound_by_a_sender() -> str:
    """`ServerAdapter`'s expression, as verl writes it, in a folder with a short path: that of a socket is limited."""
    with tempfile.TemporaryDirectory() as folder:
        handle = f"ipc://{folder}/rl-colocate-zmq-01000000-replica-3-rank-1.sock"
        sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
        sender._init_socket()
        sender.socket.close()
    return sender.zmq_handle.replace(folder, "/tmp")


@pytest.mark.parametrize("run", ["", "0a1b2c3d"])
def test_sender_and_engine_take_the_same_socket(monkeypatch, run):
    monkeypatch.setenv(run_id.RUN, run)
    vllm_plugin.register()
    vllm_plugin.register()
    handle = looked_for_by_an_engine()
    assert handle == bound_by_a_sender()
    assert (f"-{run}-" in handle) if run else handle == "ipc:///tmp/rl-colocate-zmq-01000000-replica-3-rank-1.sock"


def test_every_run_has_a_name_of_its_own(monkeypatch):
    run_id.name_run()
    first = os.environ[run_id.RUN]
    run_id.name_run()
    assert first != os.environ[run_id.RUN] != ""


def test_where_vllm_does_not_load_the_plugin_runs_have_no_name(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    run_id.name_run()
    assert run_id.RUN not in os.environ
    monkeypatch.setenv("VLLM_PLUGINS", "others,darts")
    run_id.name_run()
    assert os.environ[run_id.RUN]


def test_nothing_heavy_is_imported():
    code = "import sys, verl_patches.weights.run_id; assert not {'ray', 'torch', 'verl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_upstream_is_what_it_was_written_for():
    adapter = inspect.getsource(vllm_rollout.ServerAdapter.__init__)
    path = "ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{self.replica_rank}-rank-{local_rank}.sock"
    assert path in adapter
    assert "get_runtime_context().get_job_id()" in adapter, "the path may be the machine's only one: delete run_id"
    server = inspect.getsource(vllm_async_server.vLLMHttpServer.__init__)
    assert 'os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()' in server
    assert original(BucketedWeightSender._init_socket) is not BucketedWeightSender._init_socket
    assert vllm_rollout.BucketedWeightSender is BucketedWeightSender
