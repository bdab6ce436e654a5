#!/usr/bin/env bash
# Train a recipe on what this machine has: one CPU, one GPU or all GPUs; or on a cluster. Sets everything up on first use.
#
#   ./launch.sh recipes/quickstart.yaml [key=value …] [--gpus N] [--ranks N] [options of harness train]
#   ./launch.sh --slurm recipes/seed.yaml [key=value …] [--nodes N] [--gpus-per-node G] [options of harness submit]
#
#   key=value     overrides of the recipe, such as training.epochs=2
#   --gpus N      use N GPUs (0: the CPU); default: all that are there
#   --ranks N     start N processes; default: one a GPU, or on the CPU as many as measured fastest
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

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=${HARNESS_VENV:-$root/.venv}
case "$venv" in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

fail() { # what, hint
  printf 'launch: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  HINT: %s\n' "$2" >&2
  exit 2
}

number() { # option, value, smallest
  case "${2:-}" in
    "" | *[!0-9]*) fail "$1 needs a number, got \"${2:-}\"" "For example $1 2." ;;
  esac
  [ "$2" -ge "$3" ] || fail "$1 must be at least $3, got $2"
}

# Always so after set-up; a dry run may come before it.
is_installed() {
  [ -x "$python" ] && "$python" -c 'import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("harness", "torch", "accelerate"))))'
}

# Installed, and not found broken by the set-up.
has_ffcv() {
  ! grep -qx ffcv=no "$venv/.harness-setup" 2>/dev/null &&
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ffcv") is None)'
}

# The file in recipes/ whose path is most like the one given, told by whatever Python there is.
nearest_recipe() {
  local any
  for any in "$python" python3 python; do
    (cd "$root" && "$any" - "$1" 2>/dev/null <<'PYTHON') && return
import difflib, pathlib, sys
paths = sorted(str(p) for p in pathlib.Path("recipes").glob("*.y*ml"))
close = difflib.get_close_matches(sys.argv[1], paths, n=1, cutoff=0.5)
print(f'Did you mean "{close[0]}"?' if close else "Recipes: " + ", ".join(paths))
PYTHON
  done
  printf 'See the files in recipes/.'
}

