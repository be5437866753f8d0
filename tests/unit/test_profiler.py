"""The profiler on engines whose steps are known, and the file that keeps what it measured."""

import asyncio
import json
import random
import time
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from virtual_time import use_virtual_time

from darts.checks.model import model_id, vocabulary
from darts.config import ConfigError
from darts.engines import measure as profiler
from darts.engines.command import main, table
from darts.engines.measure import ProfileError, StuckRequests, Workload, profile_servers
from darts.evidence.profile import LatencyProfile

MOMENT_S = 1e-4
"""Virtual time stands still where nobody waits."""
ROLLOUT = SimpleNamespace(
    max_num_seqs=16, max_model_len=1000, prompt_length=64, data_parallel_size=1, tensor_model_parallel_size=2,
    temperature=0.9, top_p=1.0, top_k=-1, calculate_log_probs=True,
)  # fmt: skip
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 400}


def seconds_of(size):
    """Of one step of a scripted engine."""
    return 0.002 + 0.0001 * size


class Engine:
    """A server whose engine steps by a clock of its own: each step gives every running request a token.

    Args:
        places: Requests that run at once; the others wait.
        room: Of them, those that fit into the KV cache; they take turns.
        prefill: Seconds of a step that admits a request. One is admitted per step.
        pause: Seconds of real time per running request and step.
        silent: From this number of requests on, nothing is generated.
        fails: From this number of requests on, one fails.
        deaf: Aborts do nothing.
    """

    def __init__(self, places=1000, room=1000, prefill=1.0, pause=0.0, silent=1000, fails=1000, deaf=False, **rollout):
        self.places, self.room, self.prefill, self.pause = places, room, prefill, pause
        self.silent, self.fails, self.deaf = silent, fails, deaf
        self.rollout = SimpleNamespace(**vars(ROLLOUT) | rollout)
        self.clock = random.uniform(0, 1e5)
        self.aborted = []  # ids, by abort
        self.asked = []  # arguments of every request
        self.batches = []  # most requests open at once, for every time that any were
        self.open = {}  # id -> [event, tokens, chunk_tokens, sent, max_tokens]
        self.running = []
        self.chunks = []
        self.loop = None

    def __getattr__(self, name):
        """As a Ray handle: `handle.method.remote(...)`."""
        target = getattr(type(self), f"on_{name.strip('_')}")
        return SimpleNamespace(remote=lambda *args, **kwargs: asyncio.ensure_future(target(self, *args, **kwargs)))

    async def on_get_rollout_config(self):
        return self.rollout

    async def on_ray_call(self, function):
        assert function is profiler._device
        return "Scripted 9000"

    async def on_generate_streamed(self, *, client, request_id, prompt_ids, sampling_params, chunk_tokens):
        self.asked.append({"prompt_ids": prompt_ids, "sampling_params": sampling_params})
        if not self.open:
            self.batches.append(0)
        ended = asyncio.Event()
        self.open[request_id] = [ended, 0, chunk_tokens, 0, sampling_params["max_tokens"]]
        self.batches[-1] = max(self.batches[-1], len(self.open))
        if self.loop is None or self.loop.done():
            self.loop = asyncio.ensure_future(self.steps())
        await ended.wait()
        if self.fails == 0:
            raise RuntimeError("out of memory")

    async def on_take_chunks(self, client, wait_s):
        end = time.monotonic() + wait_s
        while not self.chunks and self.open and time.monotonic() < end:
            await asyncio.sleep(MOMENT_S)
        chunks, self.chunks = self.chunks, []
        return chunks

    async def on_abort_streams(self, request_ids):
        self.aborted += request_ids
        if not self.deaf:
            for request_id in request_ids:
                self.end(request_id)

    def end(self, request_id):
        if request_id in self.open:
            self.open.pop(request_id)[0].set()

    async def steps(self):
        await asyncio.sleep(MOMENT_S)  # until all have come
        while self.open:
            self.running = [name for name in self.running if name in self.open]
            waiting = [name for name in self.open if name not in self.running]
            if len(self.open) >= self.fails:
                self.fails = 0
                self.end(waiting[0])
            if len(self.open) >= self.silent:
                await asyncio.sleep(0.005)
                continue
            step_names = self.running[: self.room]
            self.running = self.running[self.room :] + step_names
            self.clock += seconds_of(len(step_names))
            if waiting and len(self.running) < self.places:
                self.running.append(waiting[0])
                self.clock += self.prefill
            for name in step_names:
                state = self.open.get(name)
                if state is None:  # aborted meanwhile
                    continue
                state[1] += 1
                if state[1] >= state[4]:
                    self.end(name)
                elif state[1] - state[3] >= state[2]:
                    new = [7] * (state[1] - state[3])
                    running = len(step_names) / self.rollout.data_parallel_size
                    chunk = SimpleNamespace(request_id=name, token_ids=new, made_at=self.clock, running=running)
                    self.chunks.append(chunk)
                    state[3] = state[1]
            await asyncio.sleep(max(self.pause * len(self.running), MOMENT_S))


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch):
    use_virtual_time(monkeypatch)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", CONFIG)


