#!/usr/bin/env bash
#SBATCH --job-name=seed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --time=1-12:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/seed/20260101-000000-0000/slurm/%j.out
#SBATCH --requeue
# Made by `harness submit`.
# shellcheck disable=SC2016  # $(…) in a name is part of the name
python=/home/me/.venv/bin/python
recipe=/home/me/seed.yaml
overrides=(training.epochs=90 'model.args={a: '"'"'x y'"'"'}')
run=/home/me/runs/seed/20260101-000000-0000
max_restarts=0
set -uo pipefail

# The run of this job: with an array one a task, whose index is its seed, or its place among the runs of a sweep. What it
# trains is written down once, so that a requeued job resumes with the same recipe, whatever became of the file since.
if [ -n "${runs+x}" ]; then
  run=${runs[$SLURM_ARRAY_TASK_ID]}
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  run+=-seed_$SLURM_ARRAY_TASK_ID
  overrides+=("seed=$SLURM_ARRAY_TASK_ID")
fi
frozen=$run/slurm/recipe.yaml

# What no other try can mend is found before the first.
if ! "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not (find_spec("harness") and find_spec("torch")))'; then
  printf 'ERROR %s on %s cannot train: it must have torch and the harness\n' "$python" "$(hostname)" >&2
  printf '  HINT: ./scripts/setup.sh installs both into .venv of the checkout; submit from there, on a disk that the nodes see\n' >&2
  exit 2
fi

mkdir -p "$run/slurm" || exit 1
if [ ! -e "$frozen" ]; then
  "$python" -m harness recipe show "$recipe" ${overrides[@]+"${overrides[@]}"} >"$frozen.$SLURM_JOB_ID" || exit $?
  mv "$frozen.$SLURM_JOB_ID" "$frozen" || exit 1
fi

# One task a rank. srun does not take the batch job's CPUs a task by itself.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS
[ -n "${SLURM_GPUS_ON_NODE:-}" ] || export ACCELERATE_USE_CPU=true

# The ranks meet on the first node, where this script runs.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=127.0.0.1
if [ "${#hosts[@]}" -gt 1 ]; then
  MASTER_ADDR=$(scontrol show node -o "${hosts[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}

# Before the time limit and at preemption this shell is sent USR1. It tells the ranks, again and again until they have
# stopped: one that is still starting does not listen yet.
stop=""
trap 'stop=USR1' USR1
trap 'stop=TERM; sleep 1' TERM # SLURM sends this one to the ranks too: they report it, and not the USR1 from here
# shellcheck disable=SC2016  # expanded by each task
task='trap "" USR1 USR2
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*}
export HARNESS_EXIT_CODE_FILE=$HARNESS_EXIT_CODES/$RANK
shopt -s execfail
exec "$@"
echo 2 >"$HARNESS_EXIT_CODE_FILE" # this node does not have that Python
exit 2'

start=${SLURM_RESTART_COUNT:-0}
for ((attempt = 0; ; attempt++)); do
  if [ -n "$stop" ]; then code=75; break; fi
  export HARNESS_EXIT_CODES=$run/slurm/codes.$SLURM_JOB_ID.$start.$attempt
  rm -rf "$run/slurm/codes.$SLURM_JOB_ID".* # a start that was killed has left its own
  mkdir -p "$HARNESS_EXIT_CODES"
  MASTER_PORT=$("$python" -c 'import sys; from harness.launching.ports import free_port; print(free_port(sys.argv[1]))' \
    "${SLURM_CLUSTER_NAME:-} $SLURM_JOB_ID $start $attempt") || exit 1
  export MASTER_PORT HARNESS_ATTEMPT=$attempt
  srun --kill-on-bad-exit=1 --wait=60 bash -c "$task" task \
    "$python" -m harness train "$frozen" --run-dir "$run" --resume auto &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    [ -z "$stop" ] || kill -USR1 "$step" 2>/dev/null
    sleep 1 &
    wait "$!" # unlike a plain sleep, a signal ends it
  done
  wait "$step"
  status=$?

  # srun's own code is that of any one rank; the ranks have written theirs.
  if [ ! -d "$HARNESS_EXIT_CODES" ]; then # a newer start of this job has cleared it away
    printf 'launch: SLURM has started this job again while it ran here; leaving the run to that start\n' >&2
    exit 1
  fi
  written=" $(cat "$HARNESS_EXIT_CODES"/* 2>/dev/null | tr '\n' ' ')"
  rm -rf "$HARNESS_EXIT_CODES"
  case "$written" in
    *" 2 "*) code=2; break ;;   # bad recipe, option, data or Python
    *" 3 "*) code=3; break ;;   # diverged
    *" 75 "*) code=75; break ;; # stopped, with a checkpoint
  esac
  case "$status" in 126 | 127) code=2; break ;; esac # there is no srun
  if [ "$status" = 0 ]; then code=0; break; fi
  if [ -n "$stop" ]; then code=75; break; fi
  code=1
  printf 'launch: a rank died (srun: %s)\n' "$status" >&2
  [ "$attempt" -lt "$max_restarts" ] || break
  printf 'launch: restart %d of %d, from the last checkpoint\n' "$((attempt + 1))" "$max_restarts" >&2
done

printf '%d\n' "$code" >"$run/exit_code"

# Queue this job (of an array, this task) again, unless it was cancelled: a job that was has left the state RUNNING.
# The id of one of an array's tasks is that of the whole array: tasks are named by array and index.
if [ "$code" = 75 ]; then
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  case "$(scontrol show job -o "$job")" in
    *" JobState=RUNNING "*" Restarts=$start "* | *" Reason=TimeLimit "*" Restarts=$start "*)
      scontrol requeue "$job" && exit 75 ;;
    *" Restarts=$start "* | "") ;;
    *)
      printf 'launch: stopped with a checkpoint; SLURM has queued the job again\n' >&2
      exit 75 ;;
  esac
  again=${again:-sbatch ${SLURM_ARRAY_TASK_ID:+--array=$SLURM_ARRAY_TASK_ID }$(printf %q "$run/slurm/job.sbatch")}
  printf 'launch: stopped with a checkpoint; resume with: %s\n' "$again" >&2
fi
exit "$code"
