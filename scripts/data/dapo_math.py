"""DAPO-Math-17k for verl: train.parquet and, for validation, aime2024.parquet.

    .venv/bin/python scripts/data/dapo_math.py

Scored by verl's `math_dapo`: 1 or -1 for a line `Answer: ...`. The published file has each of its 17,917 rows 100
times; some of these have the same problem again. Columns that a file of your own needs, of both sources: `prompt`, a
list of one message {role, content}; `reward_model`, with the answer, an integer as text, in `ground_truth`.
"""

import sys

from dapo_format import COLUMNS, LINE, aime2024, reader
from prepare import Part, command

HUB = "BytedTsinghua-SIA/DAPO-Math-17k"
TRAIN = Part(name="train", hub=HUB, columns=COLUMNS, read=reader(LINE, "math_dapo"))
main = command("dapo_math", __doc__, TRAIN, aime2024(LINE))

if __name__ == "__main__":
    sys.exit(main())
