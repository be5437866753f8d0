r"""MATH (Hendrycks et al.) for verl: train.parquet and test.parquet.

    .venv/bin/python scripts/data/math_lighteval.py

Scored by verl's `math_reward`, which compares what stands in the last \boxed{}. Dropped: solutions without one. Schema
(verl's examples/data_preprocess/math_dataset.py, card): `problem`; `solution`, with the answer in its last \boxed{}.
"""

import sys

from prepare import Example, PreparedRow, UnusableRow, command, parts, text, user

HUB = "DigitalLearningGmbH/MATH-lighteval"
INSTRUCTION = r"Think step by step, and put the final answer in \boxed{}."


def last_boxed(solution: str) -> str:
    r"""What the last ``\boxed{...}``, ``\boxed x`` or ``\fbox{...}`` holds; empty if there is none, or no end to it."""
    for box_command in (r"\boxed", r"\fbox"):
        _, found_box, box_content = solution.rpartition(box_command)
        if found_box:
            break
    box_content = box_content.lstrip() if found_box else ""
    if not box_content.startswith("{"):
        return box_content.split("$")[0].strip()
    brace_depth = 0
    for end, character in enumerate(box_content):
        brace_depth += (character == "{") - (character == "}")
        if brace_depth == 0:
            return box_content[1:end].strip()
    return ""


def read(example: Example) -> PreparedRow:
    problem = text(example, "problem")
    answer = last_boxed(text(example, "solution"))
    if not answer:
        raise UnusableRow(r"without \boxed{} in the solution")
    prompt = user(f"{problem}\n\n{INSTRUCTION}")
    return PreparedRow(question=problem, prompt=prompt, answer=answer, data_source=HUB)


COLUMNS = {"problem": "text", "solution": "text"}
main = command("math_lighteval", __doc__, *parts("train", "test", hub=HUB, columns=COLUMNS, read=read))

if __name__ == "__main__":
    sys.exit(main())
