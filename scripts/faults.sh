#!/usr/bin/env bash
# The long form of the fault tests: hundreds of real faults and 10,000 bad inputs, then docs/reliability.md.
#
#   scripts/faults.sh [--work DIR] [--only NAME] … (--help lists all options)
#
#   --work DIR    where trials and their log go (default: faults-work under $TMPDIR); run again with the same folder, it
#                 resumes where it stopped
#   --only NAME   only this row, more than once for several; the page is written from all that the folder has
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
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
exec "${HARNESS_VENV:-.venv}/bin/python" -m tests.faults.long_form --work "${TMPDIR:-/tmp}/faults-work" \
  --page docs/reliability.md --jobs "${JOBS:-2}" --inputs "${INPUTS:-10000}" "$@"
