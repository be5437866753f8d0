"""The report of a run: what it reads, what it computes, what it draws and what it refuses."""

import base64
import json
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest

from darts.evidence.figures import Missing, draw_all
from darts.evidence.trace import find_file
from darts.metrics import METRICS
from darts.report import figures as report_figures
from darts.report import run as report_run
from darts.report.__main__ import main
from darts.report.page import summary
from darts.report.run import first_and_last, read_run


def fake_steps(steps=40, prompts=8, seed=0, resumes=(), history=True, pool=True, gaps=False):
    """Lines of a run as the trainer writes them; lengths shrink, rewards rise, budgets follow the predicted std.

    `resumes` has pairs (killed after this step, resumed from that one); without `history` no std is predicted, without
    `pool` not all that ended are scored. With `gaps` step 13 has no rollout, step 17 neither time nor reward.
    """
    rng, group, high, limit = np.random.default_rng(seed), 8, 16, 800
    scales = rng.lognormal(np.log(60), 0.5, 4 * prompts)
    jumps, number = dict(resumes), 1
    while number <= steps:
        progress, known = number / steps, history and number > 1
        rows = rng.choice(len(scales), prompts, replace=False)
        mean = scales[rows] * (1 - 0.4 * progress)
        predicted = 0.7 * mean * rng.lognormal(0, 0.5 - 0.35 * progress, prompts)
        rank = np.argsort(np.argsort(predicted))
        budget = np.where(rank == prompts - 1, high, group + 2 + rank * 4 // prompts) if known else np.full(prompts, 11)
        lengths, fates, rewards = [], [], []
        for m, average in zip(budget.tolist(), mean, strict=True):
            length = np.clip(rng.lognormal(np.log(average) - 0.24, 0.7, m), 4, limit).astype(int)
            fate = np.where(length >= limit, "t", "d")
            valid = [i for i in np.argsort(length, kind="stable") if length[i] < limit]
            fate[valid[:group] if m == high else valid[: group - 1] + valid[-1:]] = "k"
            if m == high:
                fate[length > (cut := length[fate == "k"].max())] = "a"
                length = np.minimum(length, cut + 2)
            fate[np.flatnonzero(fate == "t")[: group - (fate == "k").sum()]] = "f"
            right = rng.random(m) < 0.25 + 0.5 * progress - 0.1 * (length > average)
            scored = np.isin(fate, list("kfdt" if pool else "kf"))
            rewards.append([float(x) if some else None for x, some in zip(right, scored, strict=True)])
            lengths.append(length.tolist())
            fates.append("".join(fate))
        gen = 0.4 + 0.012 * max(map(max, lengths)) + rng.normal(0, 0.1) + 3 * (number == 1)
        times = {
            "gen": gen,
            "reward": 0.05,
            "old_log_prob": 0.5,
            "adv": 0.02,
            "update_actor": 1.5 + rng.normal(0, 0.08),
        }
        times |= {"update_weights": 0.35} | ({} if number % 10 else {"save_checkpoint": 1.2})
        times["step"] = sum(times.values()) + 0.15
        metrics = {f"timing_s/{name}": value for name, value in times.items()}
        kept = np.isin(list("".join(fates)), ["k", "f"])
        metrics["critic/rewards/mean"] = float(np.concatenate(rewards).astype(float)[kept].mean())
        metrics |= {"darts/group/saturated_share": float(np.mean(budget == high)), "darts/rollout/seconds": gen - 0.05}
        if history:
            gain = 0.6 * np.exp(-progress)
            terms = {"gain": gain, "utility": gain / 2, "time_cost": gain / 2 + rng.normal(0, 0.01)}
            terms["time_cost_measured"] = gain / 2 + rng.normal(0, 0.05)
            metrics |= {f"darts/allocation/{name}": value for name, value in terms.items()}
            metrics["darts/latency/predicted_s"] = gen * (1 + 0.4 * (1 - progress) * rng.normal(0.5, 0.3))
        if number % 5 == 0:
            metrics |= {"val-core/tasks/acc/mean@1": 0.3 + 0.45 * progress, "timing_s/testing": 2.5}
        line = {"version": 1, "step": number, "at": 1_763_714_000.0 + number, "metrics": metrics}
        if not (gaps and number == 13):
            line["rollout"] = {
                "key": [f"{row:016x}" for row in rows],
                "std": predicted.tolist() if known else [None] * prompts,
                "observed_std": (0.7 * mean * rng.lognormal(0, 0.2, prompts)).tolist(),
                "budget": budget.tolist(),
            } | {"length": lengths, "fate": fates, "reward": rewards}
        if gaps and number == 17:
            del metrics["timing_s/step"], metrics["critic/rewards/mean"]
        yield line
        number = jumps.pop(number, number) + 1


def write(path, steps, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(step) for step in steps) + end)
    return path


