#!/usr/bin/env bash
# Sets up everything training needs; does nothing (in milliseconds) when it is all there.
#
#   scripts/setup.sh         Debian packages for FFCV where it may install them, .venv, the package with FFCV
#   scripts/setup.sh --dev   also what tests and checks need: tools from PyPI; SLURM and Chromium from Debian where it may
#
# HARNESS_VENV=DIR   use this folder instead of .venv
# HARNESS_NO_APT=1   never install Debian packages
# PYTHON=PATH        the Python (3.11 or 3.12) to build the environment with
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${HARNESS_VENV:-$root/.venv}
case "$venv" in /*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/.harness-setup
log=$venv/setup.log
extras=ffcv

say() { printf 'setup: %s\n' "$*" >&2; }

case "${1:-}" in
  "") ;;
  --dev) extras=ffcv,dev ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) say "unknown option \"$1\""; say "HINT: scripts/setup.sh [--dev]"; exit 2 ;;
esac

# What the environment was made from: this folder, the Python, and all of pyproject.toml but the tools' settings.
wanted() {
  local python_version
  python_version=$(sed -n 's/^version *= *//p' "$venv/pyvenv.cfg" 2>/dev/null || true)
  printf '%s|%s|%s' "$root" "$python_version" "$(sed '/^\[tool\./,$d' "$root/pyproject.toml" | cksum)"
}

stamped() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

is_ready() {
  [ -x "$venv/bin/python" ] && [ -f "$stamp" ] || return 1
  [ "$(stamped key)" = "$(wanted)" ] || return 1
  case ",$(stamped extras)," in *",$extras,"* | *",ffcv,dev,"*) ;; *) return 1 ;; esac
  # Without FFCV, try again as soon as other packages are there than last time.
  [ "$(stamped ffcv)" = yes ] || [ "$(stamped missing)" = "$(missing_packages "$venv/bin/python")" ]
}

# The Debian packages that building FFCV lacks, on one line.
missing_packages() {
  local python=$1 lacking=()
  command -v g++ >/dev/null || lacking+=(g++)
  command -v pkg-config >/dev/null || lacking+=(pkg-config)
  has_library opencv4 libopencv-dev || lacking+=(libopencv-dev)
  has_library libturbojpeg libturbojpeg0-dev || lacking+=(libturbojpeg0-dev)
  "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    lacking+=("$("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
  printf '%s' "${lacking[*]-}"
}

has_library() { # name for pkg-config, Debian package
  if command -v pkg-config >/dev/null; then pkg-config --exists "$1"; else dpkg -s "$2" >/dev/null 2>&1; fi
}

# What the tests of the cluster and of pages lack; all else is tested without it.
missing_test_packages() {
  local lacking=() program path=$PATH:/usr/sbin:/sbin
  for program in slurmctld slurmd sbatch; do
    PATH=$path command -v "$program" >/dev/null || lacking=(slurm-wlm)
  done
  PATH=$path command -v munged >/dev/null || lacking+=(munge)
  PATH=$path command -v ip >/dev/null || lacking+=(iproute2)
  command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
    lacking+=(chromium)
  printf '%s' "${lacking[*]-}"
}

install_test_packages() {
  local lacking
  lacking=$(missing_test_packages)
  if [ -n "$lacking" ] && may_apt; then
    # shellcheck disable=SC2086  # one word a package
    apt_install $lacking || say "apt-get could not install them, see $log"
    lacking=$(missing_test_packages)
  fi
  [ -z "$lacking" ] || say "the tests that need them will be skipped; HINT: apt-get install $lacking"
}

may_apt() {
  [ -z "${HARNESS_NO_APT:-}" ] && command -v apt-get >/dev/null &&
    { [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; }
}

apt_install() {
  local as_root=(env)
  [ "$(id -u)" = 0 ] || as_root=(sudo -n env)
  say "installing Debian packages: $*"
  { "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
    >>"$log" 2>&1
}

# A Python that can build the environment: 3.11 or 3.12. pyenv's stand-ins for absent versions fail and are passed.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; then
      command -v "$python"
      return
    fi
  done
  say "no Python 3.11 or 3.12 found; python3 is $(python3 --version 2>&1 || echo absent)"
  say "HINT: install one (Debian: apt-get install python3.11 python3.11-venv) or name it: PYTHON=/path/to/python3.11"
  return 2
}

make_environment() {
  local python
  python=$(find_python) || exit 2
  if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && may_apt; then
    apt_install python3-venv || true
  fi
  say "making $venv with $("$python" --version)"
  if ! "$python" -m venv "$venv" >>"$log" 2>&1; then
    tail -n 5 "$log" >&2
    say "$python could not make a virtual environment"
    say "HINT: apt-get install python3-venv, or name another Python: PYTHON=/path/to/python3.11"
    exit 2
  fi
}

pip_install() { # extras, joined by commas; may be empty
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --editable "$root${1:+[$1]}" >>"$log" 2>&1
}

install_package() { # the missing packages
  local reason="" without=${extras#ffcv}
  without=${without#,}
  ffcv=no
  if [ -n "$1" ]; then
    reason="missing Debian packages: $1"
  else
    say "installing the Python packages (a few minutes the first time; log: $log)"
    if pip_install "$extras"; then
      if "$venv/bin/python" -c 'import ffcv' >>"$log" 2>&1; then ffcv=yes; return; fi
      reason="it was built but cannot be imported: $(tail -n 1 "$log")"
    else
      reason="building it failed, see $log"
    fi
  fi
  say "FFCV is left out ($reason)"
  [ -z "$1" ] || say "HINT: apt-get install $1, then start again to have it"
  say "installing the Python packages without FFCV; the loader \"device\" takes its place"
  if ! pip_install "$without"; then
    tail -n 15 "$log" >&2
    say "pip could not install the packages; the whole log: $log"
    exit 1
  fi
}

is_ready && exit 0
mkdir -p "$venv"
if command -v flock >/dev/null; then # two first starts at once: the second waits, then finds all done
  exec 9>"$venv/.lock"
  flock 9
  is_ready && exit 0
fi
: >>"$log"
"$venv/bin/python" -c 'import pip' 2>/dev/null || make_environment
missing=$(missing_packages "$venv/bin/python")
if [ -n "$missing" ] && may_apt; then
  # shellcheck disable=SC2086  # one word a package
  apt_install $missing || say "apt-get could not install them, see $log"
  missing=$(missing_packages "$venv/bin/python")
fi
case ",$(stamped extras)," in *,dev,*) extras=ffcv,dev ;; esac # what is there stays
case "$extras" in *dev*) install_test_packages ;; esac
rm -f "$stamp"
install_package "$missing"
printf 'key=%s\nextras=%s\nffcv=%s\nmissing=%s\n' "$(wanted)" "$extras" "$ffcv" "$missing" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready"
