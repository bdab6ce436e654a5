#!/usr/bin/env bash
# Style, formatting and types. `scripts/check.sh --fix` mends what ruff can mend.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${HARNESS_VENV:-.venv}/bin/python

case "${1:-}" in
  "") ruff_check=(check) ruff_format=(format --check) ;;
  --fix) ruff_check=(check --fix) ruff_format=(format) ;;
  *) echo "usage: scripts/check.sh [--fix]" >&2; exit 2 ;;
esac

failed=0
"$python" -m ruff "${ruff_check[@]}" --quiet . || failed=1
"$python" -m ruff "${ruff_format[@]}" --quiet . || { echo "check: not formatted (scripts/check.sh --fix)" >&2; failed=1; }
"$python" -m mypy || failed=1
"$(dirname "$python")/shellcheck" launch.sh scripts/*.sh scripts/train.sbatch .ci/run || failed=1
exit $failed
