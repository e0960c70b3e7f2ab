#!/usr/bin/env bash
# Builds what is needed and runs all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/setup.sh
exec .venv/bin/python -m pytest "$@"