def write_model(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def profile(servers, model, **options):
    """The profile, and what was said. Afterwards nothing runs."""
    said = []
    try:
        return asyncio.run(profile_servers(servers, model, say=said.append, **options)), said
    finally:
        for server in servers:
            assert server.deaf or not server.open


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_time_of_a_step_is_measured_without_prefill_and_queues(model):
    engine = Engine(prefill=100.0)
    measured, said = profile([engine], model)
    assert measured.batch_sizes == [1, 2, 4, 8, 16]
    assert measured.seconds == pytest.approx([seconds_of(size) for size in measured.batch_sizes])
    assert said[0] == "warming up"
    assert said[3] == "[###..] 3/5     4 sequences     2.400 ms per step"
    assert engine.batches == [8, 1, 2, 4, 8, 16]


def test_a_profile_says_what_it_belongs_to(model):
    measured, _ = profile([Engine(), Engine()], model, tokens=40, prompt_tokens=9, command="again")
    assert measured.curve().seconds == pytest.approx([seconds_of(size) for size in (1, 2, 4, 8, 16)])
    assert (measured.model, measured.model_id, measured.tensor_parallel) == (model, model_id(model), 2)
    assert (measured.device, measured.engines, measured.max_num_seqs) == ("Scripted 9000", 2, 16)
    assert (measured.prompt_tokens, measured.tokens, measured.command) == (9, 40, "again")
    assert set(measured.versions) == {"verl", "vllm", "torch"}
    assert measured.date.endswith("+00:00")


def test_all_servers_run_at_once_with_prompts_of_their_own_and_the_rollouts_sampling(model):
    engines = [Engine(), Engine(prefill=0.1)]
    profile(engines, model, largest=4, seeded=True)
    asked = engines[0].asked + engines[1].asked
    assert [engine.batches for engine in engines] == [[4, 1, 2, 4]] * 2
    assert len({tuple(one["prompt_ids"]) for one in asked}) == len(asked)
    assert {len(one["prompt_ids"]) for one in asked} == {64}
    assert {token for one in asked for token in one["prompt_ids"]} <= set(range(100, 200)), "of 400"
    assert len({one["sampling_params"].pop("seed") for one in asked}) == len(asked)
    for one in asked:
        limit = one["sampling_params"].pop("max_tokens")
        assert 96 < limit <= 1000 - 64
        sampling = {"temperature": 0.9, "top_p": 1.0, "top_k": -1, "logprobs": True, "ignore_eos": True}
        assert one["sampling_params"] == sampling


def test_without_seeds_there_are_none_and_each_data_parallel_rank_gets_its_share(model):
    engine = Engine(data_parallel_size=3)
    measured, _ = profile([engine], model, largest=2)
    assert engine.batches == [6, 3, 6]
    assert measured.batch_sizes == [1, 2]
    assert measured.engines == 3
    assert all("seed" not in one["sampling_params"] for one in engine.asked)


def test_a_batch_size_that_might_overrun_the_limit_is_not_started(model):
    engine = Engine(pause=0.0002, max_num_seqs=128)
    start = time.monotonic()
    measured, said = profile([engine], model, limit_s=1.5)
    assert time.monotonic() - start < 2
    assert 2 <= len(measured.batch_sizes) < 8
    assert engine.batches[1:] == measured.batch_sizes
    assert said[-1].startswith(f"stopped: {2 * measured.batch_sizes[-1]} sequences may take ")


def test_a_batch_size_that_hangs_is_given_up_at_the_limit(model):
    measured, said = profile([Engine(silent=16)], model, limit_s=0.8)
    assert measured.batch_sizes == [1, 2, 4, 8]
    assert said[-1] == "stopped: the limit of 0.8 s is reached"


@pytest.mark.parametrize(("silent", "count"), [(1, 0), (2, 1)])
def test_fewer_than_two_points_are_an_error_that_says_so(model, silent, count, monkeypatch):
    monkeypatch.setattr(profiler, "WARM_UP_SIZE", 1)
    with pytest.raises(ProfileError, match=rf"^{count} of 5 batch sizes could be measured within 0.3 s, .* at least 2"):
        profile([Engine(silent=silent)], model, limit_s=0.3)


def test_more_than_an_engine_runs_at_once_is_not_measured(model):
    measured, said = profile([Engine(), Engine(places=4)], model)
    assert measured.batch_sizes == [1, 2, 4]
    assert said[-1] == "stopped: the engine does not run 8 sequences at once"


def test_a_batch_that_runs_in_turns_for_lack_of_kv_cache_is_none(model):
    measured, said = profile([Engine(), Engine(room=6)], model)
    assert measured.batch_sizes == [1, 2, 4]
    assert said[-1] == "stopped: the engine does not run 8 sequences at once"


def test_a_failing_request_is_the_error_and_the_others_are_stopped(model):
    with pytest.raises(RuntimeError, match="out of memory"):
        profile([Engine(fails=9), Engine()], model)


def test_a_server_that_does_not_stop_its_requests_is_an_error(model, monkeypatch):
    monkeypatch.setattr(profiler, "STOP_S", 0.3)
    with pytest.raises(StuckRequests, match=r"did not stop \d requests within 0.3 s of their abort"):
        profile([Engine(deaf=True, pause=0.001)], model)


def test_a_server_that_does_not_answer_is_an_error(model):
    engine = Engine()
    engine.get_rollout_config = SimpleNamespace(remote=lambda: asyncio.sleep(60))
    with pytest.raises(ProfileError, match=r"did not answer within 0\.1 s"):
        profile([engine], model, limit_s=0.1)


def test_a_request_is_aborted_once(model):
    engine = Engine()
    measured, _ = profile([engine], model, largest=2)
    assert measured.batch_sizes == [1, 2]
    assert len(set(engine.aborted)) == len(engine.aborted) > 1


def test_without_servers_or_time_there_is_nothing_to_measure(model):
    with pytest.raises(ValueError, match=r"^servers=\[\]: there must be at least one"):
        profile([], model)
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"limit_s={limit}: must be positive"):
            profile([Engine()], model, limit_s=limit)