def read(tmp_path, steps, end="\n"):
    return read_run(write(tmp_path / "darts.jsonl", steps, end))


def step(number, rollout=None, **metrics):
    """A step by hand; in the names of metrics, __ stands for /."""
    line = {"version": 1, "step": number, "at": 1.0e9 + number}
    line["metrics"] = {key.replace("__", "/"): value for key, value in metrics.items()}
    return line | ({} if rollout is None else {"rollout": rollout})


# Two prompts of 4 and 3 candidates: 10 20 30 40* and 8 100 64*, * aborted; kept 10, 30 and 8, 100.
ROLLOUT = {
    "key": ["a", "b"],
    "std": [12.0, None],
    "observed_std": [11.0, 50.0],
    "budget": [4, 3],
    "length": [[10, 20, 30, 40], [8, 100, 64]],
    "fate": ["kdka", "kfa"],
    "reward": [[1.0, 0.0, 0.0, None], [1.0, 1.0, None]],
}


# --- what is computed ------------------------------------------------------------------------------------------------


def test_figures_of_one_rollout(tmp_path):
    run = read(tmp_path, [step(7, ROLLOUT)])
    values = run.steps[0].values
    assert values["length/pool"] == pytest.approx(272 / 7)
    assert values["length/kept"] == pytest.approx((10 + 30 + 8 + 100) / 4)
    assert (values["length/median"], values["length/longest"]) == (30, 100)
    assert values["length/p90"] == pytest.approx(64 + 0.4 * 36)  # rank 5.4 of 0 to 6
    assert values["length/p99"] == pytest.approx(64 + 0.94 * 36)
    assert (values["tokens/generated"], values["tokens/kept"]) == (272, 148)
    assert values["darts/reward/kept_mean"] == 3 / 4
    assert values["darts/reward/pool_mean"] == 3 / 5  # of the five that ended
    assert "std_correlation" not in values  # one prompt is known
    rollout = run.steps[0].rollout
    assert rollout.fates.tolist() == [3, 1, 0, 1, 0, 2, 0]  # k f c d t a x
    assert rollout.lengths.tolist() == [8, 10, 20, 30, 40, 64, 100]
    assert rollout.budgets == {4: 1, 3: 1}
    assert rollout.std.tolist() == [[12, 11, 4]]


def test_reward_of_the_pool_is_unknown_where_one_that_ended_was_not_scored(tmp_path):
    only_kept = ROLLOUT | {"reward": [[1.0, None, 0.0, None], [1.0, 1.0, None]]}
    values = read(tmp_path, [step(1, only_kept)]).steps[0].values
    assert values["darts/reward/kept_mean"] == 3 / 4
    assert "darts/reward/pool_mean" not in values
    without = {key: value for key, value in ROLLOUT.items() if key != "reward"}
    logged = read(tmp_path, [step(1, without, darts__reward__pool_mean=0.25)]).steps[0].values
    assert logged["darts/reward/pool_mean"] == 0.25
    assert "darts/reward/kept_mean" not in logged


def test_correlation_of_predicted_and_observed(tmp_path):
    prompts = {
        "key": list("abcd"),
        "std": [1.0, 2.0, 3.0, None],
        "observed_std": [2.0, 1.0, 3.0, 9.0],
        "budget": [1] * 4,
    }
    block = prompts | {"length": [[5]] * 4, "fate": ["k"] * 4}
    computed = read(tmp_path, [step(1, block)])
    logged = read(tmp_path, [step(1, block), step(2, block, darts__history__std_correlation=0.9)])
    for run, expected in ((computed, [[1, pytest.approx(0.5)]]), (logged, [[2, 0.9]])):
        figure, _ = report_figures._budgets(run)
        (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == "correlation")
        assert lines(axes)["over the prompts of a step"] == expected


