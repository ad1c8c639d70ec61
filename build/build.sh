#!/usr/bin/env bash
# Leaves omni's wheel in build/dist, and with --with-dependencies the wheels of everything in requirements/cpu.lock, so
# that a host without a package index can install it:
#
#   build/build.sh [--with-dependencies]
#   pip install --no-index --no-deps build/dist/*.whl     # on the host, in a virtual environment of Python 3.11
#
# PYTHON: the interpreter, python3.11 by default. pip goes by its usual configuration; the CPU build of torch comes from
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu on most machines.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }

with_dependencies=
for argument in "$@"; do
    case $argument in
        --with-dependencies) with_dependencies=yes ;;
        -h | --help) usage && exit 0 ;;
        *) printf '%s: unknown argument: write --with-dependencies or nothing\n' "$argument" >&2 && exit 2 ;;
    esac
done

cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
if [ "$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>&1)" != 3.11 ]; then
    printf 'PYTHON: %s is no Python 3.11: name its executable\n' "$python" >&2
    exit 2
fi

mkdir -p build/dist
new=$(mktemp -d build/dist/.new.XXXXXX) # moved when all of it is there
trap 'rm -rf "$new"' EXIT

isolation=() # an environment that has hatchling needs no index
if "$python" -c 'import hatchling' 2>/dev/null; then isolation=(--no-build-isolation); fi
"$python" -m pip wheel --quiet --no-deps "${isolation[@]}" --wheel-dir "$new" .
if [ -n "$with_dependencies" ]; then
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$new" --requirement requirements/cpu.lock
fi

rm -f build/dist/omni_infer-*.whl                                       # of an earlier version
if [ -n "$with_dependencies" ]; then rm -f build/dist/*.whl; fi # pip refuses two versions of one package
mv -f "$new"/*.whl build/dist/
ls build/dist/*.whl
