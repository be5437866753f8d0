"""What the streaming server and its client rely on in verl 0.9.1 and vLLM, without an engine; tests/engine has one."""

import asyncio
import dataclasses
import hashlib
import inspect
import textwrap
import time
from types import SimpleNamespace

import pytest
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.config import CacheConfig
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, MPClient
from vllm.v1.engine.exceptions import EngineDeadError

from darts.latency import StepTimes
from darts.messages import Chunk
from darts.rollout.client import OpenRequest
from verl_patches import vllm_stream_server as module
from verl_patches.vllm_stream_server import (
    StreamingReplica,
    StreamingServer,
    _EngineSteps,
    _Outbox,
    _Stream,
    _StreamingEngine,
)


def digest(symbol) -> str:
    return hashlib.sha256(textwrap.dedent(inspect.getsource(symbol)).encode()).hexdigest()[:12]


TEXTS = {
    "StreamingServer: reaches the engine by self.engine.generate": (vLLMHttpServer.generate, "4ec002789c37"),
    "StreamingServer: sets self.engine": (vLLMHttpServer.run_server, "542a06f053fe"),
    "DartsServerClient: acquire, server.generate.remote, release": (LLMServerClient.generate, "8d3e05f652e0"),
    "DartsServerClient: _acquire_server": (LLMServerClient._acquire_server, "f2e3d5305b2b"),
    "DartsServerClient: _release_server": (LLMServerClient._release_server, "293515c2c820"),
}


@pytest.mark.parametrize("who", TEXTS)
def test_text_of_what_is_wrapped(who):
    symbol, pinned = TEXTS[who]
    assert digest(symbol) == pinned, f"{who}: {symbol.__qualname__} of verl changed"


def test_verl_reads_of_the_last_output_what_the_stream_puts_there():
    source = inspect.getsource(vLLMHttpServer.generate)
    for line in (
        "generator = self.engine.generate(",
        "final_res = output",
        "token_ids = final_res.outputs[0].token_ids",
        "enumerate(final_res.outputs[0].logprobs)",
        "if not final_res.outputs:",
        "rejected = await self._park_until_admitted(request_id)",
    ):
        assert line in source, line


def test_the_hooks_of_server_and_replica_are_there():
    parameters = inspect.signature(vLLMHttpServer._post_init).parameters
    assert [name for name in parameters if name != "_ray_trace_ctx"] == ["self", "cuda_visible_devices"]
    assert "self._post_init(" in inspect.getsource(vLLMHttpServer.__init__)
    assert "self.server_class = " in inspect.getsource(vLLMReplica.__init__)
    assert "max_concurrency=self.max_concurrency" in inspect.getsource(vLLMReplica.launch_servers)
    assert isinstance(RolloutReplica.max_concurrency, property)
    for name in ("generate_streamed", "take_chunks", "abort_streams", "kv_tokens"):
        assert not hasattr(vLLMHttpServer, name), f"verl has a {name} of its own now"


def test_vllm_aborts_by_external_ids():
    assert list(inspect.signature(AsyncLLM.abort).parameters) == ["self", "request_id", "internal"]
    assert inspect.signature(AsyncLLM.abort).parameters["internal"].default is False
    assert {"prompt", "sampling_params", "request_id"} <= set(inspect.signature(AsyncLLM.generate).parameters)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", dict(RolloutReplicaRegistry._registry))


def test_it_takes_the_place_of_verls_own_and_leaves_subclasses(registry):
    module.register()
    assert RolloutReplicaRegistry.get("vllm") is StreamingReplica
    mine = type("Mine", (StreamingReplica,), {})
    RolloutReplicaRegistry.register("vllm", lambda: mine)
    module.register()
    assert RolloutReplicaRegistry.get("vllm") is mine


