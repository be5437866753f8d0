r"""DeepScaleR-Preview for verl: train.parquet and, for validation, aime2024.parquet.

    .venv/bin/python scripts/data/deepscaler.py

Scored by verl's `math_reward`, which compares what stands in the last \boxed{}; verl finds it by the data source of
MATH. Schema (card of agentica-org/DeepScaleR-Preview-Dataset): `problem`, `answer`, empty in a few rows.
"""

import sys

from dapo_format import boxed_command

HUB = "agentica-org/DeepScaleR-Preview-Dataset"
main = boxed_command("deepscaler", __doc__, HUB, question="problem", answer="answer")

if __name__ == "__main__":
    sys.exit(main())
