#!/usr/bin/env bash
# Made by scripts/make_recipes.py: run_qwen2.5_3b_math.sh in plain verl; darts.enable is all that differs.
export DARTS_ENABLE=False OUTPUT_DIR=${OUTPUT_DIR:-outputs/qwen2.5_3b_math_baseline}
exec bash "${BASH_SOURCE[0]%_baseline.sh}.sh" "$@"