def test_a_replica_of_someone_else_is_not_replaced_silently(registry):
    RolloutReplicaRegistry.register("vllm", lambda: type("Theirs", (vLLMReplica,), {}))
    with pytest.raises(RuntimeError, match=r"Theirs, which cannot stream: make it a subclass of .*StreamingReplica"):
        module.register()


def test_an_abort_never_waits_behind_generates():
    replica = StreamingReplica.__new__(StreamingReplica)
    replica.config = type("Config", (), {"max_num_seqs": 1024})()
    assert replica.max_concurrency >= 50_000


# --- the cut into chunks, by a scripted engine ---


class ScriptedEngine:
    """One output per entry of `steps`, as vLLM's front end would give it; ends with `error` if there is one."""

    def __init__(self, steps, reason="stop", error=None):
        self.steps, self.reason, self.error = steps, reason, error
        self.sampling_params = None

    async def generate(self, *, sampling_params, request_id):
        self.sampling_params, made = sampling_params, []
        for number, count in enumerate(self.steps):
            new = list(range(len(made), len(made) + count))
            made += new
            if sampling_params.output_kind != RequestOutputKind.DELTA:
                new = list(made)
            shown = new or made
            last = number == len(self.steps) - 1
            part = CompletionOutput(
                index=0, text="", token_ids=new, cumulative_logprob=None,
                logprobs=[{token: Logprob(-token / 10)} for token in shown],
                finish_reason=self.reason if last else None,
            )  # fmt: skip
            prompt_logprobs = ["of the prompt"] if number == 0 else None
            yield RequestOutput(request_id, None, [1], prompt_logprobs, [part], last)
        if self.error is not None:
            raise self.error


def streamed(engine, chunk_tokens, **changes):
    outbox = _Outbox()
    engine_steps = _EngineSteps(last={0: (2, time.monotonic())}, total=7)
    stream = _Stream("r", chunk_tokens, changes.pop("first_tokens", chunk_tokens), outbox, engine_steps, **changes)

    async def run():
        module._stream.set(stream)
        outputs = [
            output
            async for output in _StreamingEngine(engine).generate(sampling_params=SamplingParams(), request_id="r")
        ]
        return outputs[-1]

    return asyncio.run(run()), outbox.chunks, stream


def test_token_by_token_is_gathered_into_chunks():
    """vLLM before 0.28 has no stream interval per request."""
    engine = ScriptedEngine([1] * 10)
    last, chunks, stream = streamed(engine, chunk_tokens=4)
    assert [(chunk.offset, chunk.token_ids) for chunk in chunks] == [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]
    assert [chunk.running for chunk in chunks] == [2, 2], "sequences that the engine runs, whoever's"
    assert [chunk.steps for chunk in chunks] == [7, 7]
    assert last.outputs[0].token_ids == list(range(10))
    assert [at[token].logprob for token, at in enumerate(last.outputs[0].logprobs)] == [-t / 10 for t in range(10)]
    assert last.prompt_logprobs == ["of the prompt"], "vLLM gives them with the first output only"
    assert stream.finish_reason == "stop"
    assert engine.sampling_params.output_kind == RequestOutputKind.DELTA


def test_the_first_chunk_may_come_with_the_first_token():
    _, chunks, _ = streamed(ScriptedEngine([1] * 10), chunk_tokens=4, first_tokens=1)
    assert [(chunk.offset, chunk.token_ids) for chunk in chunks] == [(0, [0]), (1, [1, 2, 3, 4]), (5, [5, 6, 7, 8])]