def planned(largest=None, tokens=96, prompt_tokens=None, **rollout):
    return Workload.plan(SimpleNamespace(**vars(ROLLOUT) | rollout), 400, largest, tokens, prompt_tokens)


def test_batch_sizes_double_up_to_what_runs_at_once():
    assert planned(max_num_seqs=2).batch_sizes == (1, 2)
    assert planned(max_num_seqs=100).batch_sizes == (1, 2, 4, 8, 16, 32, 64, 100)
    assert planned(largest=100).batch_sizes == (1, 2, 4, 8, 16)
    assert planned(largest=3).batch_sizes == (1, 2, 3)


def test_prompts_are_as_long_as_the_runs_but_not_very_long():
    assert planned().prompt_tokens == 64
    assert planned(prompt_length=2048, max_model_len=None).prompt_tokens == profiler.MOST_PROMPT_TOKENS
    assert planned(prompt_tokens=500).prompt_tokens == 500


def test_as_many_steps_are_timed_as_fit_into_the_context():
    assert planned(tokens=None).tokens == profiler.TOKENS
    assert planned(tokens=None, max_model_len=None).tokens == profiler.TOKENS
    short = planned(tokens=None, prompt_length=48, max_model_len=176)
    assert 80 < short.tokens < profiler.TOKENS
    assert planned(tokens=short.tokens, prompt_length=48, max_model_len=176) == short
    with pytest.raises(ValueError, match="do not fit into max_model_len=70"):
        planned(tokens=None, prompt_length=48, max_model_len=70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": 1}, r"largest batch size 1: must be at least 2 .max_num_seqs=16"),
        ({"max_num_seqs": 1}, r"largest batch size 1: must be at least 2 .max_num_seqs=1"),
        ({"tokens": 7}, "tokens=7: must be at least 8"),
        ({"prompt_tokens": 0}, "prompt_tokens=0: must be at least 1"),
        ({"prompt_tokens": 900}, "prompt_tokens=900, tokens=96: 1036 tokens do not fit into max_model_len=1000"),
        ({"max_model_len": 128}, "do not fit into max_model_len=128"),
    ],
)
def test_workloads_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


