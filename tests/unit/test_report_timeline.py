"""The report's figures of time within a step: which step is shown, what of it, and log-probs under the rollout."""

import json
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from darts.evidence.figures import Missing, draw_all
from darts.evidence.trace import INSIDE_STEP, MOST, timeline_columns
from darts.messages import ActorCall
from darts.metrics import METRICS
from darts.report import figures as report_figures
from darts.report import timeline as report_timeline
from darts.report.__main__ import main
from darts.report.page import summary
from darts.report.run import read_run
from darts.report.timeline import EXPOSED, HIDDEN, hidden_and_exposed, overlap_sentence, phases_after

BEGAN = 1.7e9


def step(number, timeline=None, **metrics):
    """A step by hand; in the names of metrics, __ stands for /."""
    line = {"version": 1, "step": number, "at": BEGAN + number}
    line["metrics"] = {key.replace("__", "/"): value for key, value in metrics.items()}
    return line | ({} if timeline is None else {"timeline": timeline})


def timeline(ended=(2.0, 4.0, 6.0, 10.0), calls=((1.0, 3.0, 400), (9.0, 12.0, 900)), seconds=10.5):
    """As the trace has it: candidates that ended, and calls of the actor with begin, end and tokens."""
    rollout = SimpleNamespace(
        pool=SimpleNamespace(ended_at=BEGAN + np.array(ended)), began=BEGAN, ended=BEGAN + seconds
    )
    return timeline_columns(rollout, [ActorCall(BEGAN + begin, BEGAN + end, tokens) for begin, end, tokens in calls])


PHASES = {
    "gen": 11.0, "reward": 0.5, "old_log_prob": 1.5, "ref": 0.25, "adv": 0.05, "update_actor": 5.0,
    "save_checkpoint": 0.7, "update_weights": 1.0,
}  # fmt: skip
TIMES = {f"timing_s__{name}": seconds for name, seconds in PHASES.items()} | {"timing_s__step": 20.5}
COLUMNS = {
    "hidden_s": 3.5, "exposed_s": 1.75, "hidden_share": 2 / 3, "calls": 2.0, "forwarded_per_kept": 2.5,
    "in_rollout_share": 0.9, "before_end_share": 0.4, "cache_peak_gib": 1.25, "late_rows": 0.0, "tokens_twice": 0.0,
}  # fmt: skip
OVERLAPPED = {f"darts__overlap__{name}": value for name, value in COLUMNS.items()}


def write(path, steps, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(some) for some in steps) + end)
    return path


def read(tmp_path, steps):
    return read_run(write(tmp_path / "darts.jsonl", steps))


def bars(axes):
    """Colour -> (begin, width, height) of the bars in an axes; spans and steps are no bars."""
    drawn = {}
    for container in axes.containers:
        for bar in container:
            x, y, width, height = bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()
            drawn.setdefault(bar.get_facecolor(), []).append((x, width, height if y == 0 else y + height / 2))
    return {_hex(color): some for color, some in drawn.items()}


def _hex(color):
    return "#" + "".join(f"{round(255 * part):02X}" for part in color[:3])


# --- which step ------------------------------------------------------------------------------------------------------


def test_the_step_with_the_median_time_of_the_last_tenth_is_shown(tmp_path):
    times = [1.0] * 45 + [7.0, 3.0, 9.0, 5.0, 4.0]
    steps = [step(n, timeline(seconds=n), timing_s__step=time) for n, time in enumerate(times, 1)]
    run = read(tmp_path, [*steps, step(51, timing_s__step=2.0), step(52, timeline(seconds=52))])
    assert (run.timeline.step.number, run.timeline.seconds, run.timeline.chosen_of) == (49, 49.0, 5)
    _, caption = report_timeline._timeline(run)
    assert caption.startswith("Step 49 has the median time of the last 5 steps with a timeline. ")
    assert run.timeline.step is run.steps[48]


