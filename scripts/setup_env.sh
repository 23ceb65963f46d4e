# Makes the virtual environment and puts it on PATH. Sourced by the other scripts, from any directory:
#
#     source scripts/setup_env.sh
#
# Settings, from the environment:
#   PYTHON=python3     the interpreter of the environment: 3.11 or newer (tested: 3.11 and 3.12)
#   VENV=.venv         its directory; one that this script did not make is refused
#   CONSTRAINTS=scripts/constraints.txt    the versions pip may choose; empty: whatever setup.py allows
#
# A stamp inside the environment records what it was built from (setup.py, the constraints, the interpreter). While that is
# unchanged, this script takes a fraction of a second; when it has changed, the environment is made anew.

PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
CONSTRAINTS=${CONSTRAINTS-$ROOT/scripts/constraints.txt}

setup_env() {
    local stamp limits=()
    [ -z "$CONSTRAINTS" ] || limits=(--constraint "$CONSTRAINTS")
    if ! "$PYTHON" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then
        echo "setup_env: PYTHON=$PYTHON is not a Python 3.11 or newer; install one or name it, for example PYTHON=python3.12" >&2
        return 2
    fi
    if [ -n "$CONSTRAINTS" ] && [ ! -f "$CONSTRAINTS" ]; then
        echo "setup_env: CONSTRAINTS=$CONSTRAINTS is no file; name a constraints file of pip, or leave it empty" >&2
        return 2
    fi
    stamp=$(
        "$PYTHON" - "$ROOT" "$ROOT/setup.py" ${CONSTRAINTS:+"$CONSTRAINTS"} <<'PY'
import hashlib, pathlib, sys
parts = [sys.version, sys.base_prefix, sys.argv[1], *(pathlib.Path(file).read_text() for file in sys.argv[2:])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
    ) || return
    if [ "$(cat "$VENV/.stamp" 2>/dev/null)" != "$stamp" ]; then
        if [ -d "$VENV" ] && [ ! -f "$VENV/.made-by-megatron-lora" ]; then
            echo "setup_env: $VENV exists and was not made by this script; remove it or name another directory, for example VENV=.venv-2" >&2
            return 2
        fi
        rm -rf "$VENV"
        mkdir -p "$VENV"
        touch "$VENV/.made-by-megatron-lora"
        echo "Installing into $VENV with $("$PYTHON" --version); this takes a few minutes (log: $VENV/install.log) ..."
        if ! { "$PYTHON" -m venv "$VENV" &&
            "$VENV/bin/python" -m pip install "${limits[@]}" --editable "$ROOT[dev,gguf]"; } >"$VENV/install.log" 2>&1; then
            tail -n 20 "$VENV/install.log" >&2
            echo "setup_env: the installation failed; all of its output is in $VENV/install.log" >&2
            return 1
        fi
        echo "$stamp" >"$VENV/.stamp"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONHOME PYTHONPATH
}

setup_env || exit $?
