"""The command line, curves, search, validation, figures; and that none of it loads torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from darts.config import STRATEGIES
from darts.simulation import SimulationError
from darts.simulation.command import main
from darts.simulation.options import BUILTIN, block_of, load_curve
from darts.simulation.search import flags
from darts.simulation.validation import kendall, read_bench, spearman

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "darts/simulation/data/rollout_lengths.csv.gz"


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{step},{prompt},{candidate},{int(np.exp(rng.normal(5, 0.5))) + 1}"
        for step in (1, 2)
        for prompt in range(8)
        for candidate in range(16)
    ]
    path = tmp_path / "lengths.csv"
    path.write_text("step,prompt,candidate,response_length\n" + "\n".join(rows) + "\n")
    return path


def test_replay_prints_every_strategy_with_its_interval_and_the_formulas(trace, tmp_path, capsys):
    told = tmp_path / "replay.json"
    assert main(["replay", str(trace), "--gpus", "2", "8", "--steps", "6", "--seeds", "2", "--json", str(told)]) == 0
    printed = capsys.readouterr().out
    for gpus in (2, 8):
        for name in (*STRATEGIES, "oracle", "oracle, own batches"):
            assert f"| {gpus} | {name} |" in printed
        assert f"{gpus} GPUs: fastest is" in printed
    for text in ("bubble: 1 - ", "gap closed: ", "Lengths are replayed as they were recorded", "built in: an estimate"):
        assert text in printed
    assert "MODEL" not in printed
    rows = json.loads(told.read_text())["rows"]
    assert [row["steps"] for row in rows] == [12] * 16
    plain, oracle = (next(row for row in rows if row["name"] == name) for name in ("none", "oracle"))
    assert plain["rollout_s"] > oracle["rollout_s"] > 0


def test_arms_with_settings_of_their_own(trace, capsys):
    arms = ["darts", "darts:selection.num_long=0,early_stop=exact", "darts.strategy.ShortestK"]
    chosen = [part for arm in arms for part in ("--strategy", arm)]
    command = ["replay", str(trace), "--steps", "2", *chosen, "--set", "darts.allocation.high=20"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(f"| {arm} |" in printed for arm in arms)
    assert "NOTE: 20.0% of 20 candidates a prompt were not recorded" in printed


def test_a_figure_is_drawn(trace, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "replay.png"
    assert main(["replay", str(trace), "--steps", "2", "--strategy", "darts", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_model_of_shaping_is_marked_wherever_it_is_used(trace, tmp_path, capsys):
    runs = []
    for name, factor in (("plain", 1.0), ("shaped", 0.9)):
        lines = []
        for step in range(3):
            rollout = {"key": ["a"], "length": [[int(1000 * factor**step), int(500 * factor**step)]], "fate": ["kk"]}
            lines.append(json.dumps({"version": 1, "step": step, "metrics": {}, "rollout": rollout}))
        runs.append(tmp_path / f"{name}.jsonl")
        runs[-1].write_text("\n".join(lines) + "\n")
    command = ["replay", str(trace), "--steps", "4", "--strategy", "darts", "--strategy", "sorted"]
    assert main([*command, "--shaping", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert "MODEL of shaping, per step, for 2 steps" in printed
    assert "| darts (MODEL) |" in printed
    assert "| sorted |" in printed
    assert "Rows marked MODEL" in printed


def test_plan_recommends_and_says_what_it_cannot_know(trace, tmp_path, capsys):
    told = tmp_path / "plan.json"
    assert main(["plan", str(trace), "--gpus", "8", "--steps", "2", "--json", str(told)]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: darts.strategy=darts darts." in printed
    assert "preset=paper: " in printed
    assert "preset=fast: " in printed
    assert "Fastest in this replay: darts.strategy=" in printed
    assert "Replay knows nothing of shaping" in printed
    chosen = json.loads(told.read_text())["recommended"]
    assert chosen.get("selection", {}).get("num_long", 1) >= 1
    assert flags(chosen).startswith("darts.strategy=darts darts.")


def write_bench(path, rows, arms=()):
    """The JSON of a benchmark; a row is an arm, its seconds a step, and those of the rollout."""
    columns = dict(zip(("arm", "step_s", "rollout_s"), zip(*rows, strict=True), strict=True))
    path.write_text(json.dumps({"steps": columns, "arms": arms}))


def test_validate_compares_with_what_was_measured(trace, tmp_path, capsys):
    bench = tmp_path / "bench.json"
    rows = [
        (arm, seconds + step / 100, seconds - 1)
        for arm, seconds in (("none", 5.0), ("fewer", 4.0), ("bypass", 4.5))
        for step in range(3)
    ]
    arms = [{"name": "fewer", "strategy": "darts", "changes": {"allocation.mode": "off"}}]
    write_bench(bench, rows, arms)
    fewer = read_bench(bench)[1]
    assert (fewer.arm.name, fewer.arm.block) == (
        "fewer",
        {"enable": True, "strategy": "darts", "allocation": {"mode": "off"}},
    )
    assert fewer.step_s == [4.0, 4.01, 4.02]
    assert main(["validate", str(trace), "--bench", str(bench), "--gpus", "4", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert "| fewer | 3 | 4.010 |" in printed
    assert "NOTE: log-probs during" not in printed
    assert "median error" in printed
    assert "Kendall's tau" in printed


def run_file(path, lengths, fates, gen):
    """The JSONL of a run with one rollout."""
    metrics = {"timing_s/gen": gen, "timing_s/step": gen + 1, "timing_s/old_log_prob": 1.0}
    rollout = {"key": [str(n) for n in range(len(lengths))], "length": lengths, "fate": fates}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"version": 1, "step": 1, "metrics": metrics, "rollout": rollout}) + "\n")


def test_validate_compares_means_over_rounds_of_every_kind_and_over_seeds(tmp_path, capsys):
    """A tail-batching arm: four short rounds and a long one. Its median is that of the short ones."""
    bench, told = tmp_path / "bench.json", tmp_path / "validate.json"
    seconds = {"none": [4.0] * 5, "tail": [2.0, 2.0, 2.0, 2.0, 7.0]}
    rows = [(arm, s, s - 1) for arm, some in seconds.items() for s in some]
    write_bench(bench, rows, [{"name": "tail", "strategy": "tail_batching"}])
    for seed, tokens in ((0, 100), (1, 300)):
        run_file(tmp_path / f"seed{seed}" / "none.jsonl", [[tokens] * 2] * 4, ["kk"] * 4, gen=20.0 + seed)
    seeds = [str(tmp_path / f"seed{seed}") for seed in (0, 1)]
    plain = [f"{seed}/none.jsonl" for seed in seeds]
    command = ["validate", plain[0], "--bench", str(bench), "--gpus", "1", "--group-size", "2", "--steps", "5"]
    command += ["--curve", "flat", "--json", str(told), "--fit", *plain, "--traces", *seeds]
    assert main(command) == 0
    none, tail = json.loads(told.read_text())["rows"]
    assert (none["measured_s"], tail["measured_s"]) == (4.0, 3.0)
    assert none["simulated_s"] == pytest.approx(21.5), "of both seeds' runs, as they took"
    assert f"fitted to {', '.join(plain)}" in capsys.readouterr().out


def test_what_favours_an_arm_is_said_where_that_arm_is_compared(trace, tmp_path, capsys):
    def notes(*words):
        told = tmp_path / "replay.json"
        assert main(["replay", str(trace), "--steps", "2", "--gpus", "2", "--json", str(told), *words]) == 0
        printed, about = capsys.readouterr().out, json.loads(told.read_text())["about"]
        assert all(line in printed for line in about)
        return "\n".join(line for line in about if line.startswith("NOTE") and "recorded" not in line)

    def arms(*names):
        return [part for name in names for part in ("--strategy", name)]

    assert notes(*arms("none", "bypass", "darts:allocation.mode=off")) == ""
    assert notes(*arms("shortest_k", "none")).endswith("which favours shortest_k.")
    dual_end = "darts:selection.mode=dual_end"
    several = notes(*arms("none", dual_end, "tail_batching", "sorted"))
    assert f"requests of more candidates take no time, which favours {dual_end}, tail_batching, sorted." in several
    assert "abort_s=0, so aborts arrive at once, which favours tail_batching, sorted." in several
    assert "not balanced over ranks, which favours sorted." in several
    assert notes(*arms("tail_batching"), "--abort-s", "0.1", "--cost", "candidate_s=0.01") == ""
    assert notes(*arms("darts:selection.long_wait=deadline"), "--cost", "candidate_s=1").startswith("NOTE: abort_s=0")
    hides = "log-probs during generation hide 98% of that phase (hidden_share), and make generation 1 s longer for each"
    overlap = arms("darts:overlap.mode=sequence,allocation.mode=off", "bypass", "none")
    assert hides in notes(*overlap)
    assert "and generation is none the slower: darts:overlap" in notes(*overlap, "--placement", "disaggregated")


def test_a_benchmark_as_columns(tmp_path):
    bench = tmp_path / "bench.json"
    arms = [{"name": "two long", "strategy": "darts", "changes": {"selection.num_long": 2}, "overlap": "token"}]
    columns = {"arm": ["none", "two long"], "step_s": [2.0, 1.5], "rollout_s": [1.0, 0.5]}
    config = {"darts": {"selection": {"mode": "dual_end"}}}
    bench.write_text(json.dumps({"steps": columns, "arms": arms, "config": config}))
    none, long = read_bench(bench)
    assert none.arm.block == {"selection": {"mode": "dual_end"}, "enable": True, "strategy": "none"}
    assert long.arm.block["selection"] == {"mode": "dual_end", "num_long": 2}
    assert (long.arm.block["overlap"], long.rollout_s) == ({"mode": "token"}, [0.5])


def test_rank_agreement():
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert (kendall([1, 2], [2, 1]), spearman([1, 2], [2, 1])) == pytest.approx((-1.0, -1.0))
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert np.isnan(kendall([1], [1]))
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_settings_on_the_command_line():
    given = [
        "darts.selection.num_long=2",
        "early_stop=exact",
        "allocation.mean_candidates=null",
        "darts.selection.mode=auto",
    ]
    assert block_of(given) == {
        "selection": {"num_long": 2, "mode": "auto"},
        "early_stop": "exact",
        "allocation": {"mean_candidates": None},
    }


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_curves(name):
    curve, told = load_curve(name)
    assert curve(1) < curve(1024) < 1024 * curve(1)
    assert "not measured" in told


def test_curves_from_files(tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"batch_sizes": [1, 2], "seconds": [0.5, 1.0]}))
    assert load_curve(str(path))[0](2) == 1.0
    for content in ("{", '{"batch_sizes": [1], "seconds": [1]}', "{}", '{"batch_sizes": [1, 2], "seconds": [-1, 2]}'):
        path.write_text(content)
        with pytest.raises(SimulationError, match=r"curve.json: holds no latency curve"):
            load_curve(str(path))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--strategy", "fastest"], "must be one of none, bypass, shortest_k, darts, tail_batching, sorted"),
        (["--strategy", "no.such.Class"], "is neither one of none, bypass"),
        (["--strategy", "darts:selection.num_long=9"], "darts.selection.num_long=9: L must be an integer in"),
        (["--set", "darts.selection.nun_long=2"], "did you mean darts.selection.num_long?"),
        (["--set", "darts.selection"], "--set darts.selection: must be KEY=VALUE"),
        (["--curve", "nothing"], "neither a file nor one of h20-like, h100-like, flat"),
        (["--gpus", "2", "--tensor-parallel", "4"], "at least one engine"),
        (["--gpus", "0"], "0 must be at least 1"),
        (["--gpus", "many"], "argument --gpus"),
        (["--steps", "-1"], "must be at least 1"),
        (["--first", "9"], "has steps 1 to 2, none of 9 to None"),
        (["--cost", "sleep_s=1"], "names are rollout_s, candidate_s"),
        (["--cost", "update_s=-1"], "must be NAME=VALUE, not negative"),
        (["--fit", "nothing.jsonl"], "nothing.jsonl: cannot be read"),
        (["--json", "no/such/folder.json"], "a file cannot be written there"),
        (["--fast"], "unrecognized arguments: --fast; --help lists the options"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trace, capsys, arguments, told):
    with pytest.raises(SystemExit, match="2"):
        main(["replay", str(trace), *arguments])
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.startswith("[darts] ")
    assert captured.err.count("\n") == 1
    assert "|---" not in captured.out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "must be JSON"),
        ("[]", "has no steps"),
        ('{"steps": {}}', "has no steps"),
        (
            '{"steps": {"arm": ["none"], "step_s": []}}',
            "steps[0]: must have arm and a positive step_s, in columns of one length",
        ),
        ('{"steps": {"step_s": [1]}}', "steps[0]: must have arm"),
        ('{"steps": {"arm": ["none"], "step_s": [0]}}', "steps[0]: must have arm and a positive step_s"),
    ],
)
def test_bad_benchmarks(trace, tmp_path, capsys, content, told):
    bench = tmp_path / "bench.json"
    bench.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["validate", str(trace), "--bench", str(bench)])
    assert told in capsys.readouterr().err


def test_nothing_heavy_is_loaded():
    modules = [
        f"darts.simulation.{path.stem}" for path in (ROOT / "darts/simulation").glob("*.py") if path.stem[0] != "_"
    ]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "print(*sorted(set(sys.modules) & {'torch', 'ray', 'verl', 'vllm', 'transformers', 'tensordict', 'pandas'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.slow
def test_real_lengths_from_end_to_end():
    command = [sys.executable, "-m", "darts.simulation", "replay", str(REAL), "--first", "102", "--gpus", "8", "1024"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr
    assert "1024 GPUs: fastest is" in run.stdout
