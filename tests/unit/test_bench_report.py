"""Tables, document and figures of a bench."""

import json
import math
from pathlib import Path

import pytest
from bench_records import bench, step, validation

from darts.bench import figures, report
from darts.bench.arms import PRESETS
from darts.bench.statistics import BenchResults
from darts.evidence import documents
from darts.evidence.figures import draw_all

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"none": [[4.0, 2.0, 2.0], [4.0, 4.0, 2.0]], "darts": [[2.0, 1.0, 1.0], [2.0, 4.0, 2.0]]}
ACCURACIES = {
    "none": [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.6]],
    "darts": [[0.1, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]],
}


def made(**changes) -> BenchResults:
    return BenchResults(bench(SECONDS, ACCURACIES), **changes)


def bench_table(name, results, **changes):
    return report.bench_table(results, name, **changes)


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """By the first column; columns of equal names get numbers."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = [name if lines[0][:n].count(name) == 0 else f"{name} {lines[0][:n].count(name) + 1}"
             for n, name in enumerate(lines[0])]  # fmt: skip
    return {line[0]: dict(zip(names, line, strict=True)) for line in lines[2:]}


def test_times():
    rows = rows_of(bench_table("time", made()))
    none, darts = rows["none"], rows["darts"]
    assert (none["steps"], none["s a step, median"], none["mean"]) == ("6", "3.00", "3.00")
    assert (none["speed-up over none"], none["by seed"]) == ("1", "-")
    assert darts["speed-up over none"].startswith("1.50 [")
    assert (darts["last third: median"], darts["by seed"]) == ("1.50", "2.00, 1.00")
    assert darts["speed-up over none 2"].startswith("1.33 [")
    assert (darts["rollout s"], darts["old log-probs s"], darts["update s"]) == ("1.00", "0.25", "0.50")


def test_work():
    darts = rows_of(bench_table("work", made()))["darts"]
    assert (darts["candidates"], darts["aborted"], darts["queue"]) == ("10.0", "2.0", "0.0")
    assert (darts["tokens generated"], darts["kept"], darts["thrown away"], darts["share"]) == (
        "100",
        "80",
        "20",
        "20.0%",
    )
    assert (darts["bubble ratio"], darts["kept tokens/s of rollout"]) == ("37.5%", "80")


def test_learning():
    rows = rows_of(bench_table("learning", made()))
    none, darts = rows["none"], rows["darts"]
    assert (none["accuracy, end"], none["minus none"]) == ("0.500", "-")
    assert darts["minus none"].startswith("-0.050 [-0.200, +0.100]")
    assert darts["training to 0.500"] == "- (1 of 2 seeds)"
    assert none["training to 0.500"] == "- (1 of 2 seeds)"
    assert rows_of(bench_table("learning", made(), target=0.3))["darts"]["training to 0.300"] == "4 s", "of 2 and 6 s"


@pytest.mark.parametrize(
    "results", [BenchResults([]), BenchResults([], arms=["none", "darts"], steps=30), made(arms=["sorted"])]
)
def test_nothing_measured_is_dashes(results):
    assert "nan" not in report.text(results)
    for arm, row in rows_of(bench_table("time", results)).items():
        assert set(row.values()) == {arm, "0", "-"}


def test_without_the_base():
    """The arms' own figures are there, the comparisons are not."""
    results = BenchResults(bench({"darts": SECONDS["darts"]}, {"darts": ACCURACIES["darts"]}))
    assert "nan" not in report.text(results)
    row = rows_of(bench_table("time", results))["darts"]
    assert (row["mean"], row["speed-up over none"]) == ("2.00", "-")
    row = rows_of(bench_table("learning", results))["darts"]
    assert (row["accuracy, end"], row["minus none"], row["training to -"]) == ("0.450", "-", "-")


def test_notes_say_what_seeds_and_gaps_mean():
    assert "bootstraps over 2 seeds" in report.notes(made())[0]
    one = BenchResults(bench({"none": [[1.0, 2.0]], "darts": [[1.0]]}))
    assert report.notes(one)[0].startswith("One seed")
    assert report.notes(one)[-1] == "Of the steps that some arm has: darts lacks 1."
    assert report.notes(BenchResults([]))[0] == "Nothing has been measured."


# --- the document ----------------------------------------------------------------------------------------------------


def opened(results: BenchResults) -> dict:
    return report.document(
        results, arms=[{"name": arm} for arm in results.arms], settings={"seeds": 2}, config={"darts": {}},
        machine={"commit": "c0ffee"},
    )  # fmt: skip


