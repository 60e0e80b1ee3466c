# Sourced by quickstart.sh and test.sh: sets PYTHON to an interpreter that has the project's packages.
# PYTHON=... in the environment names an existing one; else .venv is made from requirements.txt (a few GB, once).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -m venv .venv || {
            echo "scripts/environment.sh: python3 -m venv failed; on Debian: apt install python3-venv" >&2
            exit 1
        }
    fi
    PYTHON=$PWD/.venv/bin/python
    echo "=> installing requirements.txt $* into .venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
fi
