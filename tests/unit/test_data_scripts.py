"""The rows that the commands of scripts/data write, on small copies of the datasets, and what is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from data_sources import (
    AIME,
    OWN_VALIDATION,
    SMALL,
    dapo,
    deepmath,
    deepscaler,
    eurus2,
    geo3k,
    go_offline,
    gsm8k,
    make,
    math_lighteval,
    module,
    png,
    prepare,
    questions,
    rows_of,
)

from darts.history import prompt_key


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_offline(monkeypatch, tmp_path)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_those_that_verl_wants(name: str, tmp_path: Path) -> None:
    out = prepare(name, tmp_path, *(["--ability", "all"] if name == "eurus2" else []))
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{file}.parquet" for file in SMALL[name][1])
    keys = []
    for file in SMALL[name][1]:
        path = out / f"{file}.parquet"
        for row in rows_of(path):
            assert set(row) - {"images"} == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert all(set(message) == {"role", "content"} for message in row["prompt"])
            assert row["prompt"][-1]["role"] == "user"
            assert row["reward_model"]["style"] == "rule"
            assert row["reward_model"]["ground_truth"]
            assert row["extra_info"]["split"] == file
            assert row["extra_info"]["index"] >= 0
            keys.append(prompt_key([row["prompt"], row.get("images")]))
        assert len(rows_of(path)) > 0
    assert len(set(keys)) == len(keys)


def test_all_files_have_one_schema(tmp_path: Path) -> None:
    """Files of several datasets may stand in `data.train_files`, which verl concatenates."""
    files = [str(path) for name in SMALL for path in prepare(name, tmp_path / name).iterdir()]
    loaded = [datasets.load_dataset("parquet", data_files=file)["train"] for file in files]
    mixed = datasets.concatenate_datasets(loaded)
    assert len(mixed) == sum(map(len, loaded))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("#### 18", "18"),
        ("2 + 2\n####  -1,234,567 ", "-1234567"),
        ("First #### 3, no:\n#### $4.50", "4.50"),
        ("So\n#### 5.", "5"),
    ],
)
def test_gsm8k_takes_the_number_after_the_hashes(solution: str, answer: str, tmp_path: Path) -> None:
    train, _ = make("gsm8k", tmp_path, {"train": [gsm8k("q", solution)], "test": [gsm8k("p", "#### 1")]})
    (row,) = rows_of(train)
    assert row["reward_model"]["ground_truth"] == answer
    assert "####" in row["prompt"][0]["content"]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"So $\boxed 7$ it is", "7"),
        (r"\fbox{a {b} c} end", "a {b} c"),
        (r"\boxed{5} in a \fbox{frame}", "5"),
    ],
)
def test_math_takes_what_is_in_the_last_box(solution: str, answer: str) -> None:
    assert module("published").last_boxed(solution) == answer


@pytest.mark.parametrize("solution", ["none", r"\boxed{not closed", ""])
def test_math_without_a_box_has_no_answer(solution: str) -> None:
    assert module("published").last_boxed(solution) == ""


def test_dapo_keeps_the_published_prompt_and_each_problem_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [dapo("Sum?", "34", "a"), dapo("Product?", "5", "b")] * 100
    train, val = make("dapo_math", tmp_path, {"train": rows})
    assert [row["prompt"][0]["content"] for row in rows_of(train)] == [
        rows[0]["prompt"][0]["content"],
        rows[1]["prompt"][0]["content"],
    ]
    assert [row["prompt"] for row in rows_of(val)] == [AIME[0]["prompt"], AIME[32]["prompt"]]
    said = capsys.readouterr().out
    assert "train.parquet: 200 read, 2 written; dropped: 198 repeated" in said
    assert "aime2024.parquet: 64 read, 2 written; dropped: 62 repeated" in said


@pytest.mark.parametrize("name", sorted(OWN_VALIDATION))
def test_training_and_validation_have_the_same_instructions(name: str, tmp_path: Path) -> None:
    out = prepare(name, tmp_path)
    (train, *_), (val, *_) = rows_of(out / "train.parquet"), rows_of(out / "aime2024.parquet")
    published = SMALL[name][0]["train"][0]
    train_question = published.get("question") or published.get("problem") or "Sum of 30 and 4?"
    val_question = "Find the last digit of $7^{2024}$."
    assert val["data_source"] == "aime2024"
    assert train["prompt"][0]["content"].replace(train_question, "Q") == val["prompt"][0]["content"].replace(
        val_question, "Q"
    )


def test_geo3k_keeps_the_images_as_they_are(tmp_path: Path) -> None:
    train, _ = make("geo3k", tmp_path, SMALL["geo3k"][0])
    assert [row["images"][0]["bytes"] for row in rows_of(train)] == [png(10), png(20)]
    loaded = datasets.load_dataset("parquet", data_files=str(train))["train"]
    assert loaded[1]["images"][0].getpixel((0, 0)) == (20, 20, 20)


def test_geo3k_tells_prompts_apart_by_their_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    find = "<image>Find x."
    rows = {
        "train": [
            geo3k(find, "1", png(1)),
            geo3k(find, "1", png(1)),
            geo3k(find, "2", png(2)),
            geo3k(find, "3", png(3)),
        ],
        "test": [geo3k(find, "3", png(3))],
    }
    train, test = make("geo3k", tmp_path, rows)
    assert [row["reward_model"]["ground_truth"] for row in rows_of(train)] == ["1", "2"]
    assert len(rows_of(test)) == 1
    assert "dropped: 1 repeated, 1 also in test.parquet" in capsys.readouterr().out


def test_geo3k_drops_images_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {
        "train": [
            geo3k("Find a.", "1", png(1)),
            geo3k("<image><image>Find b.", "1", png(1)),
            geo3k("<image>Find c.", "1", b"no image"),
        ],
        "test": [geo3k("<image>Find d.", "3", png(3))],
    }
    train, _ = make("geo3k", tmp_path, rows)
    assert questions(train) == ["<image>Find a."]
    said = capsys.readouterr().out
    assert "1 with another number of images than of <image>" in said
    assert "1 with an image that cannot be read" in said


@pytest.mark.parametrize(("ability", "numbers"), [("code", (2, 1)), ("math", (1, 1)), ("all", (3, 2))])
def test_eurus2_takes_the_ability_that_is_asked_for(ability: str, numbers: tuple[int, int], tmp_path: Path) -> None:
    files = make("eurus2", tmp_path, SMALL["eurus2"][0], "--ability", ability)
    assert tuple(len(rows_of(path)) for path in files) == numbers
    assert {row["ability"] for row in rows_of(files[0])} == ({"code", "math"} if ability == "all" else {ability})


@pytest.mark.parametrize(
    ("published", "written"),
    [
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, {"inputs": ["1\n"], "outputs": ["2\n"]}),
        ({"inputs": [["1", "2 3"]], "outputs": [["4"]]}, {"inputs": ["1\n2 3"], "outputs": ["4"]}),
        ({"inputs": [7], "outputs": [8], "fn_name": None}, {"inputs": ["7"], "outputs": ["8"]}),
        (
            {"fn_name": "f", "inputs": [["a\nb", [1, 2]]], "outputs": [[True]]},
            {"fn_name": "f", "inputs": ['"a\\nb"\n[1, 2]'], "outputs": ["[true]"]},
        ),
        (
            {"fn_name": "f", "inputs": ['"a"\n2'], "outputs": ["3"]},
            {"fn_name": "f", "inputs": ['"a"\n2'], "outputs": ["3"]},
        ),
    ],
)
def test_eurus2_writes_tests_as_text(published: dict, written: dict) -> None:
    assert json.loads(module("published").runnable(json.dumps(published))) == written


@pytest.mark.parametrize(
    "published",
    [
        "not JSON", "[]", "[" * 100_000, '{"inputs": ["1"]}', '{"inputs": [], "outputs": []}',
        '{"inputs": ["1", "2"], "outputs": ["1"]}', '{"inputs": [null], "outputs": ["1"]}',
        '{"fn_name": "f", "inputs": [[]], "outputs": [1]}', '{"fn_name": "f", "inputs": ["a"], "outputs": ["1"]}',
        '{"fn_name": "f", "inputs": ["1"], "outputs": [1]}', '{"fn_name": "f", "inputs": [1], "outputs": ["1"]}',
    ],
)  # fmt: skip
def test_eurus2_drops_tests_that_cannot_be_run(published: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {
        "train": [eurus2("Bad.", published), eurus2("Good.", {"inputs": ["1"], "outputs": ["1"]})],
        "validation": SMALL["eurus2"][0]["validation"],
    }
    train, _ = make("eurus2", tmp_path, rows)
    assert questions(train) == ["Good."]
    assert "dropped: 1 with tests that verl cannot run" in capsys.readouterr().out


def test_eurus2_adds_instructions_where_they_are_missing(tmp_path: Path) -> None:
    bare = eurus2("Print 1.", {"inputs": ["1"], "outputs": ["1"]})
    bare["prompt"][1]["content"] = "Print 1."
    train, _ = make("eurus2", tmp_path, {"train": [bare], "validation": SMALL["eurus2"][0]["validation"]})
    content = rows_of(train)[0]["prompt"][-1]["content"]
    assert content.startswith("Print 1.\n")
    assert "```python" in content


def test_eurus2_drops_what_verl_cannot_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = {"inputs": ["1"], "outputs": ["1"]}
    lost = eurus2("Lost.", good)
    lost["prompt"] = [{"content": "You.", "role": "system"}, {"content": "Lost.", "role": "assistant"}]
    rows = {
        "train": [eurus2("Unknown.", good, source="leetcode"), lost, eurus2("Good.", good)],
        "validation": SMALL["eurus2"][0]["validation"],
    }
    train, _ = make("eurus2", tmp_path, rows)
    assert questions(train) == ["Good."]
    said = capsys.readouterr().out
    assert "1 of a data source that verl does not score as code" in said
    assert "1 without a last message of the user" in said


# --- copies, and what is empty ---------------------------------------------------------------------------------------


def test_copies_differ_in_white_space_and_unicode_form_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        deepscaler("Café a", "1"),
        deepscaler(" Cafe\u0301  a\n", " 1 "),
        deepscaler("café a", "1"),
        deepscaler("b", "2"),
    ]
    train, _ = make("deepscaler", tmp_path, {"train": rows})
    assert questions(train) == ["Café a", "café a", "b"]
    assert [row["extra_info"]["index"] for row in rows_of(train)] == [0, 2, 3]
    assert "4 read, 3 written; dropped: 1 repeated\n" in capsys.readouterr().out


def test_copies_that_disagree_are_all_dropped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [deepmath("a", "1"), deepmath("b", "2"), deepmath("a", "1"), deepmath("a", "3"), deepmath("c", "4")]
    train, _ = make("deepmath", tmp_path, {"train": rows})
    assert questions(train) == ["b", "c"]
    assert "5 read, 2 written; dropped: 3 repeated with different answers\n" in capsys.readouterr().out


def test_of_code_with_other_tests_the_first_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its tests may differ and agree."""
    one, two = {"inputs": ["1"], "outputs": ["2"]}, {"inputs": ["1", "2"], "outputs": ["2", "4"]}
    rows = [eurus2("a", one), eurus2("b", one), eurus2("a", two)]
    train, _ = make("eurus2", tmp_path, {"train": rows, "validation": [eurus2("c", one)]})
    assert [row["extra_info"]["index"] for row in rows_of(train)] == [0, 1]
    assert "3 read, 2 written; dropped: 1 repeated\n" in capsys.readouterr().out