def test_tables_can_be_made_again_from_the_document(tmp_path):
    results = made(steps=6)
    documents.save(tmp_path / "new" / "bench.json", opened(results))
    document, again = report.load(tmp_path / "new" / "bench.json")
    assert document["machine"] == {"commit": "c0ffee"}
    assert report.text(again) == report.text(results)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]


def test_the_document_has_the_figures():
    document = json.loads(json.dumps(opened(made()), allow_nan=False))
    darts = document["summary"]["darts"]
    assert (darts["speed_up"]["value"], darts["speed_up"]["by_seed"]) == (1.5, {"0": 2.0, "1": 1.25})
    assert darts["speed_up"]["low"] < 1.5 < darts["speed_up"]["high"]
    assert darts["seconds_to_target"] == {"0": 2.0, "1": None}
    assert (darts["bubble_ratio"], darts["tokens_dropped"]) == (0.375, 120)
    assert (document["target"], document["target_is_given"], document["base"]) == (0.5, False, "none")


def test_a_document_of_nothing():
    document = opened(BenchResults([], arms=["none"]))
    assert document["summary"]["none"]["speed_up"]["value"] is None
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "cannot be read"),
        ("[]", "no document of python -m darts.bench"),
        ('{"format": "other", "version": 1}', "no document of python -m darts.bench"),
        ('{"format": "darts.bench", "version": 1}', "KeyError"),
        ('{"format": "darts.bench", "version": 1, "steps": {"colour": [1]}, "validations": {}}', "colour"),
    ],
)
def test_what_is_not_a_document_is_refused(tmp_path, text, said):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(report.DocumentError, match=said):
        report.load(tmp_path / "bench.json")
    with pytest.raises(report.DocumentError, match="cannot be read"):
        report.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["overthink", "depth"])
def test_documents_of_earlier_versions_can_still_be_read(name):
    document, results = report.load(ROOT / "docs" / "results" / f"{name}.json")
    assert results.arms == [arm["name"] for arm in document["arms"]]
    assert len(results.steps("none")) == 90


def test_the_notes_tell_of_queues_and_of_the_served_weights():
    records = [
        step("none", 0, 1, served_difference=1e-7),
        step("none", 0, 2, served_difference=3e-7),
        step("tail", 0, 1, queue=2),
        step("tail", 0, 2, queue=0),
    ]
    said = "\n".join(report.notes(BenchResults(records)))
    assert "differ by 3.0e-07 at most" in said
    assert "tail: what is queued" in said
    assert "queued" not in "\n".join(report.notes(BenchResults(records[:2])))
    assert bench_table("work", BenchResults(records)).splitlines()[-1].endswith("| 1.0 | 0 |")


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(results: BenchResults):
    return draw_all(figures.FIGURES, results)


NAMES = ["seconds", "accuracy", "tradeoff", "lengths", "phases"]


def test_figures_are_pictures_with_a_sentence(tmp_path):
    lengths = [validation("darts", 0, 6, 0.5, mean_length=12.0)]
    drawn = figures.write(BenchResults([*bench(SECONDS, ACCURACIES), *lengths]), tmp_path)
    assert [figure.name for figure in drawn] == NAMES
    for figure in drawn:
        assert (tmp_path / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
        assert figure.caption.endswith(".")


def test_figures_of_every_arm_and_one_step():
    seconds = {arm.name: [[1.0]] for arm in PRESETS["all"]}
    drawn = draw(BenchResults(bench(seconds)))
    assert [figure.name for figure in drawn if not figure.png] == ["accuracy", "tradeoff"], "nothing was validated"


def test_figures_without_data_say_so():
    drawn = draw(BenchResults([], arms=["none"]))
    assert [figure.png for figure in drawn] == [None] * 5
    assert {figure.caption for figure in drawn} == {
        "no step has been measured.",
        "no validation has been measured.",
        "needs steps and validations of none and of another arm.",
    }


def test_figures_of_arms_with_gaps():
    records = bench({"none": [[1.0, 2.0], [1.0]], "darts": [[1.0]]}, {"none": [[0.1, math.nan], []]})
    drawn = draw(BenchResults(records, arms=["none", "darts", "sorted"]))
    assert [figure.name for figure in drawn if not figure.png] == ["tradeoff"], "no other arm was validated"


def test_by_seed_has_a_row_for_each_seed():
    values = BenchResults(bench({"none": [[1.0, 2.0], [3.0]]})).by_seed("none", "step_s")
    assert values.columns.tolist() == [1, 2]
    assert values.loc[0].tolist() == [1.0, 2.0]
    assert values.at[1, 1] == 3.0
    assert math.isnan(values.at[1, 2])
    assert figures.smoothed(values).loc[0].tolist() == [1.5, 1.5]
