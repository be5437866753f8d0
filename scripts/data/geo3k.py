r"""Geometry3K for verl, with images: train.parquet and test.parquet.

    .venv/bin/python scripts/data/geo3k.py

Scored by verl's `geo3k` (needs the package mathruler): 0.9 for the right answer in \boxed{}, 0.1 for the reasoning in
<think>. The same question about another image is another prompt. Schema (verl's examples/data_preprocess/geo3k.py,
card of hiyouga/geometry3k): `images`; `problem`, with `<image>` where the image belongs; `answer`, the value.
"""

import sys
from collections.abc import Sequence

from prepare import IMAGE, Example, Part, Row, make_parser, run, text, user

HUB = "hiyouga/geometry3k"
INSTRUCTION = r"Begin with your reasoning between <think> and </think>. Then give the final answer in \boxed{}."


def read(example: Example) -> Row:
    problem = text(example, "problem")
    content = f"{problem}\n\n{INSTRUCTION}"
    if IMAGE not in problem:
        content = IMAGE * len(example["images"] or ()) + content
    return Row(question=problem, prompt=user(content), answer=text(example, "answer"), data_source=HUB)


def part(split: str) -> Part:
    columns = {"images": "images", "problem": "text", "answer": "text"}
    return Part(name=split, split=split, hub=HUB, columns=columns, read=read)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(make_parser("geo3k", __doc__, HUB).parse_args(arguments), part("train"), part("test"))


if __name__ == "__main__":
    sys.exit(main())
