#!/usr/bin/env bash
# Made by scripts/make_recipes.py: run_qwen2.5_14b_dapo.sh, and what differs. Change those, or a copy of this.
# GRPO with DARTS | Qwen2.5-VL-3B-Instruct (vision) | Geometry3K | FSDP2 and vLLM
# Our choice of settings; the paper has no vision run.
# Composed and checked on CPUs; not run on GPUs yet.
#
#   .venv/bin/python scripts/data/geo3k.py                                 the data, once
#   bash recipe/darts/run_qwen2.5_vl_3b_geo3k.sh                           one node of 8 GPUs
#   bash recipe/darts/run_qwen2.5_vl_3b_geo3k_baseline.sh                  plain verl, all else the same
#   PLACEMENT=disaggregated bash recipe/darts/run_qwen2.5_vl_3b_geo3k.sh   half of each node serves
# Hydra overrides come last; other settings, another folder:
#   OUTPUT_DIR=outputs/try_qwen2.5_vl_3b_geo3k bash recipe/darts/run_qwen2.5_vl_3b_geo3k.sh trainer.total_training_steps=2
set -xeuo pipefail

########################### user-adjustable ###########################
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}
DATA_DIR=${DATA_DIR:-$HOME/data}
TRAIN_FILES=${TRAIN_FILES:-$DATA_DIR/geo3k/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA_DIR/geo3k/test.parquet}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/qwen2.5_vl_3b_geo3k}  # a run goes on from its last checkpoint
NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

TRAIN_PROMPTS=${TRAIN_PROMPTS:-128}  # a step
MINI_BATCH_PROMPTS=${MINI_BATCH_PROMPTS:-32}  # an update of the weights
MAX_PROMPT=${MAX_PROMPT:-2048}
MAX_RESPONSE=${MAX_RESPONSE:-2048}
TOTAL_STEPS=${TOTAL_STEPS:-200}
ULYSSES=${ULYSSES:-1}  # sequence parallel
# Packed rows want flash-attn; without it ATTENTION=sdpa and actor_rollout_ref.model.use_remove_padding=False.
ATTENTION=${ATTENTION:-flash_attention_2}
ROLLOUT_TP=${ROLLOUT_TP:-1}
OFFLOAD=${OFFLOAD:-False}  # weights and optimizer to the CPU while they are not used
LOGGER=${LOGGER:-[console,file]}  # [console,file,wandb]

# DARTS; *_baseline.sh sets the first. Which to choose: docs/tuning.md; the paper's ablation: docs/reproduction.md.
DARTS_ENABLE=${DARTS_ENABLE:-True}
PLACEMENT=${PLACEMENT:-colocated}       # disaggregated: servers on GPUs of their own, training on the others
ROLLOUT_GPUS_PER_NODE=${ROLLOUT_GPUS_PER_NODE:-$((GPUS_PER_NODE / 2))}  # where disaggregated
GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-$([[ $PLACEMENT == disaggregated ]] && echo 0.85 || echo 0.6)}  # of a server
STRATEGY=${STRATEGY:-darts}             # or what to compare with: none, bypass, shortest_k, tail_batching, sorted
ALLOCATION=${ALLOCATION:-adaptive}      # uniform: the same number of candidates for all; off: no redundancy
MEAN_CANDIDATES=${MEAN_CANDIDATES:-10.5}  # of a prompt; null: what the utility says (docs/tuning.md)
MAX_CANDIDATES=${MAX_CANDIDATES:-16}    # M_up
NUM_LONG=${NUM_LONG:-1}                 # L; K = 8 - L
SELECTION=${SELECTION:-auto}            # dual_end, shortest_only: for all prompts
LONG_WAIT=${LONG_WAIT:-all}             # deadline: long ones among those that end in time
EARLY_STOP=${EARLY_STOP:-eager}         # exact, off
OVERLAP=${OVERLAP:-auto}                # log-probs during generation: off, sequence, token
########################### end user-adjustable ###########################

OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR")
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)}
MAX_LEN=$((MAX_PROMPT + MAX_RESPONSE))
TRAIN_GPUS_PER_NODE=$GPUS_PER_NODE
if [[ $PLACEMENT == disaggregated ]]; then TRAIN_GPUS_PER_NODE=$((GPUS_PER_NODE - ROLLOUT_GPUS_PER_NODE))
else ROLLOUT_GPUS_PER_NODE=$GPUS_PER_NODE; fi

ALGORITHM=(algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False)
DATA=(
    data.image_key=images
    data.train_files="$TRAIN_FILES" data.val_files="$VAL_FILES"
    data.train_batch_size="$TRAIN_PROMPTS" data.max_prompt_length="$MAX_PROMPT" data.max_response_length="$MAX_RESPONSE"
    data.filter_overlong_prompts=True data.filter_overlong_prompts_workers=8 data.truncation=error
)
REWARD=(
    reward.reward_manager.name=naive
)
MODEL=(
    actor_rollout_ref.model.path="'$MODEL_PATH'"
    actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.model.enable_gradient_checkpointing=True
    ++actor_rollout_ref.model.override_config.attn_implementation="$ATTENTION"
)
ACTOR=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_PROMPTS"
    actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$MAX_LEN"
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.weight_decay=0.1 actor_rollout_ref.actor.optim.clip_grad=1.0
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.ulysses_sequence_parallel_size="$ULYSSES"
    actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD"
    actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD"
)
ROLLOUT=(
    actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
    actor_rollout_ref.rollout.max_model_len="$MAX_LEN" actor_rollout_ref.rollout.max_num_batched_tokens=16384
    actor_rollout_ref.rollout.max_num_seqs=512 actor_rollout_ref.rollout.agent.num_workers="$((8 * NNODES))"
    actor_rollout_ref.rollout.gpu_memory_utilization="$GPU_MEMORY_UTILIZATION"
    actor_rollout_ref.rollout.nnodes="$NNODES" actor_rollout_ref.rollout.n_gpus_per_node="$ROLLOUT_GPUS_PER_NODE"
    actor_rollout_ref.rollout.val_kwargs.n=1 actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 actor_rollout_ref.rollout.val_kwargs.top_p=0.7
)
TRAINER=(
    trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$TRAIN_GPUS_PER_NODE"
    trainer.total_training_steps="$TOTAL_STEPS" trainer.total_epochs=1000  # the number of steps decides
    trainer.save_freq=20 trainer.max_actor_ckpt_to_keep=2 trainer.test_freq=20 trainer.resume_mode=auto
    trainer.project_name=darts trainer.experiment_name="'$(basename "$OUTPUT_DIR")'" trainer.logger="$LOGGER"
    trainer.default_local_dir="'$OUTPUT_DIR'" hydra.run.dir="'$OUTPUT_DIR/hydra'"
    # A file for each start: verl's logger begins anew when a run goes on.
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH="'$OUTPUT_DIR/metrics-$(date +%Y%m%d-%H%M%S).jsonl'"
)
DARTS=(
    darts.enable="$DARTS_ENABLE" darts.placement="$PLACEMENT" darts.strategy="$STRATEGY"
    darts.allocation.mode="$ALLOCATION" darts.allocation.high="$MAX_CANDIDATES"
    darts.allocation.mean_candidates="$MEAN_CANDIDATES"
    darts.selection.num_long="$NUM_LONG" darts.selection.mode="$SELECTION" darts.selection.long_wait="$LONG_WAIT"
    darts.early_stop="$EARLY_STOP" darts.overlap.mode="$OVERLAP"
)

"$PYTHON" -m recipe.darts.main_darts "${ALGORITHM[@]}" "${DATA[@]}" "${REWARD[@]}" "${MODEL[@]}" "${ACTOR[@]}" \
    "${ROLLOUT[@]}" "${TRAINER[@]}" "${DARTS[@]}" "$@"