def test_what_stands_in_validation_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Though the instructions differ, and though `--limit` leaves it out of the validation file."""
    rows = [deepmath("What  is $200 + 4$?", "204"), deepmath("New?", "1"), deepmath("Newer?", "2")]
    train, val = make("deepmath", tmp_path, {"train": rows}, "--limit", "1")
    assert questions(train) == ["New?"]
    assert questions(val) == ["Find the last digit of $7^{2024}$."]
    said = capsys.readouterr().out
    assert "train.parquet: 3 read, 1 written of 2, --limit; dropped: 1 also in aime2024.parquet\n" in said


@pytest.mark.parametrize("name", ["gsm8k", "math_lighteval", "dapo_math", "deepmath", "deepscaler", "geo3k", "eurus2"])
def test_empty_prompts_and_answers_are_dropped(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_row = {
        "gsm8k": gsm8k, "math_lighteval": math_lighteval, "dapo_math": dapo, "deepmath": deepmath,
        "deepscaler": deepscaler, "geo3k": lambda problem, answer: geo3k(problem, answer), "eurus2": eurus2,
    }[name]  # fmt: skip
    good = {"gsm8k": "#### 3", "math_lighteval": r"\boxed{3}", "eurus2": '{"inputs": ["1"], "outputs": ["1"]}'}
    bad = [make_row(" ", good.get(name, "3")), make_row("No answer.", " "), make_row("None.", "")]
    if name == "eurus2":
        bad[0]["prompt"][1]["content"] = "  "
    splits = {split: [*bad, *examples] for split, examples in SMALL[name][0].items()}
    train, _ = make(name, tmp_path, splits)
    assert not {"", "No answer.", "None."} & set(questions(train))
    said = capsys.readouterr().out.splitlines()[0]
    assert "1 with an empty prompt" in said
    without = {"gsm8k": "without a number after ####", "math_lighteval": r"without \boxed{} in the solution"}
    assert f"2 {without.get(name, 'with an empty answer')}" in said


def test_null_is_empty(tmp_path: Path) -> None:
    rows = [deepscaler("a", None), deepscaler(None, "1"), deepscaler("b", "1")]
    train, _ = make("deepscaler", tmp_path, {"train": rows})
    assert questions(train) == ["b"]
