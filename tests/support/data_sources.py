"""Small copies of the datasets that `scripts/data` prepares: the columns, types and quirks of the published ones."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pyarrow.parquet as parquet
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "data"
LINE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
"""As in the published rows of DAPO-Math-17k and AIME-2024."""
IMAGES = datasets.List(datasets.Image())


def module(name: str) -> ModuleType:
    """A module of scripts/data, found as `python scripts/data/prepare.py` finds it."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def run(name: str, *arguments: object) -> int:
    """Runs the command for a dataset; returns its exit code."""
    return module("prepare").main([name, *map(str, arguments)])


def hub(name: str) -> str:
    """Where a dataset is published."""
    _, train, _ = module("published").DATASETS[name]
    return train.hub


def gsm8k(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


def math_lighteval(problem: str, solution: str) -> dict:
    return {"problem": problem, "level": "Level 2", "type": "Algebra", "solution": solution}


def dapo(problem: str, answer: str, index: str = "9a9b6eb4") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": LINE.format(problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def deepmath(question: str, answer: str) -> dict:
    return {
        "question": question, "final_answer": answer, "difficulty": 5.5, "topic": "Algebra", "r1_solution_1": "...",
        "r1_solution_2": "...", "r1_solution_3": "...",
    }  # fmt: skip


def deepscaler(problem: str, answer: str) -> dict:
    return {"problem": problem, "answer": answer, "solution": "..."}


def eurus2(question: str, truth: str | dict, ability: str = "code", source: str = "taco") -> dict:
    wanted = {
        "code": "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.",
        "math": "Present the answer in LaTex format: \\boxed{Your answer}",
    }[ability]
    return {
        "data_source": source,
        "prompt": [
            {"content": "\nWhen tackling complex reasoning tasks, use actions.\n", "role": "system"},
            {"content": f"{question}\n\n{wanted}", "role": "user"},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": truth if isinstance(truth, str) else json.dumps(truth), "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
    }


def png(gray: int) -> bytes:
    """A picture of one shade."""
    held = io.BytesIO()
    Image.new("RGB", (24, 16), (gray, gray, gray)).save(held, "png")
    return held.getvalue()


def geo3k(problem: str, answer: str, *pictures: bytes) -> dict:
    images = [{"bytes": picture, "path": None} for picture in pictures]
    return {"images": images, "problem": problem, "answer": answer, "id": 7, "ground_truth": "A"}


def save(folder: Path, rows: dict[str, list[dict]]) -> Path:
    """Writes splits as the hub has them: ``data/<split>-00000-of-00001.parquet``."""
    (folder / "data").mkdir(parents=True)
    for split, examples in rows.items():
        made = datasets.Dataset.from_list(examples)
        if "images" in made.column_names:
            made = made.cast_column("images", IMAGES)
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


AIME = [dapo("Find the last digit of $7^{2024}$.", "1")] * 32 + [dapo("What is $200 + 4$?", "204")] * 32
SMALL: dict[str, tuple[dict[str, list[dict]], list[str]]] = {
    "gsm8k": (
        {"train": [gsm8k("Two and two?", "2 + 2 = <<2+2=4>>4\n#### 4")], "test": [gsm8k("A lot?", "So.\n#### 1,234")]},
        ["train", "test"],
    ),
    "math_lighteval": (
        {
            "train": [math_lighteval("Half?", r"It is $\boxed{\frac{1}{2}}$.")],
            "test": [math_lighteval("Set?", r"So $\boxed{\{1, 2\}}$.")],
        },
        ["train", "test"],
    ),
    "dapo_math": ({"train": [dapo("Sum of 30 and 4?", "34")] * 100}, ["train", "aime2024"]),
    "deepmath": ({"train": [deepmath("Evaluate the limit.", r"\dfrac{\pi}{2}")]}, ["train", "aime2024"]),
    "deepscaler": ({"train": [deepscaler("Which pair?", r"\left(3, \frac{\pi}{2}\right)")]}, ["train", "aime2024"]),
    "geo3k": (
        {
            "train": [geo3k("<image>Find x.", "3", png(10)), geo3k("<image>Find x.", "4", png(20))],
            "validation": [geo3k("<image>Find y.", "1", png(30))],
            "test": [geo3k("<image>Find z.", r"2 \sqrt { 221 }", png(40))],
        },
        ["train", "test"],
    ),
    "eurus2": (
        {
            "train": [
                eurus2("Double the number.", {"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]}),
                eurus2("Write twice(x).", {"fn_name": "twice", "inputs": [[2], [5]], "outputs": [[4], [10]]}),
                eurus2("Solve $2x = 1$.", r"\frac{1}{2}", "math", "numina_olympiads"),
            ],
            "validation": [
                eurus2("Print the input.", {"inputs": ["a\n"], "outputs": ["a\n"]}, source="apps"),
                eurus2("Solve $x = 4$.", "4", "math", "numina_cn_k12"),
            ],
        },
        ["train", "validation"],
    ),
}
"""Per script the splits of a source, and the files that come out."""
OWN_VALIDATION = {"dapo_math", "deepmath", "deepscaler"}


def prepare(name: str, folder: Path, *options: str, rows: dict[str, list[dict]] | None = None) -> Path:
    """Runs a script on its small copy, or on other rows; returns the folder with the files."""
    source, out = save(folder / "source", rows or SMALL[name][0]), folder / "out"
    arguments = ["--source", str(source), "--out", str(out), *options]
    if name in OWN_VALIDATION:
        arguments += ["--val-source", str(save(folder / "aime", {"train": AIME}))]
    assert run(name, *arguments) == 0
    return out


def make(name: str, folder: Path, rows: dict[str, list[dict]], *options: str) -> tuple[Path, Path]:
    """Runs a script on these rows; returns its two files."""
    out = prepare(name, folder, *options, rows=rows)
    first, second = SMALL[name][1]
    return out / f"{first}.parquet", out / f"{second}.parquet"


def rows_of(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def questions(path: Path) -> list[str]:
    """The first line of what the user says in each row."""
    return [row["prompt"][-1]["content"].split("\n")[0] for row in rows_of(path)]


def go_offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No hub, and a cache of one's own."""
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