visible_gpus() {
  local listed chosen
  case "${CUDA_VISIBLE_DEVICES-unset}" in "" | -1*) echo 0; return ;; esac
  if command -v nvidia-smi >/dev/null; then
    listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    chosen=$(($(printf '%s' "${CUDA_VISIBLE_DEVICES:-}" | tr -cd , | wc -c) + 1))
    [ "$listed" = 0 ] || [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || listed=$chosen
    echo "$listed"
  elif [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; then
    echo 1 # or more: torch counts them below
  else
    echo 0
  fi
}

# The GPUs that torch can use: fewer than there are where its build does not go with the driver.
usable_gpus() {
  local there
  there=$(visible_gpus)
  if [ "$there" != 0 ] && is_installed; then
    "$python" -W ignore -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
  else
    echo "$there"
  fi
}

[ "${DRY_RUN:-0}" != 0 ] || DRY_RUN=""
gpus=""
ranks=${NPROC:-}
restarts=""
slurm=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --gpus | --ranks)
      number "$1" "${2:-}" "$([ "$1" = --gpus ] && echo 0 || echo 1)"
      if [ "$1" = --gpus ]; then gpus=$2; else ranks=$2; fi
      shift ;;
    --max-restarts) number "$1" "${2:-}" 0; restarts=$2; shift ;;
    --max-restarts=*) number --max-restarts "${1#*=}" 0; restarts=${1#*=} ;;
    --gpus=*) number --gpus "${1#*=}" 0; gpus=${1#*=} ;;
    --ranks=*) number --ranks "${1#*=}" 1; ranks=${1#*=} ;;
    --slurm) slurm=yes ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[ ${#arguments[@]} -gt 0 ] || { usage >&2; exit 2; }
[ -z "${NPROC:-}" ] || number NPROC "$NPROC" 1

recipe=${arguments[0]}
case "$recipe" in -* | *=*) fail "the recipe comes first, got \"$recipe\"" "./launch.sh recipes/quickstart.yaml $recipe" ;; esac
[ ! -p "$recipe" ] || fail "$recipe: a pipe is read once, and launch.sh reads the recipe several times" "Write it to a file first, or use harness train."
if [ ! -f "$recipe" ]; then
  case "$recipe" in */* | *.*) found=$recipe ;; *) found=recipes/$recipe.yaml ;; esac # a path, or a name
  [ -f "$root/$found" ] || fail "$recipe: no such recipe" "$(nearest_recipe "$recipe")"
  recipe=$root/$found
fi
overrides=()
loader_given=""
for word in "${arguments[@]:1}"; do
  if [[ $word =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]]; then overrides+=("$word"); fi
  case "$word" in data.loader=*) loader_given=yes ;; esac
done

if [ -z "${DRY_RUN:-}" ] && [ -z "${HARNESS_SKIP_SETUP:-}" ]; then
  "$root/scripts/setup.sh" || exit $?
fi

# Prints the command in a dry run, else becomes it.
run() {
  [ -n "${DRY_RUN:-}" ] || exec env "$@"
  printf '%q ' "$@" | sed 's/ $//'
  echo
  exit 0
}

if [ -n "$slurm" ]; then
  [ -z "$gpus$ranks" ] || fail "--gpus and --ranks are for this machine alone" "With --slurm: --nodes N --gpus-per-node G."
  run "$python" -m harness submit "$recipe" "${arguments[@]:1}" ${restarts:+--max-restarts "$restarts"}
fi

# A shell of `srun --pty` is one task, however many were asked for.
[ "${SLURM_STEP_NUM_TASKS:-1}" = 1 ] || { [ -n "${SLURM_PTY_PORT:-}" ] && [ -t 0 ]; } ||
  fail "srun started this $SLURM_STEP_NUM_TASKS times, and each would train by itself" \
    "srun … $python -m harness train $recipe trains with one rank per task; or ./launch.sh --slurm, without srun."

# One process a GPU; on the CPU as many as asked for or as measured fastest.
if [ -z "$gpus" ]; then
  gpus=$(usable_gpus)
  [ -z "$ranks" ] || [ "$gpus" = 0 ] || [ "$ranks" -le "$gpus" ] ||
    fail "$ranks ranks asked for, but this machine has $gpus GPU(s)" "Give --ranks $gpus, or --gpus 0 for the CPU."
  [ -z "$ranks" ] || [ "$gpus" = 0 ] || gpus=$ranks
elif [ "$gpus" != 0 ]; then
  there=$(usable_gpus)
  [ "$gpus" -le "$there" ] || fail "--gpus $gpus, but this machine has $there" "Give --gpus $there, or leave the option out."
  [ -z "$ranks" ] || [ "$ranks" = "$gpus" ] || fail "--ranks $ranks and --gpus $gpus: one rank a GPU" "Give one of them."
fi
ranks=${ranks:-$([ "$gpus" = 0 ] || echo "$gpus")}

threads=""
loader=""
if is_installed; then
  plan=$("$python" -m harness.launching.local ${ranks:+--ranks "$ranks"} ${DRY_RUN:+--remembered} \
    "$recipe" ${overrides[@]+"${overrides[@]}"}) || exit $?
  read -r ranks threads loader <<<"$plan"
fi
ranks=${ranks:-1}

if [ "$loader" = ffcv ] && [ -z "$loader_given" ] && ! has_ffcv; then
  printf 'launch: FFCV is not installed: data.loader=device takes its place\n' >&2
  arguments+=(data.loader=device)
fi

environment=()
[ -z "$threads" ] || [ -n "${OMP_NUM_THREADS:-}" ] || environment+=("OMP_NUM_THREADS=$threads")
[ "$gpus" != 0 ] || environment+=(ACCELERATE_USE_CPU=true)
command=("$python" -m)
if [ "$ranks" != 1 ]; then
  config=$root/recipes/launch/cpu.yaml
  [ "$gpus" = 0 ] || config=$root/recipes/launch/multi_gpu.yaml
  command+=(harness.launching.ranks ${restarts:+--max-restarts "$restarts"})
  command+=(accelerate launch --config_file "$config" --num_processes "$ranks" -m)
else
  [ "$gpus" = 0 ] || environment=() # one process on a GPU keeps torch's own choice of threads
  [ "${restarts:-0}" = 0 ] || command+=(harness.launching.ranks --max-restarts "$restarts" python -m)
fi
command+=(harness train "$recipe" "${arguments[@]:1}")

run ${environment[@]+"${environment[@]}"} "${command[@]}"
