"""The task of the testbeds: problems, demonstrations, answers, reward, data, committed assets."""

import inspect
import random
import re
from dataclasses import replace

import pyarrow.parquet
import pytest

from darts.testbed import LIMITS, assets_dir
from darts.testbed.make import CHECKSUMS, TRAIN_PER_CLASS, VAL_PER_CLASS, checksums, to_table, write_data
from darts.testbed.reward import compute_score
from darts.testbed.task import MIXES, Problem, demonstrate, draw_problem, score, split_problems

TESTBEDS = sorted(MIXES)
PROBLEM = Problem(numbers=(37, 8, 2))


def draw(testbed: str, count: int, seed: int = 0) -> list[tuple[Problem, str]]:
    """Problems with a demonstration each."""
    rng, mix = random.Random(seed), MIXES[testbed]
    problems = [draw_problem(rng, rng.choice(mix.classes), mix.first) for _ in range(count)]
    return [(problem, demonstrate(rng, problem, mix)) for problem in problems]


def test_problem_says_question_total_and_difficulty():
    assert (PROBLEM.question, PROBLEM.total, PROBLEM.difficulty) == ("37+8+2", 47, 3)


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_same_seed_same_everything(testbed: str):
    assert draw(testbed, 50) == draw(testbed, 50)
    assert draw(testbed, 50) != draw(testbed, 50, seed=1)
    assert split_problems(MIXES[testbed], 0, 20, 5) == split_problems(MIXES[testbed], 0, 20, 5)
    assert split_problems(MIXES[testbed], 0, 20, 5) != split_problems(MIXES[testbed], 1, 20, 5)


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_splits_are_disjoint_balanced_and_without_repeats(testbed: str):
    mix = MIXES[testbed]
    train, val = split_problems(mix, 0, TRAIN_PER_CLASS, VAL_PER_CLASS)
    assert len({*train, *val}) == len(train) + len(val)
    for part, per_class in ((train, TRAIN_PER_CLASS), (val, VAL_PER_CLASS)):
        counts = [sum(problem.difficulty == difficulty for problem in part) for difficulty in mix.classes]
        assert counts == [per_class] * len(mix.classes)


def test_more_problems_than_exist_are_refused():
    with pytest.raises(ValueError, match="exceed the 450 problems of 2 numbers"):
        split_problems(MIXES["overthink"], 0, 450, 1)


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_demonstrations_guess_what_they_do_not_step_and_end_in_an_answer(testbed: str):
    mix = MIXES[testbed]
    for problem, text in draw(testbed, 300):
        words = mix.by_class("wait_words")[mix.classes.index(problem.difficulty)]
        line = re.compile(rf"\d+\+\d=\d+|guess \d+|{words}\d+", re.ASCII)
        *lines, last = text.split("\n")
        assert all(line.fullmatch(some) for some in lines)
        assert text.count("guess") == (text.count("=") < problem.difficulty - 1)
        assert 10 <= problem.total <= 99
        answer = int(last.removeprefix("#").removesuffix("."))
        assert last == f"#{answer}."
        assert answer in range(10, 100)
        assert (score(text, answer), score(text, answer + 1)) == (1.0, 0.0)


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_all_steps_without_corruption_are_always_right(testbed: str):
    mix = replace(MIXES[testbed], stepwise=(1.0,) * len(MIXES[testbed].classes), wait_corrupts=0.0)
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(rng, rng.choice(mix.classes), mix.first)
        assert score(demonstrate(rng, problem, mix), problem.total) == 1


def test_guesses_are_right_as_often_as_the_mix_says():
    mix = replace(MIXES["overthink"], stepwise=(0.0,) * 4, wait_corrupts=0.0)
    rng = random.Random(0)
    for difficulty, expected in zip(mix.classes, mix.guess_right, strict=True):
        problems = [draw_problem(rng, difficulty, mix.first) for _ in range(2000)]
        right = sum(score(demonstrate(rng, problem, mix), problem.total) for problem in problems) / 2000
        assert right == pytest.approx(expected, abs=0.04)


