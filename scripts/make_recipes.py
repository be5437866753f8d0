"""Writes recipe/darts/run_*.sh, each with its baseline twin. A script stays whole, since people copy one, but only one
is written by hand: below its head, run_qwen2.5_14b_dapo.sh is the template, and the table here says how each recipe
differs from it. After a change of the template or the table, from the repository's root:

    .venv/bin/python scripts/make_recipes.py           writes them
    .venv/bin/python scripts/make_recipes.py --check   exit code 1 if one is not what would be written
"""

import argparse
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipe" / "darts"
TEMPLATE = "qwen2.5_14b_dapo"
START = "set -xeuo pipefail\n"  # ends the head
PAPER = "The paper's settings (arXiv 2605.30859); docs/reproduction.md says which are its own and which are our choice."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs from the template."""

    model: str  # of Qwen's, its first word; the rest is for the head
    cluster: str = "one node of 8 GPUs"
    data: str = "dapo_math/aime2024"  # what scripts/data/prepare.py makes, and its validation file
    data_title: str = "DAPO-Math-17k, AIME-2024"
    prepare_options: str = ""
    engines: str = "FSDP2 and vLLM"
    note: str = PAPER
    disaggregated: str | None = "as in the paper: half of each node serves"  # None: the recipe has no placement
    changes: dict[str, str] = field(default_factory=dict)
    """New text by its place: a knob's default by NAME, a setting's value by a.b.c, lines by how the old ones begin."""


ONE_NODE = {"NNODES": "1", "OFFLOAD": "False"}
OUR_CHOICE = ONE_NODE | {"TOTAL_STEPS": "200"}
NO_SHAPING = {"reward.reward_kwargs.": "", "+recipe": "base"}
EIGHT_NODES = {"NNODES": "8"}

RECIPES = {
    "qwen2.5_0.5b_gsm8k": Recipe(
        model="Qwen2.5-0.5B-Instruct", data="gsm8k/test", data_title="GSM8K", engines="one GPU, FSDP2 and vLLM",
        note="The smallest run with a real model. "
        "Responses are short here: it shows that all works, not what DARTS is for.",
        cluster="one GPU of 24 GB or more", disaggregated=None,
        changes=OUR_CHOICE | NO_SHAPING | {
            "GPUS_PER_NODE": "1", "TRAIN_PROMPTS": "64", "MAX_PROMPT": "512", "MAX_RESPONSE": "1024", "ULYSSES": "1",
            "# Packed rows": "    # flash_attention_2 where flash-attn is installed: faster.\n",
            "ATTENTION": "sdpa", "ROLLOUT_TP": "1",
            "PLACEMENT=": "", "TRAIN_GPUS=$GPUS": "", "if [[ $PLACEMENT": "",
            "SERVE_GPUS=${": "", "TRAIN_GPUS=$((": "", "GPU_MEMORY_UTILIZATION=": "", "fi": "",
            "actor_rollout_ref.rollout.gpu_memory_utilization": "0.4", "actor_rollout_ref.rollout.nnodes=": "",
            "trainer.n_gpus_per_node": '"$GPUS_PER_NODE"',
            "darts.enable=": '    darts.enable="${DARTS_ENABLE:-True}"\n',
        },
    ),
    "qwen2.5_3b_math": Recipe(
        model="Qwen2.5-3B", data="math_lighteval/test", data_title="MATH-lighteval",
        changes=ONE_NODE | {
            "ROLLOUT_TP": "2", "MODEL=(": "MODEL=(\n    actor_rollout_ref.rollout.val_kwargs.n=1\n",
        },
    ),
    "qwen2.5_math_7b_dapo": Recipe(
        model="Qwen2.5-Math-7B",
        changes=ONE_NODE | {
            "MODEL=(": """MODEL=(
    # The model was made for 4,096 positions; trainer and server are told that it takes what a response needs.
    +actor_rollout_ref.model.override_config.max_position_embeddings="$MAX_LEN"
    +actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.max_position_embeddings="$MAX_LEN"
""",
        },
    ),
    "qwen2.5_14b_dapo": Recipe(model="Qwen2.5-14B", cluster="4 nodes of 8 GPUs: the paper's ablation"),
    "qwen2.5_32b_dapo": Recipe(model="Qwen2.5-32B", cluster="8 nodes of 8 GPUs", changes=EIGHT_NODES),
    "qwen3_30b_a3b_dapo": Recipe(
        model="Qwen3-30B-A3B (MoE)", cluster="8 nodes of 8 GPUs", changes=EIGHT_NODES | {"MAX_RESPONSE": "16384"}
    ),
    "qwen3_30b_a3b_dapo_megatron": Recipe(
        model="Qwen3-30B-A3B (MoE)", cluster="8 nodes of 8 GPUs", engines="Megatron and vLLM",
        note="As run_qwen3_30b_a3b_dapo.sh, trained by Megatron (verl's model_engine=megatron, no code of ours; how to "
        "install it: recipe/darts/README.md). Log-probs are not overlapped: that is written for FSDP, and OVERLAP=auto "
        "turns it off.",
        changes=EIGHT_NODES | {
            "MAX_RESPONSE": "16384",
            "# Packed rows": "", "++actor_rollout_ref.model.override_config.attn_implementation=": "",
            "actor_rollout_ref.actor.strategy=": "    model_engine=megatron\n",
            "actor_rollout_ref.actor.fsdp_config.": """\
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size="${ACTOR_TP:-4}"
    actor_rollout_ref.actor.megatron.expert_model_parallel_size="${ACTOR_EP:-8}"  # experts
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size="${ACTOR_PP:-1}"
    actor_rollout_ref.actor.megatron.expert_tensor_parallel_size=1
    actor_rollout_ref.actor.megatron.param_offload="$OFFLOAD"
    actor_rollout_ref.actor.megatron.optimizer_offload="$OFFLOAD"
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
""",
        },
    ),
    "qwen2.5_vl_3b_geo3k": Recipe(
        model="Qwen2.5-VL-3B-Instruct (vision)", data="geo3k/test", data_title="Geometry3K",
        note="Our choice of settings; the paper has no vision run.", disaggregated="half of each node serves",
        changes=OUR_CHOICE | NO_SHAPING | {
            "TRAIN_PROMPTS": "128", "MAX_RESPONSE": "2048", "ULYSSES": "1", "ROLLOUT_TP": "1",
            "# Packed rows": """\
    # Packed rows want flash-attn; without it ATTENTION=sdpa and actor_rollout_ref.model.use_remove_padding=False.
""",
            "DATA=(": "DATA=(\n    data.image_key=images\n",
        },
    ),
    "qwen2.5_7b_eurus2": Recipe(
        model="Qwen2.5-7B-Instruct", data="eurus2/validation", data_title="code of Eurus-2-RL-Data",
        prepare_options=" --ability code",
        note="Our choice of settings; the paper has no code run. Generated programs are run: in processes of their own "
        "on the nodes, or in a sandbox with SANDBOX_URL (https://github.com/bytedance/SandboxFusion), which is the "
        "safe way, but judges functions whose expected value is a list as wrong (read in verl 0.9.1, not run).",
        disaggregated="half of each node serves",
        changes=OUR_CHOICE | NO_SHAPING | {
            "TRAIN_PROMPTS": "128", "ULYSSES": "2", "ROLLOUT_TP": "2",
            "reward.reward_kwargs.": """\
    # Programs take their time: they run in processes of their own, or in the sandbox.
    reward.reward_manager.name="$([[ ${SANDBOX_URL:-null} == null ]] && echo remote || echo naive)"
    reward.sandbox_fusion.url="${SANDBOX_URL:-null}"
    reward.num_workers="${REWARD_WORKERS:-4}"  # their square is what programs take of CPUs, without a sandbox
    darts.reward.pool=True  # scored as they end: a slow reward does not wait for its group
""",
        },
    ),
}  # fmt: skip


def main() -> str | None:
    """The command returns what is wrong, which Python prints and ends with code 1, or None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    template_body = (FOLDER / f"run_{TEMPLATE}.sh").read_text().split(START)[1]
    made = {}
    for name, recipe in RECIPES.items():
        made[FOLDER / f"run_{name}.sh"] = head(name, recipe) + START + changed(template_body, name, recipe)
        made[FOLDER / f"run_{name}_baseline.sh"] = baseline(name)
    if options.check:
        stored = {path: path.read_text() for path in FOLDER.glob("run_*.sh")}
        wrong_names = sorted(path.name for path in made.keys() | stored.keys() if made.get(path) != stored.get(path))
        return f"{', '.join(wrong_names)}: not what scripts/make_recipes.py makes" if wrong_names else None
    for path, script_text in made.items():
        path.write_text(script_text)
        path.chmod(0o755)
    return None


def head(name: str, recipe: Recipe) -> str:
    """The comment that opens a script."""
    launch_command, data_name = f"bash recipe/darts/run_{name}", recipe.data.split("/")[0]
    commands = {
        f".venv/bin/python scripts/data/prepare.py {data_name}{recipe.prepare_options}": "the data, once",
        f"{launch_command}.sh": recipe.cluster,
        f"{launch_command}_baseline.sh": "plain verl, all else the same",
    }
    if recipe.disaggregated:
        commands[f"PLACEMENT=disaggregated {launch_command}.sh"] = recipe.disaggregated
    command_width = max(map(len, commands))
    template = f"run_{TEMPLATE}.sh"
    origin = (
        f"Made by scripts/make_recipes.py: the body of {template}, and what differs. Change those, or a copy of this."
    )
    if name == TEMPLATE:
        origin = (
            "The template of the others: after a change below the head run scripts/make_recipes.py, or change a copy."
        )
    command_lines = "".join(f"#   {command:{command_width}}   {meaning}\n" for command, meaning in commands.items())
    return f"""#!/usr/bin/env bash
# {origin}
# GRPO with DARTS | {recipe.model} | {recipe.data_title} | {recipe.engines}
{textwrap.fill(recipe.note, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)}
# Composed and checked on CPUs; not run on GPUs yet. Hydra overrides come last; other settings, another OUTPUT_DIR.
{command_lines}"""


def changed(body: str, name: str, recipe: Recipe) -> str:
    """The template's body with the recipe's changes.

    Raises:
        ValueError: a change has no place there, or several.
    """
    data_folder, validation_file = recipe.data.split("/")
    recipe_changes = {
        "MODEL_PATH": f"Qwen/{recipe.model.split()[0]}",
        "TRAIN_FILES": f"$DATA_DIR/{data_folder}/train.parquet",
        "VAL_FILES": f"$DATA_DIR/{data_folder}/{validation_file}.parquet",
        "OUTPUT_DIR": f"outputs/{name}",
    }
    for place, new_text in (recipe_changes | recipe.changes).items():
        if re.fullmatch(r"[A-Z_]+", place):
            place_pattern = rf"(?<=\${{{place}:-)[^}}]*(?=}})"
        elif re.fullmatch(r"\+\w+|\w+(\.\w+)+", place):
            place_pattern = rf"(?<= {re.escape(place)}=)\S+"
        else:
            place_pattern = rf"(?:^ *{re.escape(place)}.*\n)+"
        body, place_count = re.subn(place_pattern, lambda _, text=new_text: text, body, flags=re.M)
        if place_count != 1:
            raise ValueError(f"{name}: {place!r} has {place_count} places in run_{TEMPLATE}.sh; it must have one")
    return body


def baseline(name: str) -> str:
    """The twin in plain verl."""
    return f"""#!/usr/bin/env bash
# Made by scripts/make_recipes.py: run_{name}.sh in plain verl; darts.enable is all that differs.
export DARTS_ENABLE=False OUTPUT_DIR=${{OUTPUT_DIR:-outputs/{name}_baseline}}
exec bash "${{BASH_SOURCE[0]%_baseline.sh}}.sh" "$@"
"""


if __name__ == "__main__":
    sys.exit(main())