def test_table(tmp_path):
    first = step(1, ROLLOUT, timing_s__step=4.0, timing_s__gen=3.0, darts__group__saturated_share=0.5)
    last = step(2, ROLLOUT | {"length": [[1, 2, 3, 4], [1, 2, 3]]}, timing_s__step=2.0, timing_s__gen=0.9)
    validation = step(3, timing_s__step=3.0, **{"val-core/x/acc/mean@1": 0.75})
    first["metrics"] |= {"critic/rewards/mean": 0.25, "val-core/x/acc/mean@1": 0.5, "val-core/x/acc/best@2": 1.0}
    last["metrics"]["critic/rewards/mean"] = float("nan")
    assert dict(summary(read(tmp_path, [first, last, validation]))) == {
        "steps": "3 (1 to 3), 2 of them with a DARTS rollout",
        "prompts a step": "2",
        "M' (candidates a prompt), mean": "3.50",
        "tokens generated": "288",
        "tokens kept": "155",  # 148 + 1 + 3 + 1 + 2
        "tokens dropped": "133 (46.2%)",
        "candidates aborted": "4 of 14 (28.6%)",
        "saturated groups": "50.0%",
        "mean length, pool": "38.9 -> 2.3",
        "mean length, kept": "37.0 -> 1.8",
        "reward (critic/rewards/mean)": "0.250, once",
        "val-core/x/acc/mean@1": "0.500 -> 0.750",
        "seconds a step": "4.0 -> 3.0",
        "rollout's share of the step": "65.0%",  # 3.9 of 6: the third step has no rollout
    }


def test_first_and_last_are_tenths_of_what_is_known():
    values = np.array([np.nan, *range(1, 31), np.nan], dtype=float)
    assert first_and_last(values) == (2.0, 29.0)  # 1 2 3 and 28 29 30
    assert first_and_last(np.array([5.0, 7.0])) == (5.0, 7.0)
    assert np.isnan(first_and_last(np.array([np.nan]))).all()


def test_hours_leave_out_gaps_and_replace_unknown_times(tmp_path):
    steps = [step(n, timing_s__step=s) for n, s in ((1, 3600.0), (2, 7200.0), (3, 1800.0))]
    del steps[2]["metrics"]["timing_s/step"]
    steps[1]["at"] += 1e6
    run = read(tmp_path, steps)
    np.testing.assert_allclose(run.hours(), [1, 3, 4.5])
    assert run.notes == ["Without timing_s/step: 1 steps; on axes of time they take the median of the others."]


def test_names_of_metrics_are_those_that_are_logged():
    known = {"darts/reward/kept_mean", "darts/reward/pool_mean", "darts/group/saturated_share", "darts/rollout/seconds"}
    assert known <= set(METRICS)
    assert all(name.startswith(report_run.HELD) for name in known)


# --- resumes and broken files ----------------------------------------------------------------------------------------


def test_a_resume_replaces_what_came_after_it(tmp_path):
    lines = [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0), (3, 31.0), (4, 41.0), (2, 22.0), (3, 33.0)]
    run = read(tmp_path, [step(number, timing_s__step=seconds) for number, seconds in lines])
    assert [some.number for some in run.steps] == [1, 2, 3]
    assert run.series("timing_s/step").tolist() == [10, 22, 33]
    assert run.notes == ["Repeated or undone by a resume: 5 steps; only what replaced them counts."]


def test_resumed_run_reads_as_one(tmp_path):
    run = read(tmp_path, fake_steps(40, resumes=[(20, 15), (33, 30)]))
    assert [some.number for some in run.steps] == list(range(1, 41))


def test_a_cut_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "darts.jsonl", [step(1), step(2)])
    path.write_text(path.read_text()[:-20])
    run = read_run(path)
    assert [some.number for some in run.steps] == [1]
    assert run.notes[0] == "Line 2, the last, was cut off (a killed run?) and is left out."
    whole = read(tmp_path, [step(1), step(2)], end="")
    assert [some.number for some in whole.steps] == [1, 2]