def test_of_two_the_faster_and_of_one_that(tmp_path):
    steps = [step(n, timeline(seconds=n), timing_s__step=100.0 - n % 2) for n in range(1, 21)]
    assert read(tmp_path, steps).timeline.step.number == 19
    alone = read(tmp_path, [steps[0], step(2, timing_s__step=1.0)])
    assert report_timeline._timeline(alone)[1].startswith("Step 1 is the last with a timeline. ")


def test_a_step_can_be_asked_for(tmp_path, capsys):
    steps = [step(n, timeline(seconds=n), timing_s__step=5.0) for n in (1, 2, 3, 4)]
    path = write(tmp_path / "darts.jsonl", [*steps, step(5, timing_s__step=5.0)])
    run = read_run(path, 2)
    assert (run.timeline.step.number, run.timeline.seconds) == (2, 2.0)
    figure, caption = report_timeline._timeline(run)
    assert caption.startswith("Step 2 was asked for. ")
    assert figure.get_suptitle().startswith("Step 2: ")
    assert main([str(tmp_path), "--step", "2"]) == 0
    assert "Step 2 was asked for." in (tmp_path / "report" / "index.html").read_text()
    for number in ("5", "6"):
        assert main([str(tmp_path), "--step", number]) == 2
        said = f"--step {number}: must be a step with a timeline and a time, but the trace has 4 of them, 1 to 4"
        assert said in capsys.readouterr().err


def test_a_step_that_a_resume_replaced_is_not_shown(tmp_path):
    first = [step(n, timeline(seconds=n), timing_s__step=5.0) for n in (1, 2, 3)]
    again = [step(n, timeline(seconds=10.0 * n), timing_s__step=5.0) for n in (2, 3)]
    run = read(tmp_path, [*first, *again])
    assert (run.timeline.step.number, run.timeline.seconds) == (3, 30.0)
    cut = write(tmp_path / "darts.jsonl", [*first, *again])
    cut.write_text(cut.read_text()[:-20])
    assert read_run(cut).timeline.seconds == 20.0


