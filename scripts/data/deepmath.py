r"""DeepMath-103K for verl: train.parquet and, for validation, aime2024.parquet.

    .venv/bin/python scripts/data/deepmath.py

Scored by verl's `math_reward`, which compares what stands in the last \boxed{}; verl finds it by the data source of
MATH. Schema (card of zwhe99/DeepMath-103K): `question`, `final_answer`; its solutions of R1 are not used.
"""

import sys

from dapo_format import boxed_command

HUB = "zwhe99/DeepMath-103K"
main = boxed_command("deepmath", __doc__, HUB, question="question", answer="final_answer")

if __name__ == "__main__":
    sys.exit(main())
