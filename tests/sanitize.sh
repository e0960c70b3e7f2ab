#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds a second op library in build/sanitize and runs the op
# tests on it, with fewer random examples than usual. Leak detection is off: Python and torch keep memory until the process ends.
# The kernels are those of the ISA that runs, this machine's best or UNMASK_ISA; no others are compiled with the sanitizers.
# Arguments go to pytest (default: the op tests).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/setup.sh
isa=$(env -u UNMASK_C_LIBRARY .venv/bin/python -c 'from unmask.ops import isa; print(isa())')
bash tests/build_variant.sh sanitize -DUNMASK_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1 "-DUNMASK_ONLY_ISA=$isa"
export UNMASK_C_LIBRARY=$PWD/build/sanitize/_C.so HYPOTHESIS_PROFILE=brief
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
if [ $# -eq 0 ]; then set -- tests/test_op_*.py; fi
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" exec .venv/bin/python -m pytest -q -p no:cacheprovider "$@"
