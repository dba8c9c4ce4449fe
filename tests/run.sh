#!/usr/bin/env bash
# Set up the environment and run the tests. Extra arguments go to pytest: bash tests/run.sh -k data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source lib/environment.sh

ensure_environment requirements.txt requirements-test.txt requirements-demo-nodeps.txt requirements-lmms-nodeps.txt
exec "$VENV/bin/python" -m pytest tests -q -n 2 "$@"
