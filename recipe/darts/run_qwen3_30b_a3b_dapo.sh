#!/usr/bin/env bash
# Made by scripts/make_recipes.py: the body of run_qwen2.5_14b_dapo.sh, and what differs. Change those, or a copy of this.
# GRPO with DARTS | Qwen3-30B-A3B (MoE) | DAPO-Math-17k, AIME-2024 | FSDP2 and vLLM
# The paper's settings (arXiv 2605.30859); docs/reproduction.md says which are its own and which are our choice.
# Composed and checked on CPUs; not run on GPUs yet. Hydra overrides come last; other settings, another OUTPUT_DIR.
#   .venv/bin/python scripts/data/prepare.py dapo_math                    the data, once
#   bash recipe/darts/run_qwen3_30b_a3b_dapo.sh                           8 nodes of 8 GPUs
#   bash recipe/darts/run_qwen3_30b_a3b_dapo_baseline.sh                  plain verl, all else the same
#   PLACEMENT=disaggregated bash recipe/darts/run_qwen3_30b_a3b_dapo.sh   as in the paper: half of each node serves
set -xeuo pipefail

# Knobs: what stands as ${...:-default} may be set in the environment. What all recipes share is in configs/recipe/.
OUTPUT_DIR=$(realpath -m "${OUTPUT_DIR:-outputs/qwen3_30b_a3b_dapo}")  # a run goes on from its last checkpoint
DATA_DIR=${DATA_DIR:-$HOME/data}
NNODES=${NNODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MAX_PROMPT=${MAX_PROMPT:-2048}
MAX_RESPONSE=${MAX_RESPONSE:-16384}
MAX_LEN=$((MAX_PROMPT + MAX_RESPONSE))
OFFLOAD=${OFFLOAD:-True}  # weights and optimizer to the CPU while they are not used
PLACEMENT=${PLACEMENT:-colocated}  # disaggregated: servers on GPUs of their own, training on the others
TRAIN_GPUS=$GPUS_PER_NODE SERVE_GPUS=$GPUS_PER_NODE
if [[ $PLACEMENT == disaggregated ]]; then
    SERVE_GPUS=${ROLLOUT_GPUS_PER_NODE:-$((GPUS_PER_NODE / 2))}
    TRAIN_GPUS=$((GPUS_PER_NODE - SERVE_GPUS))
    GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.85}  # of a server
fi
PYTHON=${PYTHON:-$(command -v "$(realpath "$(dirname "${BASH_SOURCE[0]}")")/../../.venv/bin/python" || echo python3)}

DATA=(
    data.train_files="${TRAIN_FILES:-$DATA_DIR/dapo_math/train.parquet}"
    data.val_files="${VAL_FILES:-$DATA_DIR/dapo_math/aime2024.parquet}"
    data.train_batch_size="${TRAIN_PROMPTS:-256}"  # a step
    data.max_prompt_length="$MAX_PROMPT" data.max_response_length="$MAX_RESPONSE"
    reward.reward_kwargs.overlong_buffer_cfg.len="$((MAX_RESPONSE / 2))"
)
MODEL=(
    actor_rollout_ref.model.path="'${MODEL_PATH:-Qwen/Qwen3-30B-A3B}'"
    # Packed rows want flash-attn; without it ATTENTION=sdpa ULYSSES=1 is right, and slow.
    ++actor_rollout_ref.model.override_config.attn_implementation="${ATTENTION:-flash_attention_2}"
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$MAX_LEN"
    actor_rollout_ref.actor.ppo_mini_batch_size="${MINI_BATCH_PROMPTS:-32}"  # an update of the weights
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.ulysses_sequence_parallel_size="${ULYSSES:-4}"
    actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD"
    actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD"
    actor_rollout_ref.rollout.tensor_model_parallel_size="${ROLLOUT_TP:-4}"
    actor_rollout_ref.rollout.max_model_len="$MAX_LEN" actor_rollout_ref.rollout.agent.num_workers="$((8 * NNODES))"
    actor_rollout_ref.rollout.gpu_memory_utilization="${GPU_MEMORY_UTILIZATION:-0.6}"
    actor_rollout_ref.rollout.nnodes="$NNODES" actor_rollout_ref.rollout.n_gpus_per_node="$SERVE_GPUS"
)
TRAINER=(
    trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$TRAIN_GPUS" trainer.total_training_steps="${TOTAL_STEPS:-500}"
    trainer.default_local_dir="'$OUTPUT_DIR'" trainer.experiment_name="'$(basename "$OUTPUT_DIR")'"
    trainer.logger="${LOGGER:-[console,file]}"  # [console,file,wandb]
)
DARTS=(  # Which to choose: docs/tuning.md; the paper's ablation: docs/reproduction.md.
    darts.enable="${DARTS_ENABLE:-True}" darts.placement="$PLACEMENT"
    darts.strategy="${STRATEGY:-darts}"  # or what to compare with: none, bypass, shortest_k, tail_batching, sorted
    darts.preset="${PRESET:-paper}"  # paper: the method as published; fast. What is null below is as it says
    darts.allocation.mode="${ALLOCATION:-null}"  # adaptive; uniform: as many for all prompts; off: no redundancy
    darts.allocation.mean_candidates="${MEAN_CANDIDATES:-null}"  # of a prompt: a number, utility, plan
    darts.allocation.high="${MAX_CANDIDATES:-16}" darts.selection.num_long="${NUM_LONG:-1}"  # M_up; L (K = 8 - L)
    darts.selection.mode="${SELECTION:-null}"  # auto; dual_end, shortest_only: for all prompts
    darts.selection.long_end="${LONG_END:-null}"  # what the longest may be: finished, truncated, cut
    darts.selection.long_wait="${LONG_WAIT:-null}"  # what a dual-end group waits for: all, deadline, none
    darts.spare_prompts="${SPARE_PROMPTS:-null}"  # launched beyond TRAIN_PROMPTS: a share of it, plan
    darts.bypass="${BYPASS:-null}"  # True: the servers' log-probs are the old ones
    darts.early_stop="${EARLY_STOP:-eager}"  # exact, off
    darts.overlap.mode="${OVERLAP:-auto}"  # log-probs during generation: off, sequence, token
)

"$PYTHON" -m recipe.darts.main_darts +recipe=dapo "${DATA[@]}" "${MODEL[@]}" "${TRAINER[@]}" "${DARTS[@]}" "$@"
