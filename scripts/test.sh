#!/usr/bin/env bash
# Sets up, checks and tests.
#
#   scripts/test.sh                 the checks and the ordinary tests
#   scripts/test.sh --all           everything before a release: the long tests too, more examples of each property, and
#                                   coverage, other processes included; fails below 90 % of the lines of harness/
#   scripts/test.sh tests/data -x   only these tests, with pytest's options; no checks
#
# HARNESS_DATA=DIR   a folder with the real CIFAR-10 (else those tests are skipped)
# JOBS=N             files at once, when all are run (default 2); most tests wait for processes that start
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
python=${HARNESS_VENV:-.venv}/bin/python
if [ -n "${HARNESS_DATA:-}" ] && [ -d "$HARNESS_DATA" ]; then # tests run in other folders
  HARNESS_DATA=$(cd "$HARNESS_DATA" && pwd)
  export HARNESS_DATA
fi

if [ $# -gt 0 ] && [ "$1" != --all ]; then
  exec "$python" -m pytest "$@"
fi

failed=0
scripts/check.sh || failed=1
options=(-n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder)
if [ $# -eq 0 ]; then
  "$python" -m pytest "${options[@]}" || failed=1
  exit "$failed"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export COVERAGE_FILE=$work/coverage
"$python" -m coverage run -m pytest -m "" --hypothesis-profile=release "${options[@]}" "${@:2}" || failed=1
"$python" -m coverage combine --quiet
"$python" -m coverage report --fail-under=90 --skip-covered || failed=1
exit "$failed"
