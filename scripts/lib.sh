# Sourced by the scripts of this folder: messages, timing, and the environment they share.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

# Every Ray process would otherwise compile torch and vLLM again.
unset PYTHONDONTWRITEBYTECODE
# A foreign interpreter's settings must not leak into ours.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX

say() { printf '[%s] %s\n' "${0##*/}" "$*"; }
die() { printf '[%s] error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# timed "what it does" command...   one line before, one line after with the seconds
timed() {
  local what=$1 start=$SECONDS
  say "$what ..."
  "${@:2}" || return
  say "$what: $((SECONDS - start)) s"
}
