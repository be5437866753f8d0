#!/usr/bin/env bash
# Sets up .venv and trains the embedded testbed with DARTS: real verl, Ray and vLLM, on the CPU if there is no GPU.
#
#   scripts/quickstart.sh                                        ten steps
#   scripts/quickstart.sh darts.enable=false                     the same with plain verl
#   scripts/quickstart.sh darts.preset=fast                      the same with the other preset
#   scripts/quickstart.sh trainer.total_training_steps=30        any Hydra override
#
# DARTS_OUT=folder             where metrics, log, report and checkpoint go; default outputs/quickstart. The results of the run
#                              before are moved to previous/ in it; if this run ends before it has any, they stay, and its
#                              log is failed.log.
# DARTS_RESUME=1               goes on from the last checkpoint in that folder, if there is one, and makes such as can be resumed:
#                              one at the end, more with trainer.save_freq=steps
# DARTS_QUICKSTART_TIMEOUT=s   limit for the training; default 1200
set -Eeuo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

"$ROOT/scripts/setup.sh"

out=$(realpath -m "${DARTS_OUT:-$ROOT/outputs/quickstart}")
results=(metrics.jsonl metrics.earlier.jsonl run.log checkpoints hydra report)
mkdir -p "$out"
cd "$out"
for name in "${results[@]}"; do
  [[ ! -e $name || -e .quickstart ]] || die "$out/$name is not the quickstart's: choose another folder with DARTS_OUT"
done
# Whether the run that began when .quickstart was touched has logged metrics or saved a checkpoint.
has_results() { [[ -s metrics.jsonl || checkpoints/latest_checkpointed_iteration.txt -nt .quickstart ]]; }
set_aside() { # FOLDER COMMAND NAMES...: moves or copies there what is there of these
  mkdir "$1"
  for name in "${@:3}"; do if [[ -e $name ]]; then $2 "$name" "$1"; fi; done
}
move_back() { if [[ -e $1 ]]; then find "$1" -mindepth 1 -maxdepth 1 -exec mv -t . {} + && rmdir "$1"; fi; }
# The last run's results wait in .before, or as copies in .resumed if this run goes on with them; in .moving and .copying
# until they are there. If this run has results, the last ones are kept, one generation; otherwise they come back.
settle() {
  rm -rf .copying
  move_back .moving
  if has_results; then
    if compgen -G ".before/*" >/dev/null; then rm -rf previous && mv .before previous; fi
    rm -rf .before .resumed failed.log
  elif [[ -e .before || -e .resumed ]]; then
    if [[ -e run.log ]]; then mv run.log failed.log; fi
    rm -rf metrics.jsonl metrics.earlier.jsonl hydra
    if [[ -e .before ]]; then rm -rf checkpoints report; fi
    move_back .before
    move_back .resumed
  fi
}
settle # what a killed run left
platform=$("$PYTHON" -c 'from verl_patches.device import is_cpu_only; print("cpu" if is_cpu_only() else "gpu")')
touch .quickstart
resume=() interrupted=""
if [[ ${DARTS_RESUME:-} == 1 ]]; then
  last=$(cat checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo -1)
  if [[ -d checkpoints/global_step_$last ]] && ! compgen -G "checkpoints/global_step_$last/actor/model_world_size_*" >/dev/null; then
    die "$out/checkpoints/global_step_$last has no optimizer: only a run that began with DARTS_RESUME=1 can be resumed; unset it"
  fi
  resume=(trainer.resume_mode=auto "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]")
  set_aside .copying "cp -r" metrics.jsonl metrics.earlier.jsonl run.log hydra
  mv .copying .resumed
  if [[ -e metrics.jsonl ]]; then # verl's logger begins anew; the steps after the checkpoint come again
    awk -F '[:,]' -v last="$last" '$2 <= last' metrics.jsonl >>metrics.earlier.jsonl
    rm metrics.jsonl
  fi
else
  set_aside .moving mv "${results[@]}"
  mv .moving .before
fi
export VERL_FILE_LOGGER_PATH="$out/metrics.jsonl" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A Ray that happens to run on this machine is joined only if it is named.
export RAY_ADDRESS="${RAY_ADDRESS:-local}"

say "training; the full log is $out/run.log"
set +e
# In the foreground Ctrl-C reaches the training, whose last lines the pipe waits for.
trap 'interrupted=1' INT
timeout --foreground --signal=INT --kill-after=60 "${DARTS_QUICKSTART_TIMEOUT:-1200}" \
  "$PYTHON" -m recipe.darts.main_darts --config-name quickstart platform="$platform" \
  hydra.run.dir="'$out/hydra'" trainer.default_local_dir="'$out/checkpoints'" "${resume[@]}" "$@" 2>&1 </dev/null |
  tee -ia run.log | (trap '' INT && exec grep --line-buffered -oE '\[darts\] .*')
status=${PIPESTATUS[0]}
trap - INT
set -e
if [[ -n $interrupted ]]; then status=130; fi
if ((status == 0)) && [[ -e metrics.earlier.jsonl ]]; then
  if [[ -e metrics.jsonl ]]; then cat metrics.jsonl >>metrics.earlier.jsonl; fi # not there if nothing was left to train
  mv metrics.earlier.jsonl metrics.jsonl
fi
if ! has_results; then
  said=$(tail -n 25 run.log)
  settle
  case $status in
    130) say "interrupted before there were results; the log is $out/failed.log" ;;
    2)
      grep -q '^\[darts\]' <<<"$said" || tail -n 3 <<<"$said" >&2
      say "the settings were refused, see the line above; nothing was started"
      ;;
    *)
      printf '%s\n' "$said" >&2
      say "exit code $status before there were results; the full log is $out/failed.log" >&2
      ;;
  esac
  exit $((status ? status : 1))
fi
settle
case $status in
  0) "$PYTHON" -m darts.report.summary "$out" || status=$? ;;
  130) say "interrupted; log and results so far are in $out"; exit 130 ;;
  *) tail -n 25 run.log >&2; die "the training ended with exit code $status; the full log is $out/run.log" ;;
esac
if [[ -e $out/checkpoints/darts.jsonl ]]; then
  "$PYTHON" -m darts.report "$out/checkpoints" --out "$out/report" >report.log 2>&1 ||
    { cat report.log >&2; die "no report of the run, see above"; }
  rm report.log
  say "figures: $out/report/index.html"
fi
say "$([[ $status == 0 ]] && echo done || echo failed) in $SECONDS s; metrics, log and trained model in $out"
exit "$status"
