"""Measures the overlapped actor's forwards: chunks that continue cached prefixes, against computing everything again.

    python -m darts.bench actor --shape 0.5B --out outputs/prefix_chunks.json

Contract. One process, one data-parallel rank of `verl_patches.dp_actor.OverlappedActorWorker` with random weights, on
the device that verl finds (a GPU if there is one, bfloat16 there). In each repeat the same responses are computed in
three ways, all rows in one forward, in an order that rotates:

1. `whole`: once, complete, by verl's own forward, as after generation and in mode `sequence`;
2. `chunks`: as they grow, each chunk continuing the cached prefix (mode `token`);
3. `again`: as they grow, without a cache: with each chunk the response so far is forwarded anew by verl's forward.

Seconds are those between a call and its answer, the results being in host memory by then. Memory is the peak of what is
allocated on the device, weights included; on a CPU it is the process's. The first repeat warms up and is not counted.
The exit code is 1 if log-probs of the three ways differ by more than the rounding of the type.
"""

import argparse
import itertools
import os
import socket
import tempfile
from typing import Any

import numpy as np
import pandas as pd

from darts.bench import harness
from darts.bench.harness import Bench, FlatRecords, Save
from darts.evidence.log import say
from darts.evidence.tables import Check

WHOLE, CHUNKS, AGAIN = ARMS = ("whole", "chunks", "again")
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
"""Sizes of Qwen2.5-0.5B and -7B by their public configurations, and of a model for machines without a GPU."""
DIFFERENCE = {"fp32": 1e-4, "bf16": 0.1}
"""Mean absolute difference of a log-prob from that of `whole`, in nats. Random weights make large logits, and so large
rounding in bfloat16; `tests/actor` has the exact bounds."""


def build(shape: str, dtype: str, options: argparse.Namespace) -> Any:
    """The worker, alone in its process group, with a random model."""
    import torch
    from hydra import compose, initialize_config_module
    from transformers import AutoModelForCausalLM, Qwen2Config
    from verl.utils.device import get_device_name

    import verl_patches.register

    verl_patches.register.assert_active()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from verl_patches.dp_actor import OverlappedActorWorker

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        longest = options.prompt + options.response
        sizes = Qwen2Config(**SHAPES[shape], max_position_embeddings=longest)
        with torch.device(get_device_name()):  # a GPU draws 7B weights in a second, a CPU in minutes
            AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).save_pretrained(folder)
        role, fsdp = "actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config"
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", [
                f"actor_rollout_ref.model.path={folder}", "+actor_rollout_ref.model.load_tokenizer=false",
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
                f"actor_rollout_ref.model.use_remove_padding={options.remove_padding}",
                f"{role}.strategy={options.strategy}", f"{role}.ppo_micro_batch_size_per_gpu=1",
                f"{role}.use_torch_compile=false", f"{fsdp}.use_torch_compile=false", f"{fsdp}.model_dtype={dtype}",
                f"++{fsdp}.mixed_precision={{param_dtype: {dtype}, reduce_dtype: fp32, buffer_dtype: fp32}}",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
            ]).actor_rollout_ref  # fmt: skip
        worker = OverlappedActorWorker(config, role="actor")
        worker.role = "actor"  # no rollout
        worker.init_model()
    return worker