# --- the file --------------------------------------------------------------------------------------------------------


PROFILE = LatencyProfile(
    model="mine", model_id="0123", tensor_parallel=2, device="H100", versions={"vllm": "0.24.0"}, date="2026-01-01",
    command="again", engines=1, max_num_seqs=64, prompt_tokens=64, tokens=96, sampling={"top_k": -1},
    batch_sizes=[1, 8, 64], seconds=[0.01, 0.011, 0.02],
)  # fmt: skip


def refused(path):
    with pytest.raises(ConfigError) as raised:
        LatencyProfile.load(path)
    assert raised.value.key == "darts.latency.profile"
    text = str(raised.value)
    assert text.startswith(f"darts.latency.profile={str(path)!r}: ")
    assert f"Fix: measure again with `python -m darts.engines profile --config-name ... --out {path}`" in text
    return text


def test_a_file_gives_the_profile_back(tmp_path):
    path = tmp_path / "new" / "curve.json"
    PROFILE.save(path)
    replace(PROFILE, date="2026-02-02").save(path)
    loaded = LatencyProfile.load(path)
    assert loaded == replace(PROFILE, date="2026-02-02")
    assert loaded.curve()(8) == 0.011
    assert [file.name for file in path.parent.iterdir()] == ["curve.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "curve.json"
    PROFILE.save(path)
    with pytest.raises(TypeError):
        replace(PROFILE, sampling={"top_k": object()}).save(path)
    assert LatencyProfile.load(path) == PROFILE


def test_a_missing_file_is_refused(tmp_path):
    assert "the file cannot be read (No such file or directory)" in refused(tmp_path / "none.json")
    assert "the file cannot be read (Is a directory)" in refused(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, -5])