LINE = json.dumps(step(1)) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["must hold a whole step", "did the run end before its first?"]),
        (LINE[:-9], ["must hold a whole step"]),
        (LINE + LINE[:-9] + "\n" + LINE, ["line 2: must be JSON", "remove the line"]),
        (LINE + "[]\n", ["line 2: must be a step", "remove the line"]),
        (LINE.replace("metrics", "metric"), ["line 1: must be a step", "KeyError('metrics')"]),
        (
            LINE.replace('"version": 1', '"version": 2'),
            ["line 1: version=2: must be 1", "use the verl-darts that wrote"],
        ),
        (json.dumps(step(1, ROLLOUT | {"fate": ["kdka", "kf"]})), ["line 1", "not of the same prompts and candidates"]),
        (json.dumps(step(1, ROLLOUT | {"fate": ["kdka", "kfz"]})), ["line 1", "fate='z' is not of 'kfcdtax'"]),
        (json.dumps(step(1, ROLLOUT | {"reward": [[1.0], [1.0]]})), ["line 1", "must be a step"]),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, text, said):
    (tmp_path / "darts.jsonl").write_text(text)
    assert main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("no report: ")
    assert output.err.count("\n") == 1
    assert [part for part in said if part not in output.err] == []
    assert not (tmp_path / "report").exists()


def test_paths_that_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing is there; check the path" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "must hold one darts.jsonl, but none is in or below it" in capsys.readouterr().err
    paths = [write(tmp_path / name / "darts.jsonl", [step(1)]) for name in ("one", "two")]
    assert main([str(tmp_path)]) == 2
    assert f"holds {paths[0]}, {paths[1]}; name one of them" in capsys.readouterr().err
    (tmp_path / "one").rename(tmp_path / "previous")  # where the quickstart keeps the run before
    assert find_file(paths[1]) == find_file(tmp_path / "two") == find_file(tmp_path) == paths[1]
    (tmp_path / "file").write_text("")
    assert main([str(paths[1]), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    write(tmp_path / "darts.jsonl", [step(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path)]) == 2
    assert "install verl-darts[report]" in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags close in order; collects images and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a run <&>")
    write(folder / "logs" / "darts.jsonl", fake_steps(40, resumes=[(20, 15)], gaps=True))
    command = [sys.executable, "-m", "darts.report", str(folder)]
    return folder / "logs" / "report", subprocess.run(command, capture_output=True, text=True, timeout=1200)


def test_command_says_where_the_page_is(made):
    folder, run = made
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"report: {folder / 'index.html'}\n")
    assert re.search(r"^  steps +40 \(1 to 40\), 39 of them with a DARTS rollout$", run.stdout, re.MULTILINE)


def test_page_needs_nothing_else(made):
    folder, _ = made
    text = (folder / "index.html").read_text()
    page = Page(text)
    embedded = [base64.b64decode(image.partition("png;base64,")[2]) for image in page.images]
    assert embedded == [(folder / f"{name}.png").read_bytes() for name in report_figures.FIGURES]
    assert all(image.startswith(b"\x89PNG") for image in embedded)
    for image in page.images:
        text = text.replace(image, "")  # base64 may spell anything
    assert not re.search(r"https?:|href|src=\"[^\"]|@import|<script|<link|url\(", text)
    assert text.count("Left out") == 2  # its trace has neither timelines nor overlapped log-probs


def test_names_are_escaped(tmp_path):
    write(tmp_path / "<b>&" / "logs" / "darts.jsonl", [step(1, timing_s__step=1.0)])
    assert main([str(tmp_path / "<b>&"), "--out", str(tmp_path / "out")]) == 0
    assert "DARTS run <b>&" in Page((tmp_path / "out" / "index.html").read_text()).texts


def test_missing_figures_are_named_with_the_reason(tmp_path, capsys):
    write(tmp_path / "darts.jsonl", [step(n, critic__score__mean=0.5) for n in (1, 2)])
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "time.png").write_bytes(b"of a run before")
    assert main([str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "reward.png"]
    left_out = [text for text in Page((tmp_path / "report" / "index.html").read_text()).texts if "Left out" in text]
    assert [text.removeprefix("Left out: ")[:40] for text in left_out] == [
        *["no step has a DARTS rollout (was darts.e"] * 3,
        "no step has darts/latency/predicted_s or",
        "no step has timing_s/step.",
        "no step has a timeline and timing_s/step",
        "no step has darts/overlap/* (was darts.o",
    ]
    assert "reward (critic/score/mean)" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 120}, {"steps": 12, "history": False, "pool": False}])