def test_timelines_of_other_steps_are_not_held(tmp_path):
    rng = np.random.default_rng(0)
    long = timeline(np.sort(rng.random(2048)), [(x, x + 0.01, 9) for x in np.sort(rng.random(400))], 1.0)
    path = write(tmp_path / "darts.jsonl", (step(n, long, timing_s__step=1.0) for n in range(1, 201)))
    assert path.stat().st_size > 1.5e6
    tracemalloc.start()
    run = read_run(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 300_000
    assert peak < held + 1e6
    assert (len(run.timeline.running), len(run.timeline.calls)) == (1 + MOST, 200)


@pytest.mark.parametrize(
    "broken",
    [
        [1],
        {"seconds": 1.0, "running": [[0.0, 4]]},
        {"seconds": None, "running": [[0.0, 4]], "calls": []},
        {"seconds": 1.0, "running": [], "calls": []},
        {"seconds": 1.0, "running": [[0.0, 4], [1.0]], "calls": []},
        {"seconds": 1.0, "running": [[0.0, 4]], "calls": [[0.0, 1.0]]},
        {"seconds": 1.0, "running": [[0.0, float("nan")]], "calls": []},
    ],
)
def test_a_timeline_that_is_none_is_refused(tmp_path, capsys, broken):
    write(tmp_path / "darts.jsonl", [step(6, timeline(), timing_s__step=1.0), step(7, broken, timing_s__step=1.0)])
    assert main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert re.search(r"^no report: .*, step 7: timeline must have seconds, running and calls, but .*; remove the line$",
                     output.err)  # fmt: skip
    assert not (tmp_path / "report").exists()


# --- what is drawn of it ---------------------------------------------------------------------------------------------


def test_phases_lie_end_to_end_in_the_order_of_the_trainer(tmp_path):
    phases = phases_after(read(tmp_path, [step(1, **TIMES)]).steps[0], 10.5)
    names = [name for name, _, _ in phases]
    assert names == ["rest of gen", *(name for name in INSIDE_STEP if name in PHASES and name != "gen"), "other"]
    begins, ends = [begin for _, begin, _ in phases], [begin + seconds for _, begin, seconds in phases]
    np.testing.assert_allclose(begins, [10.5, *ends[:-1]])
    assert phases[2] == ("old_log_prob", pytest.approx(11.5), 1.5)
    assert phases[-1] == ("other", pytest.approx(20.0), pytest.approx(0.5))
    assert ends[-1] == pytest.approx(20.5)


def test_phases_that_were_not_measured_are_not_there(tmp_path):
    some = read(tmp_path, [step(1, timing_s__step=12.0, timing_s__gen=12.0, timing_s__adv=0.0)]).steps[0]
    assert phases_after(some, 12.0) == [("adv", 12.0, 0.0)]
    assert phases_after(some, 12.1) == [("adv", 12.1, 0.0)]  # the clocks differ
    bare = read(tmp_path, [step(1, timeline(seconds=12.0), timing_s__step=12.0)])
    assert phases_after(bare.steps[0], 12.0) == []
    assert draw_all(report_timeline.FIGURES, bare)[0].png is not None


def test_what_is_hidden_and_what_is_exposed(tmp_path):
    measured = read(tmp_path, [step(1, timeline(), **TIMES)]).timeline
    assert hidden_and_exposed(measured) == (pytest.approx(2.0 + 1.5), 1.75)  # the second call ends after 10.5
    logged = read(tmp_path, [step(1, timeline(), **TIMES, **OVERLAPPED | {"darts__overlap__hidden_s": 3.25})]).timeline
    assert hidden_and_exposed(logged) == (3.25, 1.75)


def test_timeline_of_an_overlapped_step(tmp_path):
    figure, caption = report_timeline._timeline(read(tmp_path, [step(3, timeline(), **TIMES, **OVERLAPPED)]))
    rollout, actor, after = figure.axes
    assert figure._suptitle.get_text() == (
        "Step 3: 20.5 s, rollout 10.5 s; log-probs: 3.5 s hidden under the rollout, 1.8 s exposed"
    )
    filled = rollout.patches[1].get_data()
    assert (filled.values.tolist(), filled.edges.tolist()) == ([4, 3, 2, 1, 0], [0, 2, 4, 6, 10, 10.5])
    assert rollout.get_title() == "Rollout: 4 candidates; half have ended after 4.0 s, 95% after 10.0 s"
    assert bars(actor) == {HIDDEN: [(1, 2, 200), (9, 1.5, 300)], EXPOSED: [(10.5, 1.5, 300)]}  # height: tokens/s
    assert actor.get_title() == "Actor: 2 calls for log-probs, 1,300 tokens, busy 33% of the rollout"
    assert bars(after)[EXPOSED] == [pytest.approx((11.5, 1.5, 2)), pytest.approx((13, 0.25, 3))]
    assert [label.get_text() for label in after.get_yticklabels()] == [
        "rest of gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "save_checkpoint", "update_weights",
        "other",
    ]  # fmt: skip
    assert [text.get_text() for text in after.texts] == [
        "0.50 s", "0.50 s", "1.5 s", "0.25 s", "0.05 s", "5.0 s", "0.70 s", "1.0 s", "0.50 s", "3.5 s hidden",
    ]  # fmt: skip
    assert "neighbours are joined" not in caption


@pytest.mark.parametrize("many", [5, 400])
def test_many_calls_are_said_to_be_joined(tmp_path, many):
    ended, begins = np.sort(np.random.default_rng(0).random(2048)), np.linspace(0, 1, many)
    told = timeline(ended, [(x, x + 0.5 / many, 9) for x in begins], 1.2)
    metrics = TIMES | OVERLAPPED | {"darts__overlap__calls": float(many)}
    figure, caption = report_timeline._timeline(read(tmp_path, [step(3, told, **metrics)]))
    assert ("The 400 calls are drawn as 200: neighbours are joined." in caption) == (many == 400)
    assert figure.axes[1].get_title().startswith(f"Actor: {many} calls for log-probs, {9 * many:,} tokens")
    assert len(bars(figure.axes[1])[HIDDEN]) == min(many, 200)


def test_without_overlap_there_is_no_lane_of_the_actor(tmp_path):
    figure, caption = report_timeline._timeline(read(tmp_path, [step(3, timeline(calls=()), **TIMES)]))
    assert len(figure.axes) == 2
    assert figure._suptitle.get_text() == "Step 3: 20.5 s, rollout 10.5 s; log-probs: 1.8 s, all exposed"
    assert "calls of the actor" not in caption


def test_without_log_probs_nothing_is_said_of_them(tmp_path):
    few = step(1, timeline(calls=()), timing_s__step=12.0, timing_s__gen=10.8)
    figure, _ = report_timeline._timeline(read(tmp_path, [few]))
    assert figure._suptitle.get_text() == "Step 1: 12.0 s, rollout 10.5 s"


# --- over the run ----------------------------------------------------------------------------------------------------


def test_log_probs_under_the_rollout(tmp_path):
    other = OVERLAPPED | {"darts__overlap__hidden_s": 5.0, "darts__overlap__exposed_s": 1.0}
    run = read(tmp_path, [step(1, **OVERLAPPED), step(2), step(3, **other)])
    figure, caption = report_timeline._overlap(run)
    seconds, shares = figure.axes
    drawn = {patch.get_label(): patch.get_data() for patch in seconds.patches}
    assert drawn["hidden under the rollout"].values.tolist() == [3.5, 0, 5]
    assert drawn["exposed"].values.tolist() == [5.25, 0, 6]
    lines = {line.get_label(): line.get_xydata().tolist() for line in shares.lines}
    assert lines["kept tokens"] == [[1, 90], [3, 90]]
    assert lines["kept tokens, before own end"] == [[1, 40], [3, 40]]
    assert caption == (
        "Over the last tenth of the steps 66.7% of the seconds for log-probs are hidden under the rollout; 2.50 tokens "
        "(prompts too) are forwarded per kept response token; 40.0% of the kept tokens have their log-probs before "
        "their response's own end. The cache of prefixes took at most 1.25 GiB on a rank. Hidden seconds are more than "
        "what they spare: they include dropped candidates, prompts and small batches."
    )
    assert dict(summary(run))["log-prob seconds under the rollout"] == "66.7% -> 66.7%"


def test_what_is_not_healthy_is_said(tmp_path):
    ill = OVERLAPPED | {"darts__overlap__late_rows": 3.0, "darts__overlap__tokens_twice": 1200.0}
    said = overlap_sentence(read(tmp_path, [step(n, **ill) for n in (1, 2)]))
    assert said.endswith(
        "Not healthy: 6 kept rows were computed by verl after generation. Not healthy: 2,400 tokens were forwarded "
        "twice."
    )
    sequence = overlap_sentence(read(tmp_path, [step(1, **OVERLAPPED | {"darts__overlap__cache_peak_gib": 0.0})]))
    assert "cache" not in sequence


def test_columns_and_lines_of_many_steps_are_means(tmp_path):
    run = read(tmp_path, [step(n, **OVERLAPPED) for n in range(1, 121)])
    drawn = draw_all(report_timeline.FIGURES, run)[1]
    assert "Bold lines are running means over 7 steps" in drawn.caption
    assert "Columns are means of up to 2 steps." in drawn.caption


def test_names_of_metrics_are_those_that_are_logged():
    assert {key.replace("__", "/") for key in OVERLAPPED} <= set(METRICS)


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_has_both(tmp_path, capsys):
    write(tmp_path / "darts.jsonl", [step(n, timeline(), **TIMES, **OVERLAPPED) for n in (1, 2)])
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert re.findall(r'<h2 id="(\w+)">', page) == [*report_figures.FIGURES, "timeline", "overlap"]
    for name in report_timeline.FIGURES:
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "log-prob seconds under the rollout" in capsys.readouterr().out


def test_a_trace_without_either_says_why(tmp_path):
    run = read(tmp_path, [step(1, **TIMES), step(2, timeline())])  # the second has no time
    with pytest.raises(Missing, match="no step has a timeline and timing_s/step"):
        report_timeline._timeline(run)
    with pytest.raises(Missing, match=r"darts\.overlap\.mode=off"):
        report_timeline._overlap(run)
    assert "log-prob" not in str(summary(run))