def test_a_file_that_was_cut_off_is_refused(tmp_path, length):
    path = tmp_path / "curve.json"
    PROFILE.save(path)
    path.write_text(path.read_text()[:length])
    assert "the file is not JSON: it was cut off" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": [1], "seconds": [0.1]}, "holds no curve: batch_sizes=[1.0]: a curve needs at least 2 points"),
        ({"batch_sizes": [], "seconds": []}, "holds no curve: batch_sizes=[]: a curve needs at least 2 points"),
        ({"seconds": [0.1, 0.2, -1]}, "holds no curve: seconds[2]=-1: a step must take more than 0 s"),
        ({"seconds": None}, "holds no curve: seconds=None: must be a list of numbers"),
        ({"batch_sizes": {"a": 1}}, "holds no curve: batch_sizes={'a': 1}: must be a list of numbers"),
        ({"color": "red"}, "no profile of this version; missing or unknown: color"),
    ],
)
def test_a_file_without_a_curve_is_refused(tmp_path, change, message):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(asdict(PROFILE) | change))
    assert message in refused(path)


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", "{}"])
def test_other_json_is_refused(tmp_path, content):
    path = tmp_path / "curve.json"
    path.write_text(content)
    assert "the file is no profile of this version" in refused(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "curve.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "the file is not JSON" in refused(path)


def test_a_profile_of_another_model_or_tensor_parallel_size_is_refused():
    PROFILE.require("curve.json", "0123", 2, "H100")
    with pytest.raises(
        ConfigError, match=r"measured for the model mine \(0123\), this run's is 4567\. Fix: measure again"
    ):
        PROFILE.require("curve.json", "4567", 2)
    with pytest.raises(ConfigError, match="measured with tensor_model_parallel_size=2, this run has 4"):
        PROFILE.require("curve.json", "0123", 4)


def test_another_device_is_a_warning():
    with pytest.warns(UserWarning, match="curve.json: measured on 'H100', this run has 'H20'"):
        PROFILE.require("curve.json", "0123", 2, "H20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PROFILE.require("curve.json", "0123", 2)


def test_people_get_a_table():
    assert table(PROFILE).splitlines()[1:] == [
        "mine on H100, tensor parallel 2",
        "sequences  ms per step   tokens/s",
        "        1       10.000        100",
        "        8       11.000        727",
        "       64       20.000      3,200",
    ]


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_saving_a_model_again_does_not_change_its_fingerprint(tmp_path):
    before = CONFIG | {
        "_name_or_path": "a",
        "transformers_version": "4.50",
        "torch_dtype": "bfloat16",
        "text": {"a": 1},
    }
    after = {"dtype": "float32", "use_cache": False, "eos_token_id": 3, "quantization_config": None}
    after |= dict(reversed(CONFIG.items())) | {"transformers_version": "5.9", "text": {"a": 1, "dtype": "float32"}}
    ids = [model_id(write_model(tmp_path / name, config)) for name, config in (("a", before), ("b", after))]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 16


@pytest.mark.parametrize(
    "change", [{"hidden_size": 128}, {"architectures": ["Qwen3ForCausalLM"]}, {"text": {"layers": 3}}, {"experts": 8}]
)
def test_another_architecture_has_another_fingerprint(tmp_path, change):
    one, other = (write_model(tmp_path / name, config) for name, config in (("a", CONFIG), ("b", CONFIG | change)))
    assert model_id(one) != model_id(other)


def test_a_model_without_a_config_is_refused(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "none"), "./no/such/folder", "~/no/such/folder"):
        with pytest.raises(ConfigError, match=r"^actor_rollout_ref.model.path='.*config.json cannot be read"):
            model_id(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read \(Expecting property name"):
        model_id(str(tmp_path))


def test_the_vocabulary_may_be_that_of_a_part():
    assert vocabulary(CONFIG) == 400
    assert vocabulary({"vision": {"depth": 3}, "text_config": {"vocab_size": 50}}) == 50
    assert vocabulary({}) == 1000


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["measure", "--out", "FILE"], "invalid choice: 'measure'"),
        (["profile"], "the following arguments are required: --out"),
        (["profile", "--out", "FOLDER"], "a file cannot be written there"),
        (["profile", "--out", "FILE/under/a/file"], "a file cannot be written there"),
        (["profile", "--out", "FILE", "--limit-s", "0"], "--limit-s 0: must be positive"),
        (["profile", "--out", "FILE", "--largest", "many"], "invalid int value: 'many'"),
        (["profile", "--out", "FILE", "--speed", "9"], "unrecognized arguments: --speed"),
    ],
)
def test_options_that_cannot_work_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.delattr("darts.engines.command._configure")  # nothing is composed, let alone started
    (tmp_path / "file").write_text("old")
    names = {"FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path)}
    given = [option.replace("FILE", names["FILE"]).replace("FOLDER", names["FOLDER"]) for option in options]
    with pytest.raises(SystemExit) as raised:
        main(given)
    assert raised.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("[darts] ")
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert (tmp_path / "file").read_text() == "old"
