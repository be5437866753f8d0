"""docs/results.md: placeholders, what is refused, the committed form of measurements; the committed page is right."""

import json
import random
import re
from pathlib import Path

import pytest
from bench_records import bench, step, validation

from benchmarks import results, results_data
from benchmarks.results_data import PageError, committed, read
from darts.bench import report
from darts.bench.arms import PRESETS, Arm
from darts.bench.statistics import Results
from darts.simulation.command import main as simulate

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "changed_files": [], "cores": 2,
    "processor": "Some CPU", "architecture": "x86_64", "load": [0.5, 0.4, 0.3], "python": "3.11.7", "verl": "0.9.1",
    "vllm": "0.28.0", "torch": "2.13.0", "ray": "2.60.0",
}  # fmt: skip
SECONDS = {
    "none": [[4.0, 2.0, 2.0], [4.0, 4.0, 2.0]],
    "darts": [[2.0, 1.0, 1.0], [2.0, 4.0, 2.0]],
    "+ streaming": [[3.0, 2.0, 2.0], [4.0, 3.0, 2.0]],
    "mine": [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]],
}
ACCURACIES = {name: [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.6]] for name in SECONDS}


def document_of(found: Results, **changes) -> dict:
    known = {arm.name: arm for arm in PRESETS["all"]}
    arms = [known.get(name, Arm(name=name, strategy="darts", changes={"selection.num_long": 2})) for name in found.arms]
    return (
        report.document(
            found,
            arms=[arm.to_dict() for arm in arms],
            settings={"command": ["python", "-m", "darts.bench", "--arm", "mine=darts,darts.selection.num_long=2"]},
            config={"darts": {}},
            machine=MACHINE,
        )
        | changes
    )


@pytest.fixture
def docs(tmp_path):
    """A folder with one measurement, `first`, and no template."""
    folder = tmp_path / "docs"
    (folder / "results").mkdir(parents=True)
    opened = document_of(Results(bench(SECONDS, ACCURACIES)))
    report.save(folder / "results" / "first.json", opened)
    return folder


def page_of(docs: Path, *lines: str) -> str:
    (docs / "results" / "page.md").write_text("\n".join(lines) + "\n")
    return results.make(docs).text


def refused(capsys, docs: Path, *lines: str) -> str:
    """The one line that a template is refused with."""
    (docs / "results" / "page.md").write_text("\n".join(lines) + "\n")
    assert results.main([], docs) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert not (docs / "results.md").exists()
    return said[0]


# --- the page --------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_bench_and_notes_are_left_out(docs):
    text = page_of(docs, "# Page", "", "<!-- note: for you -->", "", "<!-- table: first time -->", "", "Behind it.")
    _, found = report.load(docs / "results" / "first.json")
    assert report.time_table(found) in text
    assert text.startswith(results.MADE + "\n\n# Page\n\n```bash\n")
    assert text.endswith("\n\nBehind it.\n")
    assert "for you" not in text


def test_numbers_come_with_their_origin_once_a_section_and_file(docs):
    text = page_of(
        docs, "## A", "<!-- table: first time -->", "### B", "<!-- table: first work -->", "## C",
        "<!-- table: first learning -->",
    )  # fmt: skip
    a, c = text.split("## C")
    for part in (a, c):
        assert part.count(".venv/bin/python -m darts.bench --arm mine=darts,darts.selection.num_long=2") == 1
        assert part.count(
            "2 cores (Some CPU, x86_64), Python 3.11.7, verl 0.9.1, vllm 0.28.0, torch 2.13.0, ray 2.60.0; 2026-01-02, "
            "commit 0123456789ab; load when it began 0.5. Data: [first.json](results/first.json)."
        ) == 1  # fmt: skip
    assert a.index("```bash") < a.index("| arm |")


def test_what_is_not_known_of_the_origin_is_said(docs, tmp_path, capsys):
    changed = MACHINE | {"commit": "unknown", "changed_files": [" M a.py", "?? b.py"]}
    written = tmp_path / "bench.json"
    opened = document_of(Results(bench(SECONDS)), machine=changed, settings={})
    report.save(written, opened)
    assert results.main(["--add", f"second={written}"], docs) == 0
    assert "second.json does not say: commit, command" in capsys.readouterr().err
    assert "commit unknown with 2 files changed" in page_of(docs, "<!-- table: second time -->")


def test_a_preset_chooses_arms_and_says_which_are_not_there(docs):
    text = page_of(docs, "<!-- table: first time ablation -->")
    assert re.findall(r"^\| (none|\+ streaming|darts|mine) \|", text, flags=re.M) == ["none", "+ streaming"]
    assert "Not in this bench: + dual-end, + adaptive." in text
    own = page_of(docs, "<!-- table: first arms own -->")
    assert "| mine | `darts` | `darts.selection.num_long=2` | - |" in own
    assert "| darts |" not in own


