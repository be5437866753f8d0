"""The testbed's prompts, as the benches take them."""

import pyarrow.parquet

from darts.testbed import assets_dir


def train_questions(testbed: str) -> list[str]:
    """The testbed's train prompts, in their order."""

    rows = pyarrow.parquet.read_table(assets_dir(testbed) / "train.parquet", columns=["prompt"]).to_pylist()
    return [row["prompt"][0]["content"] for row in rows]