def test_a_request_tells_how_long_steps_took_from_its_second_chunk_on():
    def grow(*chunks):
        async def run():
            request, times = OpenRequest({"request_id": "r", "prompt_ids": []}, "server", None, None), StepTimes()
            for chunk in chunks:
                request.grow(chunk, times)
            return request.tokens, times.points()

        return asyncio.run(run())

    first = Chunk("r", 0, [1] * 5, made_at=10.0, running=9, steps=20)
    second = Chunk("r", 5, [1] * 4, made_at=10.5, running=7, steps=24)
    assert grow(first) == (5, []), "its time has the prompt's in it"
    assert grow(first, second) == (9, [(8.0, 0.125, 4)])
    idle = [chunk._replace(running=chunk.running / 64) for chunk in (first, second)]
    assert grow(*idle) == (9, [(1.0, 0.125, 4)]), "one that gets tokens runs"
    assert grow(first._replace(running=0), second) == (9, []), "the server does not know how many ran"
    assert grow(first, second, Chunk("r", 9, [1] * 2, made_at=10.4, running=7, steps=26)) == (11, [(8.0, 0.125, 4)])


def test_a_request_that_was_preempted_tells_nothing_of_steps():
    async def run(steps):
        request, times = OpenRequest({"request_id": "r", "prompt_ids": []}, "server", None, None), StepTimes()
        request.grow(Chunk("r", 0, [1] * 4, made_at=10.0, running=8, steps=4), times)
        request.grow(Chunk("r", 4, [1] * 4, made_at=20.0, running=8, steps=4 + steps), times)
        return times.points()

    assert asyncio.run(run(8)) == [(8.0, 2.5, 4)]
    assert asyncio.run(run(9)) == [], "the engine made more than two steps for each of its tokens"


# --- what the engines send ---


class ScriptedCore:
    """vLLM's client of its engine cores: `(engine, sequences)` of one step after the other."""

    def __init__(self, *steps):
        self.steps = list(steps)

    async def get_output_async(self):
        index, count = self.steps.pop(0)
        return EngineCoreOutputs(engine_index=index, outputs=[EngineCoreOutput(str(n), [7]) for n in range(count)])


def counted(*steps):
    """What a server knows after such steps, and what went on to vLLM's output handler."""
    core, counts = ScriptedCore(*steps), _EngineSteps()
    counts.watch(SimpleNamespace(engine_core=core))

    async def run():
        return [await core.get_output_async() for _ in steps]

    return counts, [(outputs.engine_index, len(outputs.outputs)) for outputs in asyncio.run(run())]


def test_running_sequences_are_those_that_got_a_token_in_the_last_step():
    counts, handled = counted((0, 3), (0, 64), (0, 60), (0, 0))
    assert handled == [(0, 3), (0, 64), (0, 60), (0, 0)], "nothing is held back"
    assert (counts.running, counts.steps) == (60, 3), "an output without sequences is no step"
    assert (_EngineSteps().running, _EngineSteps().steps) == (0.0, 0)


def test_data_parallel_ranks_of_a_server_are_engines_each(monkeypatch):
    counts, _ = counted((0, 3), (1, 10), (0, 20), (1, 10))
    assert (counts.running, counts.steps) == (15, 2)
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 2 * module.FRESH_S)
    counts.add(1, 8)
    assert counts.running == 8, "one that has made no step for long runs nothing"


def test_vllms_output_handler_asks_the_core_for_each_step_anew():
    """`_EngineSteps.watch` puts itself between the two; the handler runs when the server has an engine."""
    handler = inspect.getsource(AsyncLLM._run_output_handler)
    assert "engine_core = self.engine_core" in handler
    assert "outputs = await engine_core.get_output_async()" in handler
    assert "num_outputs = len(outputs.outputs)" in handler
    assert inspect.iscoroutinefunction(AsyncMPClient.get_output_async)
    assert list(inspect.signature(AsyncMPClient.get_output_async).parameters) == ["self"]
    assert {"engine_index", "outputs"} <= set(EngineCoreOutputs.__struct_fields__)
    appended = inspect.getsource(Scheduler.update_from_output)
    emits = "should_emit_output = bool(\n                new_token_ids or pooler_output is not None or stopped\n"
    assert emits in appended, "one output for each sequence that got a token"


