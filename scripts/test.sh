#!/usr/bin/env bash
# Sets up and runs the whole test suite, which needs neither GPU nor network.
#
#     bash scripts/test.sh [pytest arguments ...]        for example: bash scripts/test.sh tests/scheduling -k replay
#
# Settings, from the environment: those of scripts/setup_env.sh, among them PYTHON=python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several ranks share the cores
python -m pytest "$@"