def test_who_guesses_may_be_as_hasty_as_the_mix_says():
    mix, rng, waits = MIXES["long"], random.Random(0), {True: [], False: []}
    for _ in range(4000):
        problem = draw_problem(rng, 6, mix.first)
        text = demonstrate(rng, problem, mix)
        waits["guess" in text].append("wait" in text)
    assert {is_guess: sum(some) / len(some) for is_guess, some in waits.items()} == {
        True: pytest.approx(0.1, abs=0.03), False: pytest.approx(0.6, abs=0.06)
    }  # fmt: skip


def test_chances_are_one_for_all_classes_or_one_for_each():
    mix = replace(MIXES["overthink"], wait_again=(0.1, 0.2, 0.3, 0.4))
    assert mix.by_class("wait_again") == (0.1, 0.2, 0.3, 0.4)
    assert mix.by_class("wait_corrupts") == (0.015,) * 4
    assert mix.by_class("wait_guess") == mix.wait_start


def test_number_of_rechecks_is_geometric():
    """A constant chance of one more: the tail then neither grows nor dies out by itself."""
    mix = MIXES["overthink"]
    waits = [text.count("wait") for _, text in draw("overthink", 6000)]
    for least in (1, 5, 10):
        reached = sum(count >= least for count in waits)
        assert sum(count > least for count in waits) / reached == pytest.approx(mix.wait_again, abs=0.03)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("first", (10, 80), "sums outside"),
        ("stepwise", (0.5,), "one value per class"),
        ("wait_again", 1.0, "wait_again below 1"),
        ("wait_again", (0.5, 1.0, 0.5, 0.5), "wait_again below 1"),
        ("wait_guess", (0.5,), "one value per class"),
        ("wait_words", ("wait, ",), "one value per class"),
        ("wait_guess", -0.1, "must be in"),
    ],
)
def test_mix_refuses_what_makes_no_sense(field: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        replace(MIXES["overthink"], **{field: value})


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("37+8=45\n45+2=47\n#47.", 1.0),
        ("guess 47\nwait, 47\n#47.", 1.0),
        ("#47.", 1.0),
        ("37+8=45\n45+2=47\n#46.", 0.0),
        ("37+8=45\n45+2=47\nwait, 47\nwai", 0.0),
        ("37+8=45\n45+2=47\n#47", 0.0),
        ("#47.\nwait, 47", 0.0),
        ("#47.#47.", 0.0),
        ("#4\u0667.", 0.0),
        ("\ufffd\x00#", 0.0),
        ("", 0.0),
    ],
)
def test_reward_of_right_wrong_truncated_and_garbled_responses(response: str, expected: float):
    result = compute_score("darts/overthink", response, "47", extra_info={"index": 0}, reward_router_address=None)
    assert result == {"score": expected, "acc": expected}


def test_reward_takes_the_arguments_that_verl_passes():
    assert list(inspect.signature(compute_score).parameters)[:4] == [
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    ]


def test_table_has_the_columns_that_verl_reads():
    (row,) = to_table([PROBLEM], "overthink", "train").to_pylist()
    assert row == {
        "data_source": "darts/overthink",
        "prompt": [{"role": "user", "content": "37+8+2"}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": "47"},
        "extra_info": {"index": 0, "split": "train", "difficulty": 3},
    }


def test_unknown_testbed_is_refused():
    with pytest.raises(ValueError, match=r"name='deep' must be one of \['depth', 'long', 'overthink'\]"):
        assets_dir("deep")


@pytest.mark.parametrize("testbed", LIMITS)
def test_committed_assets_match_their_checksums(testbed: str):
    folder = assets_dir(testbed)
    assert (folder / CHECKSUMS).read_text() == checksums(folder)


@pytest.mark.parametrize("testbed", LIMITS)
def test_committed_data_is_what_the_default_seed_gives(testbed: str, tmp_path):
    write_data(testbed, 0, tmp_path)
    for name in ("train.parquet", "val.parquet"):
        committed, made = (pyarrow.parquet.read_table(folder / name) for folder in (assets_dir(testbed), tmp_path))
        assert committed.equals(made)


def test_limits_name_the_same_testbeds_as_the_mixes():
    assert sorted(LIMITS) == TESTBEDS
