#!/usr/bin/env bash
# Every bench of this folder, one after the other (timings need the machine to themselves). Arguments, such as --quick, go to all of them.
#   bench/run_all.sh --quick      # a few minutes
#   bench/run_all.sh              # about an hour on 2 cores
set -euo pipefail
cd "$(dirname "$0")/.."
for script in bench/bench_*.py; do
  echo "== $script $*"
  python "$script" "$@"
done