def test_a_ratio_is_the_same_in_a_table_of_fewer_arms(docs):
    _, found = report.load(docs / "results" / "first.json")
    (row,) = (line for line in report.time_table(found).splitlines() if line.startswith("| darts |"))
    assert row in page_of(docs, "<!-- table: first time strategies -->")


def test_the_simulator_s_documents(docs, tmp_path, capsys):
    trace, told = tmp_path / "lengths.csv", tmp_path / "told.json"
    rows = [f"1,{prompt},{n},{10 * prompt + n + 1}" for prompt in range(4) for n in range(8)]
    trace.write_text("\n".join(["step,prompt,candidate,response_length", *rows]) + "\n")
    common = [str(trace), "--steps", "2", "--group-size", "4", "--json", str(told)]
    assert simulate(["replay", *common, "--gpus", "2", "4", "--strategy", "darts"]) == 0
    results.add(docs, f"replay={told}")
    text = page_of(docs, "<!-- table: replay speed-ups -->", "", "<!-- table: replay replay 4 -->")
    assert "| strategy | 2 GPUs | 4 GPUs |" in text
    assert text.count("| 4 | darts |") == 1
    assert "| 2 | darts |" not in text
    assert "darts.simulation replay " in text
    assert "gap closed: " in page_of(docs, "<!-- table: replay gaps -->", "", "<!-- table: replay notes -->")
    assert "has no replay on '8' GPUs; it has 2, 4" in refused(capsys, docs, "<!-- table: replay replay 8 -->")

    measured = str(docs / "results" / "first.json")
    assert simulate(["validate", *common, "--gpus", "2", "--bench", measured]) == 0
    results.add(docs, f"checked={told}")
    capsys.readouterr()
    assert "Over all: median error" in page_of(docs, "<!-- table: checked validation -->")
    assert "has no figure 'replay', but none" in refused(capsys, docs, "<!-- figure: checked replay -->")


def test_figures_are_drawn_beside_the_page_and_check_misses_them(docs, capsys):
    pytest.importorskip("matplotlib")
    (docs / "results" / "page.md").write_text("<!-- figure: first seconds strategies -->\n")
    assert results.main([], docs) == 0
    png = docs / "results" / "first-seconds-strategies.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "![seconds strategies of first](results/first-seconds-strategies.png)" in (docs / "results.md").read_text()
    assert results.main(["--check"], docs) == 0
    png.rename(docs / "results" / "old.png")
    capsys.readouterr()
    assert results.main(["--check"], docs) == 1
    said = capsys.readouterr().err
    assert "first-seconds-strategies.png is missing" in said
    assert "old.png is not in the page" in said


def test_check_notices_other_measurements_and_writes_nothing(docs, capsys):
    (docs / "results" / "page.md").write_text("<!-- table: first time -->\n")
    assert results.main(["--check"], docs) == 1, "there is no page yet"
    assert not (docs / "results.md").exists()
    assert results.main([], docs) == 0
    assert results.main(["--check"], docs) == 0
    made = (docs / "results.md").read_text()
    report.save(docs / "results" / "first.json", document_of(Results(bench(SECONDS | {"darts": [[9.0, 9.0, 9.0]]}))))
    capsys.readouterr()
    assert results.main(["--check"], docs) == 1
    assert "results.md is not what the measurements give" in capsys.readouterr().err
    assert (docs / "results.md").read_text() == made


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("<!-- table: second time -->", "second.json: there is no such file"),
        ("<!-- table: first times -->", "has no table 'times', but arms, time, work, learning, notes"),
        ("<!-- figure: first time -->", "has no figure 'time', but seconds, accuracy, tradeoff, lengths, phases"),
        ("<!-- table: first time strategy -->", "'strategy' is neither a preset (strategies, ablation"),
        ("<!-- table: first time beyond quick -->", "must be <!-- table: FILE WHAT [WHICH] -->"),
        ("<!-- tabel: first time -->", "must be <!-- table: FILE WHAT [WHICH] -->"),
        ("<!-- table: broken time -->", "broken.json: cannot be read"),
        ("<!-- table: other time -->", "other.json: is no document of python -m darts.bench"),
    ],
)
def test_a_bad_placeholder_is_one_line_with_its_number(capsys, docs, line, says):
    (docs / "results" / "broken.json").write_text("{")
    (docs / "results" / "other.json").write_text("{}")
    said = refused(capsys, docs, "# Page", "", line)
    assert says in said
    assert "page.md, line 3: " in said


def test_a_preset_of_which_no_arm_was_run_is_refused(capsys, docs):
    report.save(docs / "results" / "first.json", document_of(Results(bench({"none": [[1.0]], "mine": [[1.0]]}))))
    said = refused(capsys, docs, "<!-- table: first time beyond -->")
    assert "first.json has no arm of 'beyond'; it has none, mine" in said


