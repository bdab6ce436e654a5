#!/usr/bin/env bash
# The long form of the fault tests: hundreds of real faults and 10,000 bad inputs, then docs/reliability.md.
#
#   scripts/faults.sh [--work DIR] [--only NAME …]
#
#   --work DIR    where trials and their log go (default: faults-work under $TMPDIR); run again with the same folder, it
#                 goes on where it stopped
#   --only NAME   only these rows; the page is written from all that the folder has
#
# JOBS=N            trials at once (default 2)
# INPUTS=N          bad inputs (default 10000)
# NOTE=TEXT         a sentence for the page, such as what else the machine did meanwhile
# HARNESS_VENV=DIR  the environment to use, instead of .venv
#
# Rows that mount small disks need root, and those of W&B the openwandb package; else they say so and are left out. Takes
# half an hour on two cores. Exit code 1 when a fault was not survived.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${HARNESS_VENV:-.venv}/bin/python
work=${TMPDIR:-/tmp}/faults-work
only=()
while [ $# -gt 0 ]; do
  case "$1" in
    --work) work=${2:?--work needs a folder}; shift ;;
    --only) only+=("${2:?--only needs a name}"); shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "faults: unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
mkdir -p "$work"

failed=0
"$python" -m tests.faults.run_all --work "$work" --jobs "${JOBS:-2}" ${only[@]+--only "${only[@]}"} || failed=1
"$python" -m tests.faults.run_inputs --work "$work" --count "${INPUTS:-10000}" || failed=1
"$python" -m tests.faults.report --work "$work" --results "$work/results.json" --page docs/reliability.md \
  --command scripts/faults.sh || failed=1
echo "faults: docs/reliability.md is written; results in $work/results.json"
exit "$failed"
