# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: changes to the project folder and sets PYTHON to an interpreter for it.
# PYTHON=... in the environment names one that has the packages; else .venv is created once from requirements.txt (a few
# GB), with the packages in EXTRA_PACKAGES.
if [ -n "${PYTHON:-}" ]; then
    found=$(command -v "$PYTHON") || { echo "PYTHON=$PYTHON: no such interpreter" >&2; exit 2; }
    PYTHON=$(cd "$(dirname "$found")" && pwd)/$(basename "$found")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck disable=SC2086 # the packages are words
if [ -z "${PYTHON:-}" ]; then
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1 && ! python3 -m venv --clear .venv; then
        echo "scripts/environment.sh: python3 -m venv failed; on Debian: apt install python3-venv" >&2
        exit 1
    fi
    PYTHON=$PWD/.venv/bin/python
    echo "=> installing requirements.txt ${EXTRA_PACKAGES:-} into .venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt ${EXTRA_PACKAGES:-}
else
    "$PYTHON" - ${EXTRA_PACKAGES:-} <<'CHECK' || exit
import re
import sys
from importlib.metadata import PackageNotFoundError, version

missing = []
for package in [*open("requirements.txt").read().split(), *sys.argv[1:]]:
    try:
        version(re.split("[<>=]", package)[0])
    except PackageNotFoundError:
        missing.append(f"'{package}'")
if missing:
    print(f"PYTHON={sys.executable}: lacks packages; leave PYTHON out, or run {sys.executable} -m pip install", *missing,
          file=sys.stderr)
    sys.exit(2)
CHECK
fi
