#!/usr/bin/env bash
# Made by scripts/make_recipes.py: run_qwen3_30b_a3b_dapo.sh in plain verl; darts.enable is all that differs.
export DARTS_ENABLE=False OUTPUT_DIR=${OUTPUT_DIR:-outputs/qwen3_30b_a3b_dapo_baseline}
exec bash "${BASH_SOURCE[0]%_baseline.sh}.sh" "$@"
