#!/usr/bin/env bash
# Sets up .venv and runs the tests. The last line says how it went.
#
#   scripts/test.sh                  tiers unit, contract, actor, ray, engine, e2e without the slow tests
#   scripts/test.sh --full           the slow tests too, and more examples of properties
#   scripts/test.sh tests/unit -x    anything else goes to pytest
#
# Whole tiers run in two lanes (tests/conftest.py) if 14 GB of memory are free. What is chosen by anything but --full and
# -x runs in one, in order.
#
# DARTS_TEST_TIMEOUT=seconds   for all of pytest; default 4800, with --full 20000
# DARTS_JUNIT=file.xml         where to leave a JUnit report
set -Eeuo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

end_own_processes() {
  local pids round
  [[ -n $group ]] || return 0
  for round in {1..80}; do
    pids=$(grep -lszx "$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) || true
    [[ -z $pids ]] && break
    # Ray takes a moment to end by itself: 4 s untouched, then SIGTERM, after 3 s more SIGKILL.
    if ((round == 40)); then
      say "ending what the tests left running: $(ps -o comm= -p "$(paste -sd, <<<"$pids")" | paste -sd ' ')"
      xargs -r kill -TERM <<<"$pids" 2>/dev/null || true
    elif ((round == 70)); then
      xargs -r kill -KILL <<<"$pids" 2>/dev/null || true
    fi
    sleep 0.1
  done
  kill -KILL -- "-$group" 2>/dev/null || true
}

count() { sed -nE "1,3s/.*<testsuite [^>]*\b$1=\"([0-9]+)\".*/\1/p" "$work/junit.xml" 2>/dev/null | head -n 1; }

# One function, so that bash has read all of this file before a `git pull` may change it.
main() {
  limit=4800 tiers="fast tiers" lanes=(-n 2)
  (($(awk '/^MemAvailable/ { print int($2 / 1e6) }' /proc/meminfo) >= 14)) || lanes=()
  for argument in "$@"; do
    case $argument in
      --full) limit=20000 tiers="all tiers" ;;
      -x) ;;
      *) lanes=() ;;
    esac
  done
  limit=${DARTS_TEST_TIMEOUT:-$limit}
  junit=${DARTS_JUNIT:+$(realpath -m "$DARTS_JUNIT")}

  "$ROOT/scripts/setup.sh"
  cd "$ROOT"

  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
  export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 WANDB_MODE=disabled
  export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 TOKENIZERS_PARALLELISM=false
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

  # Short, because Ray puts Unix sockets below it, whose paths may have 107 characters.
  work=$(mktemp -d /tmp/darts.XXXXXX)
  export RAY_TMPDIR="$work"

  # What belongs to this run carries this mark in its environment, wherever it was moved in the process tree.
  mark="DARTS_TEST_RUN=$$.$RANDOM"
  group="" interrupted=""
  trap 'interrupted=1; [[ -n $group ]] && kill -INT "$group" 2>/dev/null' INT TERM HUP

  # Job control gives pytest a process group of its own. SIGINT makes it end its fixtures in order.
  set -m
  env --default-signal=INT "$mark" timeout --signal=INT --kill-after=60 "$limit" \
    "$PYTHON" -m pytest --durations=10 --junitxml="$work/junit.xml" "${lanes[@]}" "$@" </dev/null &
  group=$!
  set +m

  status=0
  wait "$group" || status=$?
  while kill -0 "$group" 2>/dev/null; do status=0; wait "$group" || status=$?; done
  end_own_processes

  counts="" kept=""
  if [[ -s $work/junit.xml ]]; then
    counts=" ($(count tests) tests, $(count failures) failed, $(count errors) errors, $(count skipped) skipped)"
    if [[ -n $junit ]]; then mkdir -p "$(dirname "$junit")" && cp "$work/junit.xml" "$junit"; fi
  fi
  if ((status == 0)); then rm -rf "$work"; else kept="; Ray's logs: $work"; fi
  case $status in
    0) verdict=passed ;;
    5) verdict="failed: no test was selected" ;;
    124 | 137) verdict="failed: over $limit s" ;;
    *) verdict=failed ;;
  esac
  if [[ -n $interrupted ]]; then verdict=interrupted; ((status == 0)) && status=130; fi
  say "$verdict: $tiers$counts in $SECONDS s$kept"
  exit "$status"
}

main "$@"
