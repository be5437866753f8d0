"""verl scores the rows that scripts/data write, and loads them: right responses as right, wrong ones as wrong."""

from __future__ import annotations

from pathlib import Path

import data_sources
import pytest
import vision
from data_sources import SMALL, go_offline, module, png, rows_of
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.reward_score import default_compute_score, math_reward

from darts.history import prompt_key
from darts.testbed.model import build_tokenizer

CASES = {
    "gsm8k/train": [("So 4.\n#### 4", "So 5.\n#### 5"), ("#### 4", "4")],
    "gsm8k/test": [("#### 1,234", "#### 1,235")],
    "math_lighteval/train": [
        (r"It is \boxed{\dfrac12}.", r"It is \boxed{2}."),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ],
    "math_lighteval/test": [(r"So $\boxed{\{1,2\}}$", r"So $\boxed{\{1,3\}}$")],
    "dapo_math/train": [("Sum.\nAnswer: 34", "Sum.\nAnswer: 35"), ("Answer: $34$", "Answer:")],
    "dapo_math/aime2024": [("Answer: 1", "Answer: 2")],
    "deepmath/train": [("So.\nAnswer: \\boxed{\\frac{\\pi}{2}}", "So.\nAnswer: \\boxed{\\frac{\\pi}{3}}")],
    "deepmath/aime2024": [("So.\nAnswer: \\boxed{1}", "So.\nAnswer: \\boxed{2}"), ("Answer: $\\boxed{1}$", "Answer:")],
    "deepscaler/train": [("Answer: \\boxed{(3, \\frac{\\pi}{2})}", "Answer: \\boxed{(3, \\pi)}")],
    "deepscaler/aime2024": [("So.\nAnswer: \\boxed{1}", "So.\nAnswer: \\boxed{2}")],
    "geo3k/train": [("<think>a</think> \\boxed{3}", "<think>a</think> \\boxed{4}")],
    "geo3k/test": [("<think>a</think> \\boxed{2\\sqrt{221}}", "<think>a</think> \\boxed{3}")],
    "eurus2/validation": [("```python\nprint(input())\n```", "```python\nprint(1)\n```")],
}
"""Per file right and wrong responses to its first row."""
MARKS = {
    "openai/gsm8k": ["####"],
    "DigitalLearningGmbH/MATH-lighteval": [r"\boxed{"],
    "math_dapo": ["Answer:"],
    "aime2024": ["Answer:"],
    "hiyouga/geometry3k": ["<think>", "</think>", r"\boxed{"],
    "code": ["```python"],
    "math": [r"\boxed{"],
}
"""What a scorer looks for in a response, by data source; for eurus2 by ability."""
CODE = [
    ("```python\nprint(2 * int(input()))\n```", "```python\nprint(3 * int(input()))\n```"),
    ("```python\ndef twice(x):\n    return 2 * x\n```", "```python\ndef twice(x):\n    return x\n```"),
    (r"So \boxed{\frac{1}{2}}", r"So \boxed{2}"),
]
"""The same for the three rows of eurus2/train: a program, a function, a number."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    """Makes the files of a dataset, once."""
    folder, made = tmp_path_factory.mktemp("data"), {}
    with pytest.MonkeyPatch.context() as patch:
        go_offline(patch, folder)

        def prepare(name: str) -> Path:
            if name not in made:
                options = ["--ability", "all"] if name == "eurus2" else []
                made[name] = data_sources.prepare(name, folder / name, *options)
            return made[name]

        yield prepare


def score(row: dict, response: str) -> float:
    """As verl's reward managers ask for it."""
    found = default_compute_score(
        data_source=row["data_source"],
        solution_str=response,
        ground_truth=row["reward_model"]["ground_truth"],
        extra_info=row["extra_info"],
    )
    return found["score"] if isinstance(found, dict) else found


def judge(row: dict, right: str, wrong: str) -> None:
    best, worst = score(row, right), score(row, wrong)
    assert best == pytest.approx(1.0)
    assert worst == -1.0 if row["data_source"] in ("math_dapo", "aime2024") else worst <= 0.1 + 1e-9


