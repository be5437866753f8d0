r"""DeepScaleR-Preview for verl: train.parquet and, for validation, aime2024.parquet.

    .venv/bin/python scripts/data/deepscaler.py

Scored by verl's `math_reward`, which compares what stands in the last \boxed{}; verl finds it by the data source of
MATH. Schema (card of agentica-org/DeepScaleR-Preview-Dataset): `problem`, `answer`, empty in a few rows.
"""

import sys
from collections.abc import Sequence

from dapo_format import AIME, BOXED, aime2024
from math_lighteval import HUB as BOXED_SCORER
from prepare import Example, Part, Row, make_parser, run, text, user

HUB = "agentica-org/DeepScaleR-Preview-Dataset"


def read(example: Example) -> Row:
    problem, answer = text(example, "problem"), text(example, "answer")
    return Row(question=problem, prompt=user(BOXED.format(problem)), answer=answer, data_source=BOXED_SCORER)


TRAIN = Part(name="train", hub=HUB, columns={"problem": "text", "answer": "text"}, read=read)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(make_parser("deepscaler", __doc__, HUB, AIME).parse_args(arguments), TRAIN, aime2024(BOXED))


if __name__ == "__main__":
    sys.exit(main())
