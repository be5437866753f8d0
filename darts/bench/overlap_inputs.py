"""What the run of `darts.bench.overlap` starts from: an untrained model, and prompts that say how long responses are.

Contract: needs torch and transformers, not verl. The model is of the testbeds' kind (their tokenizer, Qwen2, float32)
with sizes of its own; the prompts are those of the testbed `overthink`.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from darts.bench.prompts import train_questions
from darts.testbed.model import build_model, build_tokenizer

RECORDS = "records.jsonl"
"""Where the run puts its figures."""


def write_inputs(folder: Path, batches: list[tuple[str, list[list[int]]]], hidden: int, layers: int) -> None:
    """Writes an untrained model of the testbeds' kind, and prompts with the lengths of their candidates.

    Args:
        folder: Gets `model/` and `train.parquet`.
        batches: Workload and, for each prompt, the length of each candidate's response; in the order of the steps.
        hidden: Hidden size of the model, a multiple of 64.
        layers: Of the model.
    """
    tokenizer, questions = build_tokenizer(), iter(train_questions("overthink"))
    small = build_model(tokenizer, seed=0)
    sizes = {
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config.from_dict(small.config.to_dict() | sizes | {"layer_types": None}))
    model.generation_config = small.generation_config
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "darts/overlap",
            "prompt": [{"role": "user", "content": next(questions)}],
            "ability": "arithmetic",
            "reward_model": {"style": "rule", "ground_truth": "0"},
            "extra_info": {"index": number, "split": "train", "workload": workload, "lengths": lengths},
        }
        for number, (workload, lengths) in enumerate((workload, one) for workload, batch in batches for one in batch)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