@pytest.mark.parametrize("file", CASES)
def test_verl_scores_the_rows(file: str, prepared) -> None:
    name, part = file.split("/")
    row = rows_of(prepared(name) / f"{part}.parquet")[0]
    for right, wrong in CASES[file]:
        judge(row, right, wrong)


@pytest.mark.parametrize("index", range(3), ids=["program", "function", "math"])
def test_verl_scores_the_rows_of_eurus2(index: int, prepared) -> None:
    judge(rows_of(prepared("eurus2") / "train.parquet")[index], *CODE[index])


@pytest.mark.parametrize("name", SMALL)
def test_prompts_ask_for_what_the_scorer_looks_for(name: str, prepared) -> None:
    for file in SMALL[name][1]:
        for row in rows_of(prepared(name) / f"{file}.parquet"):
            marks = MARKS.get(row["data_source"]) or MARKS[row["ability"]]
            assert all(mark in row["prompt"][-1]["content"] for mark in marks)


def test_lists_as_tests_of_a_function_need_the_rewriting() -> None:
    """Delete the rewriting in scripts/data/published.py when this fails."""
    published = SMALL["eurus2"][0]["train"][1]
    assert score(published, CODE[1][0]) == 0.0


def test_every_data_source_of_eurus2_has_a_scorer() -> None:
    for ability, sources in module("published").EURUS_SOURCES.items():
        truth = '{"inputs": ["1"], "outputs": ["1"]}' if ability == "code" else "1"
        response = "```python\nprint(1)\n```" if ability == "code" else r"\boxed{1}"
        for source in sources:
            assert default_compute_score(source, response, truth) == 1.0


@pytest.mark.parametrize(
    "solution", [r"\boxed{1} or $\boxed{\frac{1}{2}}$.", r"So $\boxed 7$", r"\boxed{5} in \fbox{6}"]
)
def test_the_box_is_the_one_that_verl_reads(solution: str) -> None:
    expected = math_reward.remove_boxed(math_reward.last_boxed_only_string(solution))
    assert module("published").last_boxed(solution) == expected


def load(path: Path, processor=None) -> RLHFDataset:
    config = OmegaConf.create(
        {"max_prompt_length": 4096, "filter_overlong_prompts": processor is None, "filter_overlong_prompts_workers": 1}
    )
    return RLHFDataset(str(path), build_tokenizer(), config, processor)


@pytest.mark.parametrize("file", [f"{name}/{part}" for name in SMALL for part in SMALL[name][1] if name != "geo3k"])
def test_verl_loads_the_rows(file: str, prepared) -> None:
    name, part = file.split("/")
    path = prepared(name) / f"{part}.parquet"
    rows, loaded = rows_of(path), load(path)
    batch = collate_fn([loaded[index] for index in range(len(loaded))])
    assert [list(prompt) for prompt in batch["raw_prompt"]] == [row["prompt"] for row in rows]
    assert list(batch["index"]) == [row["extra_info"]["index"] for row in rows]
    assert list(batch["data_source"]) == [row["data_source"] for row in rows]
    assert len({prompt_key(prompt) for prompt in batch["raw_prompt"]}) == len(rows)


def test_verl_loads_the_images(prepared) -> None:
    loaded = load(prepared("geo3k") / "train.parquet", vision.make_processor(vision.make_tokenizer()))
    prompts = [loaded[index]["raw_prompt"] for index in range(len(loaded))]
    images = []
    for (message,) in prompts:
        image, rest = message["content"]
        assert (image["type"], rest["type"]) == ("image", "text")
        assert rest["text"].startswith("Find x.\n")
        images.append(image["image"])
    assert [image.size for image in images] == [(24, 16)] * 2
    assert [image.getpixel((0, 0)) for image in images] == [(10,) * 3, (20,) * 3]
    assert png(10) != png(20)
    assert prompt_key(prompts[0]) != prompt_key(prompts[1])
