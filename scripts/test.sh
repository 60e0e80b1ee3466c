#!/usr/bin/env bash
# Sets up .venv (or takes PYTHON=...), then lints and tests the project. Arguments go to pytest.
set -euo pipefail
EXTRA_PACKAGES="pytest ruff"
source "$(dirname "$0")/environment.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