def forward(worker: Any, arm: str, step: int, tokens: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """One arm over `tokens` [rows, prompt and response]; what it took, and its log-probs."""
    from verl.utils.device import get_torch_device

    from darts.messages import RankCall, Row, SequenceKey, StepSettings

    torch_device = get_torch_device()
    torch_device.reset_peak_memory_stats()
    settings = StepSettings(step=step, mode="token" if arm == CHUNKS else "sequence", temperature=1.0)
    if refusal := worker.overlap_open(settings).refusal:
        raise harness.BenchError(f"the model cannot continue prefixes: {refusal}")
    length = tokens.shape[1]
    keys = [SequenceKey(f"{row}", 0) for row in range(len(tokens))]
    ends = [*range(options.prompt + options.chunk, length, options.chunk), length]
    spans = {WHOLE: [(0, length)], CHUNKS: list(zip([0, *ends], ends, strict=False)), AGAIN: [(0, end) for end in ends]}
    seconds, reports = [], []
    for number, (start, end) in enumerate(spans[arm]):
        last = end == length or arm == AGAIN
        rows = [
            Row(key=key, prompt_tokens=options.prompt, start=start, token_ids=row[start:end], last=last)
            for key, row in zip(keys, tokens, strict=True)
        ]
        call = RankCall(step=step, number=number, **{"growing" if arm == CHUNKS else "whole": rows})
        call_s, report = harness.seconds_of(lambda call=call: worker.overlap_extend(call))
        seconds.append(call_s)
        reports.append(report)
    values = worker.overlap_collect(step, keys).values
    worker.overlap_clear(step)
    return {
        "seconds": sum(seconds),
        "tokens": sum(report.tokens for report in reports),
        "peak_bytes": reports[-1].peak_cache_bytes,
        "device": torch_device.get_device_name(),
        "device_bytes": torch_device.max_memory_allocated(),
        "log_probs": np.concatenate([values[key]["old_log_probs"] for key in keys]),
    }


def measure(options: argparse.Namespace, save: Save) -> FlatRecords:
    """All repetitions of all arms."""
    from verl_patches.device import is_cpu_only

    dtype = options.dtype or ("fp32" if is_cpu_only() else "bf16")
    actor_worker = build(options.shape, dtype, options)
    say(f"{options.shape} in {dtype} is ready")
    steps = itertools.count(1)
    token_shape = (options.rows, options.prompt + options.response)

    def once(arm: str, repeat: int) -> dict[str, Any]:
        random_source = np.random.default_rng([options.seed, repeat + 1])
        token_table = random_source.integers(0, SHAPES[options.shape]["vocab_size"], token_shape).astype(np.int32)
        model_facts = {"shape": options.shape, "dtype": dtype}
        return model_facts | forward(actor_worker, arm, next(steps), token_table, options)

    def settle(found_records: dict[str, dict[str, Any]]) -> None:
        log_probs = {arm_name: flat_record.pop("log_probs") for arm_name, flat_record in found_records.items()}
        for arm_name, flat_record in found_records.items():
            flat_record["difference"] = float(np.abs(log_probs[arm_name] - log_probs[WHOLE]).mean())
            flat_record["tokens_of_whole"] = found_records[WHOLE]["tokens"]

    return harness.take_turns(harness.repetitions(options.repeats, "repeat"), ARMS, once, settle)


COLUMNS: harness.Columns = (
    ("seconds", lambda arm: f"{arm.mean('seconds'):.3f}"),
    ("over whole", lambda arm: arm.over("seconds")),
    ("tokens forwarded over whole", lambda arm: f"{arm.total('tokens') / arm.total('tokens_of_whole'):.2f}"),
    ("cache, GiB", lambda arm: f"{arm.known('peak_bytes').max() / 2**30:.2f}"),
    ("memory in all, GiB", lambda arm: f"{arm.known('device_bytes').max() / 2**30:.2f}"),
    ("difference, nats", lambda arm: f"{arm.known('difference').max():.1e}"),
)


def tables(records: pd.DataFrame) -> str:
    """Means and ratios over the repetitions."""
    return harness.arms_table(records, COLUMNS, ("repeat",), WHOLE)


def checks(records: pd.DataFrame) -> list[Check]:
    """The three ways agree."""
    worst, bound = records["difference"].max(), DIFFERENCE[records["dtype"].iloc[0]]
    return [Check(name="largest mean difference of log-probs, nats", value=worst, low=0, high=bound)]


BENCH = Bench(
    name="actor",
    about=__doc__,
    options={
        "--shape": ("tiny", "of the model", {"choices": SHAPES}),
        "--dtype": (None, "None: fp32 on a CPU, else bf16", {"choices": DIFFERENCE}),
        "--strategy": ("fsdp2", "of verl; fsdp needs a GPU", {"choices": ("fsdp", "fsdp2")}),
        "--rows": (8, "responses that grow together"),
        "--prompt": (128, "tokens"),
        "--response": (1024, "tokens"),
        "--chunk": (64, "tokens"),
        "--remove-padding": (False, "verl packs; needs flash-attention"),
        "--repeats": (5, "counted"),
        "--seed": (0, "of tokens"),
    },
    measure=measure,
    tables=tables,
    checks=checks,
)