def test_the_front_end_knows_the_kv_cache_of_one_engine():
    ready = inspect.getsource(MPClient._apply_ready_response)
    assert "response.kv_cache_size_tokens" in ready
    assert "do not sum across DP" in ready, "num_gpu_blocks is the sum over the engines of a server"
    assert "kv_cache_size_tokens" in {field.name for field in dataclasses.fields(CacheConfig)}
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_size_tokens=12_345))
    server = SimpleNamespace(engine=SimpleNamespace(vllm_config=config))
    assert asyncio.run(StreamingServer.kv_tokens(server)) == 12_345
    assert (
        asyncio.run(
            StreamingServer.kv_tokens(
                SimpleNamespace(engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=SimpleNamespace())))
            )
        )
        is None
    )


def test_an_abort_right_after_a_chunk_does_not_double_log_probs():
    """vLLM then gives no tokens, and the log-probs of all of them."""
    last, chunks, stream = streamed(ScriptedEngine([1, 4, 0], reason="abort"), chunk_tokens=4)
    assert len(last.outputs[0].logprobs) == len(last.outputs[0].token_ids) == 5
    assert [len(chunk.token_ids) for chunk in chunks] == [5]
    assert stream.finish_reason == "abort"


def test_whole_outputs_are_cut_all_the_same():
    """Where router decisions are replayed: vLLM would lose them where it merges outputs of kind DELTA."""
    engine = ScriptedEngine([1, 4, 4, 1])
    last, chunks, _ = streamed(engine, chunk_tokens=4, delta=False)
    assert engine.sampling_params.output_kind == RequestOutputKind.CUMULATIVE
    assert [(chunk.offset, len(chunk.token_ids)) for chunk in chunks] == [(0, 5), (5, 4)]
    assert last.outputs[0].token_ids == list(range(10))
    assert len(last.outputs[0].logprobs) == 10


def test_each_request_of_a_dead_engine_raises_an_error_of_its_own():
    shared = EngineDeadError()
    with pytest.raises(EngineDeadError) as raised:
        streamed(ScriptedEngine([1], error=shared), chunk_tokens=4)
    assert raised.value is not shared
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_an_aborted_request_never_reaches_the_engine():
    engine = ScriptedEngine([1])
    last, chunks, stream = streamed(engine, chunk_tokens=4, aborted=True)
    assert (last.outputs, last.finished, chunks) == ([], True, [])
    assert stream.finish_reason == "abort"
    assert engine.sampling_params is None


def test_without_a_stream_the_engine_is_called_as_it_is():
    engine = ScriptedEngine([1])
    generator = _StreamingEngine(engine).generate(sampling_params="untouched", request_id="r")
    assert generator.__qualname__ == ScriptedEngine.generate.__qualname__
    assert _StreamingEngine(engine).reason == "stop", "everything else is the engine's"
    assert issubclass(StreamingServer, vLLMHttpServer)


def test_an_abort_is_repeated_until_the_request_has_ended(monkeypatch):
    """The engine may learn of a request later than all the pauses together last."""
    monkeypatch.setattr(module, "ABORT_WAITS_S", (0.0, 0.0))
    streams = {name: SimpleNamespace(aborted=False) for name in ("slow", "other")}
    attempts, warnings = [], []
    monkeypatch.setattr(module.logger, "warning", lambda *said: warnings.append(said))

    async def abort(request_ids):
        attempts.append(request_ids)
        if len(attempts) == 7:
            del streams["slow"]

    server = SimpleNamespace(_streams=streams, _early_aborts={}, engine=SimpleNamespace(abort=abort))
    stopped = asyncio.run(StreamingServer.abort_streams(server, ["slow", "unknown"]))
    assert stopped == ["slow"]
    assert attempts == [["slow"]] * 7
    assert not streams["other"].aborted
    assert list(server._early_aborts) == ["unknown"]
    assert warnings == [("aborted requests still run: %s", ["slow"])], "once"
