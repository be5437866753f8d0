r"""Rows as in DAPO-Math-17k and AIME-2024, which come with instructions in the prompt; validation on AIME-2024.

Schema (recipe/dapo/prepare_dapo_data.sh and the rows of the published files): `prompt`, one message of the user;
`reward_model.ground_truth`, an integer as text. DAPO-Math-17k has every row 100 times, AIME-2024 32 times: verl's
`actor_rollout_ref.rollout.val_kwargs.n=32` samples each of the 30 problems as often.
"""

import re
from collections.abc import Callable

from math_lighteval import HUB as BOXED_SCORER
from prepare import Command, Example, Part, PreparedRow, UnusableRow, command, text, user

AIME = "BytedTsinghua-SIA/AIME-2024"
COLUMNS = {"prompt": "messages", "reward_model.ground_truth": "text"}
LINE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
"""The prompt in both datasets: verl's `math_dapo` looks for a line `Answer: ...`."""
BOXED = "{}\n\nThink step by step. The last line of your response must be\nAnswer: \\boxed{{your answer}}"
r"""For answers in LaTeX: verl's `math_reward` looks for \boxed{} and, unlike `math_dapo`, knows that \dfrac is \frac.
`math_dapo` understands such a line too, so that training and validation have the same prompt."""
_LINE = re.compile(re.escape(LINE).replace(r"\{\}", "(.*)"), re.DOTALL)


def reader(template: str, data_source: str) -> Callable[[Example], PreparedRow]:
    """Reads rows of both datasets, with instructions of its own."""

    def read(example: Example) -> PreparedRow:
        prompt_messages = example["prompt"] or []
        if len(prompt_messages) != 1:
            raise UnusableRow("with another number of messages than one")
        prompt_text = text(prompt_messages[0], "content")
        template_match = _LINE.fullmatch(prompt_text)
        question = template_match[1].strip() if template_match else prompt_text
        answer = text(example, "reward_model.ground_truth")
        prompt = user(template.format(question))
        return PreparedRow(question=question, prompt=prompt, answer=answer, data_source=data_source)

    return read


def aime2024(template: str) -> Part:
    """The validation set; verl scores a data source whose name begins with ``aime`` with `math_dapo`."""
    return Part(name="aime2024", hub=AIME, columns=COLUMNS, read=reader(template, "aime2024"))


def boxed_command(name: str, description: str, hub: str, *, question: str, answer: str) -> Command:
    """The script for a dataset with these two columns, whose answers are in LaTeX."""

    def read(example: Example) -> PreparedRow:
        problem = text(example, question)
        prompt = user(BOXED.format(problem))
        return PreparedRow(question=problem, prompt=prompt, answer=text(example, answer), data_source=BOXED_SCORER)

    train_part = Part(name="train", hub=hub, columns={question: "text", answer: "text"}, read=read)
    return command(name, description, train_part, aime2024(BOXED))
