"""What ``verl_patches.weight_sync`` relies on in verl 0.9.1, and that a failed receiver ends the wait."""

import asyncio
import inspect
import threading

import pytest
import zmq

from verl_patches.patches import patch_server_adapter
from verl_patches.patching import original
from verl_patches.weights import watch

pytest.importorskip("verl_patches.weight_sync", reason="needs verl with vLLM")
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter


@pytest.fixture
def sockets(tmp_path):
    context = zmq.Context()
    sender, receiver = context.socket(zmq.REQ), context.socket(zmq.REP)
    address = f"ipc://{tmp_path}/weights.sock"
    sender.bind(address)
    receiver.connect(address)
    yield sender, receiver
    context.destroy(linger=0)


@pytest.fixture(autouse=True)
def fast_poll(monkeypatch):
    monkeypatch.setattr(watch, "POLL_S", 0.02)


def fake_ray(monkeypatch, finished, failure=None):
    def get(reference):
        if failure is not None:
            raise failure
        return

    monkeypatch.setattr(watch.ray, "wait", lambda refs, timeout: (refs, []) if finished() else ([], refs))
    monkeypatch.setattr(watch.ray, "get", get)


def test_exception_of_the_receiver_is_raised_in_the_sender(sockets, monkeypatch):
    fake_ray(monkeypatch, finished=lambda: True, failure=RuntimeError("no attribute 'weight_loader'"))
    socket = watch.WatchedSocket(sockets[0], receiver="call", timeout_s=60)
    socket.send(b"bucket")
    with pytest.raises(RuntimeError, match="weight_loader"):
        socket.recv()


@pytest.mark.parametrize("fails", [True, False])
def test_receiver_that_never_connects_is_not_waited_for(tmp_path, monkeypatch, fails):
    """An engine that is dead already fails the call before it opens its socket: a bare REQ socket blocks in `send`."""
    fake_ray(monkeypatch, finished=lambda: fails, failure=RuntimeError("EngineDeadError"))
    with zmq.Context() as context, context.socket(zmq.REQ) as alone:
        alone.bind(f"ipc://{tmp_path}/alone.sock")
        socket = watch.WatchedSocket(alone, receiver="call", timeout_s=0.1)
        with pytest.raises(
            RuntimeError if fails else TimeoutError, match="EngineDead" if fails else "did not come for"
        ):
            socket.send_pyobj({"name": "shared memory"})


def test_silent_receiver_times_out(sockets, monkeypatch):
    fake_ray(monkeypatch, finished=lambda: False)
    socket = watch.WatchedSocket(sockets[0], receiver="call", timeout_s=0.1)
    socket.send(b"bucket")
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        socket.recv()


def test_rank_without_server_times_out(sockets):
    socket = watch.WatchedSocket(sockets[0], receiver=None, timeout_s=0.1)
    socket.send(b"bucket")
    with pytest.raises(TimeoutError):
        socket.recv()


def test_slow_answer_arrives_even_if_the_call_has_returned(sockets, monkeypatch):
    """The call returns right after its last acknowledgement: a returned call is no failure."""
    fake_ray(monkeypatch, finished=lambda: True)
    socket = watch.WatchedSocket(sockets[0], receiver="call", timeout_s=10)
    socket.send(b"bucket")
    answer = threading.Timer(0.2, lambda: (sockets[1].recv(), sockets[1].send(b"taken")))
    answer.start()
    assert socket.recv() == b"taken"
    answer.join()


def test_sender_gets_the_watched_socket_and_the_call(tmp_path, monkeypatch):
    """The context variable set by the adapter is seen by the sender that ``update_weights`` creates after it."""
    seen = {}

    async def upstream(self, method, non_block=False, timeout=None, args=(), kwargs=None):
        return f"call of {method}"

    async def update_weights():
        await patch_server_adapter.__wrapped__(upstream)(None, "update_weights_from_ipc", non_block=True, kwargs={})
        sender = BucketedWeightSender(f"ipc://{tmp_path}/sender.sock", bucket_size_mb=1, use_shm=True)
        sender._init_socket()
        seen.update(socket=sender.socket, receiver=sender.socket._receiver)
        sender.socket.close()

    asyncio.run(update_weights())
    assert isinstance(seen["socket"], watch.WatchedSocket)
    assert seen["receiver"] == "call of update_weights_from_ipc"


def test_upstream_is_what_the_patches_were_written_for():
    adapter = inspect.getsource(original(ServerAdapter.update_weights))
    call, wait = adapter.index('"update_weights_from_ipc",\n            non_block=True'), adapter.index("await future")
    assert call < adapter.index("BucketedWeightSender(") < wait, "verl now awaits the call before or beside the sender"
    sender = inspect.getsource(BucketedWeightSender.async_send_weights)
    assert sender.index("self._init_socket()") < sender.index("self.socket.recv()")
    assert "self.socket.recv()" in sender, "verl no longer waits without a limit: delete patch_weight_sender"
    whole = inspect.getsource(BucketedWeightSender)
    assert whole.count("self.socket.send") == whole.count("self.socket.send_pyobj("), "a send that is not watched"
