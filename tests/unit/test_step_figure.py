"""The figure of docs/how_it_works.md: drawn again from its extract, legible, and true to what was recorded."""

import json
from itertools import combinations

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks.step_drawing import figure_of
from benchmarks.step_figure import FOLDER, RECORDS, complete_at, in_rollout, kinds, main
from darts.report_figures import STYLE
from darts.selection import select

DATA = json.loads((FOLDER / "step.json").read_text())
GROUPS = sorted(set(DATA["prompt"]))


def column(name, prompt, data=DATA):
    return [value for value, of in zip(data[name], data["prompt"], strict=True) if of == prompt]


def test_the_command_draws_it(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "step.png")]) == 0
    png = (tmp_path / "step.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(tmp_path / "step.png")
    committed = (FOLDER / "step.png").read_bytes()
    assert png[16:24] == committed[16:24], "width and height are those of the committed figure"


def test_no_text_lies_on_another():
    with rc_context(STYLE):
        figure, _ = figure_of(DATA)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        beyond = {
            tick.label1
            for axes in figure.axes
            for tick in axes.xaxis.get_major_ticks()
            if not axes.get_xlim()[0] <= tick.get_loc() <= axes.get_xlim()[1]  # matplotlib does not draw these
        }
        boxes = [
            (text.get_text(), text.get_window_extent(canvas.get_renderer()))
            for text in figure.findobj(Text)
            if text.get_text() and text.get_visible() and text not in beyond
        ]
    assert len(boxes) > 20
    width, height = figure.get_size_inches() * figure.dpi
    assert [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == []
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []


def test_it_shows_all_that_can_become_of_a_candidate():
    assert {"short", "long", "dropped", "aborted", "truncated"} == set(kinds(DATA))
    assert {0, 1} == {column("num_long", prompt)[0] for prompt in GROUPS}


@pytest.mark.parametrize("prompt", GROUPS)
def test_the_recorded_groups_keep_the_contract(prompt):
    """Dual-end: what `select` gives; shortest-only: the first eight, and the others are aborted after the eighth."""
    lengths, fates = column("length", prompt), column("fate", prompt)
    ended, stops, num_long = column("ended", prompt), column("stop", prompt), column("num_long", prompt)[0]
    kept = {at for at, fate in enumerate(fates) if fate == "k"}
    assert len(kept) == 8
    if num_long:
        assert kept == set(select(lengths, 8, num_long, [fate == "t" for fate in fates]))
        assert complete_at(DATA, prompt) == max(ended)
    else:
        assert complete_at(DATA, prompt) == max(ended[at] for at in kept)
        assert all(stop is not None and end > complete_at(DATA, prompt) for end, stop, fate in zip(
            ended, stops, fates, strict=True) if fate == "a")  # fmt: skip
    assert max(ended) <= DATA["seconds"]


def test_every_kept_token_has_its_log_probs_once():
    for fate, length, parts in zip(DATA["fate"], DATA["length"], DATA["computed"], strict=True):
        assert fate != "k" or sum(tokens for _, tokens in parts) == length
    within, own = in_rollout(DATA)
    assert own < within == 1


@pytest.fixture
def run(tmp_path):
    """A folder as a recorded run leaves it, with two prompts."""
    record = {
        "step": 3, "seconds": 2.0, "prompt": [0, 0, 1, 1], "num_long": [0, 0, 1, 1], "length": [3, 9, 4, 5],
        "fate": ["k", "a", "k", "k"], "ended": [0.5, 0.6, 0.7, 1.9], "stop": [None, 0.1, None, None],
        "computed": [[[0.6, 3]], [], [[1.0, 4]], [[2.5, 5]]],
    }  # fmt: skip
    line = {"version": 1, "step": 3, "metrics": {"timing_s/step": 3.0, "timing_s/gen": 2.0, "other": 1.0}}
    line["timeline"] = {"calls": [[0.5, 0.6, 3], [0.9, 1.0, 4], [2.1, 2.5, 5]]}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "darts.jsonl").write_text(json.dumps(line) + "\n")
    (folder / RECORDS).write_text(json.dumps(record) + "\n")
    return tmp_path


def test_an_extract_holds_the_chosen_prompts_alone(run, tmp_path):
    files = [str(tmp_path / name) for name in ("step.json", "step.png")]
    options = ["--run", str(run), "--step", "3", "--data", files[0], "--out", files[1]]
    assert main([*options, "--prompts", "1"]) == 0
    data = json.loads((tmp_path / "step.json").read_text())
    assert (data["prompt"], data["length"], data["prompts"]) == ([1, 1], [4, 5], 2)
    assert kinds(data) == ["short", "long"]
    assert in_rollout(data) == (4 / 9, 0)
    assert set(data["metrics"]) == {"timing_s/step", "timing_s/gen"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--step", "4"], "--step 4: must be a recorded one, of 3"), (["--step", "3", "--prompts", "7"], "--prompts 7")],
)
def test_what_was_not_recorded_is_one_line(run, tmp_path, capsys, options, reason):
    assert main(["--run", str(run), "--data", str(tmp_path / "step.json"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("no figure: ")
    assert reason in error
    assert len(error.splitlines()) == 1