def test_without_measurements_or_template_there_is_no_page(capsys, docs):
    for options in ([], ["--check"]):
        assert results.main(options, docs) == 2
        assert "page.md: there is no template" in capsys.readouterr().err
    (docs / "results" / "first.json").unlink()
    assert results.main([], docs) == 2
    assert "has no measurements (*.json) to make a page of" in capsys.readouterr().err


# --- the committed form ----------------------------------------------------------------------------------------------


def large() -> Results:
    """As large as a bench of 13 arms, 3 seeds, 30 steps, and 200 prompts in each validation."""
    chance, records = random.Random(0), []
    times = ("step_s", "rollout_s", "old_log_prob_s", "update_s", "weights_s", "swap_s", "kept_mean", "kept_p99",
             "pool_mean", "pool_p99", "reward_kept", "reward_pool")  # fmt: skip
    tokens = ("tokens_generated", "tokens_kept", "slot_steps", "idle_slot_steps")
    arms = [arm.name for arm in PRESETS["all"]][:13]
    for arm in arms:
        for seed in range(3):
            for number in range(1, 31):
                values = {name: chance.uniform(1, 50) for name in times}
                values |= {name: chance.randint(1000, 9999) for name in tokens}
                records.append(step(arm, seed, number, **values))
            for number in range(0, 31, 5):
                right = tuple(chance.choice([0.0, 0.5, 1.0]) for _ in range(200))
                mean = sum(right) / len(right)
                records.append(validation(arm, seed, number, mean, mean_length=40.125, prompt_accuracy=right))
    return Results(records, arms, 30)


def test_the_committed_form_is_small_and_gives_the_same_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "summary", lambda *arguments: {})  # slow, and not committed
    path, lean, found = tmp_path / "bench.json", tmp_path / "lean.json", large()
    report.save(path, document_of(found))
    lean.write_text(committed(path))
    assert path.stat().st_size > 450_000
    assert lean.stat().st_size < 250_000
    source, some = read(lean), found.only(["none", "darts", "tail_batching"])
    for name, table in (("work", report.work_table(some)), ("learning", report.learning_table(some))):
        told = source.tables[name]("quick")
        was, now = (re.findall(r"-?\d*\.?\d+", text.replace(",", "")) for text in (table, told))
        assert [float(value) for value in now] == pytest.approx([float(value) for value in was], rel=1e-3, abs=1.1e-3)
    assert source.results.accuracy_gain("darts", "none") == found.accuracy_gain("darts", "none")
    assert committed(lean) == lean.read_text(), "adding it again changes nothing"


def test_no_folder_of_the_machine_is_committed(tmp_path, capsys):
    path, root = tmp_path / "bench.json", results_data.ROOT
    places = [str(root), f"{root}/outputs/x", f"key={root}/a b", f"{root}-other"]
    report.save(path, document_of(Results(bench(SECONDS)), config={"places": places}))
    if root.parent == Path(root.anchor):
        pytest.skip("the project's folder is at the root")
    assert json.loads(committed(path))["config"]["places"] == [".", "outputs/x", "key=./a b", f"../{root.name}-other"]
    report.save(path, document_of(Results(bench(SECONDS)), config={"place": "/ho" + "me/somebody/model"}))
    with pytest.raises(PageError, match="has a folder of this machine"):
        committed(path)


@pytest.mark.parametrize("written", ["bench.json", "a b=bench.json", "../x=bench.json"])
def test_what_is_added_has_a_name(capsys, docs, written):
    assert results.main(["--add", written], docs) == 2
    assert "must be NAME=FILE" in capsys.readouterr().err


# --- this repository's -----------------------------------------------------------------------------------------------


def test_the_names_of_figures_are_those_that_there_are():
    pytest.importorskip("matplotlib")
    from darts.bench import figures

    assert tuple(figures.FIGURES) == results_data.BENCH_FIGURES


def test_the_template_has_the_page_s_sections_and_links_to_files_that_exist():
    template = (results.DOCS / "results" / "page.md").read_text()
    comments = [line for line in template.splitlines() if line.startswith("<!--")]
    assert [
        line for line in comments if not (results.PLACEHOLDER.fullmatch(line) or results.NOTE.fullmatch(line))
    ] == []
    links = {link.split("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", template)}
    assert links
    assert [link for link in links if not (results.DOCS / link).exists()] == []


def test_the_committed_page_is_what_the_measurements_give():
    if not any((results.DOCS / "results").glob("*.json")):
        assert not (results.DOCS / "results.md").exists(), "a page without measurements"
        pytest.skip("no measurements are committed")
    assert results.differences(results.DOCS) == []
    for path in (results.DOCS / "results").glob("*.json"):
        assert path.stat().st_size < 400_000, path.name
        assert read(path).lacking() == [], path.name
