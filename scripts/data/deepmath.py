r"""DeepMath-103K for verl: train.parquet and, for validation, aime2024.parquet.

    .venv/bin/python scripts/data/deepmath.py

Scored by verl's `math_reward`, which compares what stands in the last \boxed{}; verl finds it by the data source of
MATH. Schema (card of zwhe99/DeepMath-103K): `question`, `final_answer`; its solutions of R1 are not used.
"""

import sys
from collections.abc import Sequence

from dapo_format import AIME, BOXED, aime2024
from math_lighteval import HUB as BOXED_SCORER
from prepare import Example, Part, Row, make_parser, run, text, user

HUB = "zwhe99/DeepMath-103K"


def read(example: Example) -> Row:
    question, answer = text(example, "question"), text(example, "final_answer")
    return Row(question=question, prompt=user(BOXED.format(question)), answer=answer, data_source=BOXED_SCORER)


TRAIN = Part(name="train", hub=HUB, columns={"question": "text", "final_answer": "text"}, read=read)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(make_parser("deepmath", __doc__, HUB, AIME).parse_args(arguments), TRAIN, aime2024(BOXED))


if __name__ == "__main__":
    sys.exit(main())