def test_all_sizes_can_be_drawn(tmp_path, options):
    drawn = {some.name: some for some in draw_all(report_figures.FIGURES, read(tmp_path, fake_steps(**options)))}
    assert [name for name, figure in drawn.items() if figure.png is None] == (["cost"] if "history" in options else [])
    assert "running means" not in drawn["time"].caption
    assert ("running means" in drawn["lengths"].caption) == (options["steps"] == 120)
    assert ("Columns are means of up to 2 steps" in drawn["time"].caption) == (options["steps"] == 120)
    assert ("budgets are shown alone" in drawn["budgets"].caption) == (options["steps"] == 1 or "history" in options)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def stairs(axes):
    """Label -> (values, baseline) of what stairs() drew."""
    return {
        patch.get_label(): (patch.get_data().values.tolist(), np.asarray(patch.get_data().baseline).tolist())
        for patch in axes.patches
        if patch.get_label()
    }


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}


def test_time_is_stacked_to_the_step_and_testing_stands_on_top(tmp_path):
    first = step(1, timing_s__step=10.0, timing_s__gen=6.0, timing_s__update_actor=1.0)
    second = step(2, timing_s__step=12.0, timing_s__gen=5.0, timing_s__save_checkpoint=4.0, timing_s__testing=7.0)
    figure, caption = report_figures._time(read(tmp_path, [first, second, step(3, timing_s__gen=9.0)]))
    drawn = stairs(figure.axes[0])
    assert list(drawn) == ["gen", "update_actor", "save_checkpoint", "other", "testing"]
    assert drawn["gen"][0] == [6, 5, 0]  # the third has no time of its own
    assert drawn["update_actor"][0] == [7, 5, 0]
    assert drawn["save_checkpoint"][0] == [7, 9, 0]
    assert drawn["other"][0] == [10, 12, 0]
    assert drawn["testing"] == ([10, 19, 0], [10, 12, 0])
    assert [text.get_text() for text in figure.axes[1].texts] == [
        "5.50 (50%)", "0.50 (5%)", "2.00 (18%)", "3.00 (27%)", "3.50",
    ]  # fmt: skip
    assert "Testing" in caption


def test_fates_are_stacked_and_kept_stands_beside_pool(tmp_path):
    figure, _ = report_figures._selection(read(tmp_path, [step(1, ROLLOUT), step(2), step(3, ROLLOUT)]))
    length, reward, fate = figure.axes
    drawn = stairs(fate)
    assert {name: values for name, (values, _) in drawn.items()} == {
        "kept": [3, 0, 3], "kept, truncated": [4, 0, 4], "dropped": [5, 0, 5], "aborted": [7, 0, 7],
    }  # fmt: skip
    assert lines(length)["kept"] == [[1, 37], [3, 37]]
    assert lines(reward) == {"pool": [[1, 0.6], [3, 0.6]], "kept": [[1, 0.75], [3, 0.75]]}


def test_histogram_of_first_and_last(tmp_path):
    short = ROLLOUT | {"length": [[1, 1, 1, 1], [1, 1, 3]]}
    figure, _ = report_figures._lengths(read(tmp_path, [step(1, ROLLOUT), step(2, ROLLOUT), step(3, short)]))
    drawn = stairs(figure.axes[1])
    assert list(drawn) == ["step 1: mean 39", "step 3: mean 1"]
    # 8 bars over 0 to 100 are 13 wide: 8 10 | 20 | 30 | 40 | 64 | 100
    assert np.multiply(drawn["step 1: mean 39"][0], 7 / 100) == pytest.approx([2, 1, 1, 1, 1, 0, 0, 1])
    assert drawn["step 3: mean 1"][0] == pytest.approx([100, 0, 0, 0, 0, 0, 0, 0])
    assert lines(figure.axes[0])["p90"] == [[1, pytest.approx(78.4)], [2, pytest.approx(78.4)], [3, pytest.approx(1.8)]]


