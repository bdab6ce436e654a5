#!/usr/bin/env bash
# The long form of the fault tests: hundreds of real faults and 10,000 bad inputs, then docs/reliability.md.
#
#   scripts/faults.sh [pytest's options, such as -k rank]
#
# WORK=DIR          where the log of trials goes (default: faults-work under $TMPDIR); run again with the same folder, it
#                   resumes where it stopped, and the page is written from all that the folder has
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
work=${WORK:-${TMPDIR:-/tmp}/faults-work}
mkdir -p "$work"
export FAULTS_LOG=$work/trials.jsonl FAULTS_INPUTS=${INPUTS:-10000}
failed=0
"$python" -m pytest tests/faults -m "" -n "${JOBS:-2}" --dist worksteal --timeout 3600 "$@" || failed=1
"$python" -m tests.faults.page "$FAULTS_LOG" docs/reliability.md || failed=1
echo "faults: docs/reliability.md is written, from $FAULTS_LOG"
exit "$failed"
