#!/usr/bin/env bash
# Train a recipe on what this machine has: one CPU, one GPU or all GPUs; or on a cluster. Sets everything up on first use.
#
#   ./launch.sh recipes/quickstart.yaml [key=value …] [--gpus N] [--ranks N] [options of harness train]
#   ./launch.sh --slurm recipes/seed.yaml [key=value …] [--nodes N] [--gpus-per-node G] [options of harness submit]
#
#   key=value     overrides of the recipe, such as training.epochs=2
#   --gpus N      use N GPUs (0: the CPU); default: all that are there
#   --ranks N     start N processes; default: one per GPU, or on the CPU as many as measured fastest
#   --max-restarts N   when a rank dies, start all again from the last checkpoint, up to N times (default 0)
#   other options go to `harness train`, such as --run-dir DIR, --resume auto|never|PATH and --profile
#
# Environment:
#   DRY_RUN=1             print the command that would run, and stop
#   NPROC=N               the same as --ranks N
#   HARNESS_VENV=DIR      the environment to use and set up, instead of .venv
#   HARNESS_SKIP_SETUP=1  the environment is ready: no set-up
#
# Exit codes: 0 done; 1 broke off (full disk, lost rank); 2 bad recipe, option or data; 3 diverged; 75 stopped by a signal, checkpoint written.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit 0 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=${HARNESS_VENV:-$root/.venv}
case "$venv" in /*) ;; *) venv=$PWD/$venv ;; esac
command=("$venv/bin/python" -m harness.launch.local "$@")

if [ "${DRY_RUN:-0}" = 0 ] && [ -z "${HARNESS_SKIP_SETUP:-}" ]; then
  "$root/scripts/setup.sh" || exit $?
fi
if [ ! -x "$venv/bin/python" ]; then
  printf 'launch: there is no environment in %s yet; after scripts/setup.sh it runs:\n' "$venv" >&2
  printf '%q ' "${command[@]}" | sed 's/ $/\n/'
  [ "${DRY_RUN:-0}" != 0 ] || exit 2
  exit 0
fi
exec "${command[@]}"
