"""GSM8K for verl: train.parquet and test.parquet.

    .venv/bin/python scripts/data/gsm8k.py

Scored by verl's `gsm8k`, which compares the number after `####` as text, without commas. Dropped: solutions without
one. Schema (card of openai/gsm8k, config main): `question`; `answer`, a solution that ends in `#### number`.
"""

import re
import sys

from prepare import Example, PreparedRow, UnusableRow, command, parts, text, user

HUB = "openai/gsm8k"
INSTRUCTION = 'Think step by step. Write the final answer, the number alone, after "####" on the last line.'
_FINAL = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)\.?\s*$")


def read(example: Example) -> PreparedRow:
    question = text(example, "question")
    final_number = _FINAL.search(text(example, "answer"))
    if not final_number:
        raise UnusableRow("without a number after ####")
    prompt = user(f"{question}\n\n{INSTRUCTION}")
    return PreparedRow(question=question, prompt=prompt, answer=final_number[1].replace(",", ""), data_source=HUB)


COLUMNS = {"question": "text", "answer": "text"}
main = command("gsm8k", __doc__, *parts("train", "test", hub=HUB, config="main", columns=COLUMNS, read=read))

if __name__ == "__main__":
    sys.exit(main())
