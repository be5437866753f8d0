r"""Geometry3K for verl, with images: train.parquet and test.parquet.

    .venv/bin/python scripts/data/geo3k.py

Scored by verl's `geo3k` (needs the package mathruler): 0.9 for the right answer in \boxed{}, 0.1 for the reasoning in
<think>. The same question about another image is another prompt. Schema (verl's examples/data_preprocess/geo3k.py,
card of hiyouga/geometry3k): `images`; `problem`, with `<image>` where the image belongs; `answer`, the value.
"""

import sys

from prepare import IMAGE, Example, PreparedRow, command, parts, text, user

HUB = "hiyouga/geometry3k"
INSTRUCTION = r"Begin with your reasoning between <think> and </think>. Then give the final answer in \boxed{}."


def read(example: Example) -> PreparedRow:
    problem = text(example, "problem")
    prompt_text = f"{problem}\n\n{INSTRUCTION}"
    if IMAGE not in problem:
        prompt_text = IMAGE * len(example["images"] or ()) + prompt_text
    answer = text(example, "answer")
    return PreparedRow(question=problem, prompt=user(prompt_text), answer=answer, data_source=HUB)


COLUMNS = {"images": "images", "problem": "text", "answer": "text"}
main = command("geo3k", __doc__, *parts("train", "test", hub=HUB, columns=COLUMNS, read=read))

if __name__ == "__main__":
    sys.exit(main())