def test_many_candidates_are_held_as_evenly_spaced_ranks(tmp_path):
    rng = np.random.default_rng(0)
    length = rng.lognormal(6, 0.8, 5000).astype(int)
    block = {"key": ["a"], "budget": [5000], "length": [length.tolist()], "fate": ["k" * 5000]}
    rollout = read(tmp_path, [step(1, block)]).steps[0].rollout
    assert len(rollout.lengths) == report_run.MAX_LENGTHS
    assert rollout.lengths.mean() == pytest.approx(length.mean(), rel=0.01)
    assert np.median(rollout.lengths) == pytest.approx(np.median(length), rel=0.01)


def test_budgets_are_shares_of_the_prompts(tmp_path):
    figure, _ = report_figures._budgets(read(tmp_path, [step(1, ROLLOUT), step(2)]))
    (heat,) = (axes for axes in figure.axes if axes.get_ylabel() == "candidates M'")
    np.testing.assert_allclose(heat.collections[0].get_array().filled(np.nan), [[50, np.nan], [50, np.nan]])
    assert lines(heat) == {"mean": [[1, 3.5]]}


def test_reward_over_steps_and_time(tmp_path):
    steps = [step(n, critic__rewards__mean=n / 10, timing_s__step=30.0) for n in (1, 2, 3)]
    steps[1]["metrics"]["val-core/x/acc/mean@1"] = 0.9
    figure, _ = report_figures._reward(read(tmp_path, steps))
    by_step, by_time = figure.axes
    assert lines(by_step)["val-core/x/acc/mean@1"] == [[2, 0.9]]
    assert lines(by_time)["critic/rewards/mean (training)"] == [[0.5, 0.1], [1, 0.2], [1.5, 0.3]]
    assert by_time.get_xlabel() == "minutes of training"


def test_lines_of_many_steps_are_running_means(tmp_path):
    noisy = [step(n, critic__rewards__mean=n + (-1) ** n, timing_s__step=1.0) for n in range(1, 121)]
    figure, _ = report_figures._reward(read(tmp_path, noisy))
    drawn = np.array(lines(figure.axes[0])["critic/rewards/mean (training)"])
    # a window of 7: in the middle, seven alternating signs leave a seventh; at the start, four steps
    assert drawn[60, 1] == pytest.approx(61 + 1 / 7)  # -1 at odd steps: + - + - + - + around step 61
    assert drawn[0, 1] == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_cost_model(tmp_path):
    both = step(1, darts__latency__predicted_s=3.0, darts__rollout__seconds=2.0, darts__allocation__utility=0.1)
    figure, caption = report_figures._cost(read(tmp_path, [both]))
    assert [lines(axes) for axes in figure.axes] == [
        {"measured": [[1, 2]], "predicted": [[1, 3]]},
        {"utility": [[1, 0.1]]},
    ]
    assert "predicted / measured is 1.50" in caption
    with pytest.raises(Missing, match="not in adaptive mode"):
        report_figures._cost(read(tmp_path, [step(1, darts__rollout__seconds=2.0)]))


def test_long_files_are_read_in_little_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report_run, "PROGRESS_S", 0.0)
    rng = np.random.default_rng(0)
    length = rng.integers(1, 8192, (205, 10)).tolist()
    known = {"key": ["0" * 16] * 205, "std": [0.5] * 205, "observed_std": [0.25] * 205}
    block = {"budget": [10] * 205, "length": length, "fate": ["kkkkkkkkdd"] * 205, "reward": [[1.0] * 10] * 205} | known
    metrics = {f"actor/{n}": 0.1 for n in range(150)} | {"timing_s/step": 1.0, "timing_s/gen": 0.5}
    path = write(tmp_path / "darts.jsonl", (step(n, block) | {"metrics": metrics} for n in range(1, 151)))
    assert path.stat().st_size > 4e6
    tracemalloc.start()
    run = read_run(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 150 * 10_000  # 10 kB a step: 100 MB for 10,000 steps
    assert (peak < held + 3e6, len(run.steps)) == (True, 150)
    assert re.search(r"^darts.jsonl: \d+ of \d+ MB read$", capsys.readouterr().err, re.MULTILINE)
