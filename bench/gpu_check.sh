#!/usr/bin/env bash
# The standing GPU check: one command for a machine with an NVIDIA GPU and no network.
#   bench/gpu_check.sh                     # every stage
#   bench/gpu_check.sh tests sanitize      # some of them: info tests sanitize bench bench_attention bench_head bench_step
#   bench/gpu_check.sh --dry-run           # on a machine without a GPU: what of each stage needs none
# Uses the Python of $PYTHON (default python3) with torch (a CUDA build), pytest, hypothesis and numpy, and the installed unmask; where
# $UNMASK_C_LIBRARY names an op library (one built elsewhere, say), that one and the sources in python/. Each stage fits 8 minutes.
# Reports go to $OUT (default bench/results).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} out=${OUT:-bench/results} dry=0 stages=()
export PYTHONPATH=$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
[ -z "${UNMASK_C_LIBRARY:-}" ] || PYTHONPATH=$PWD/python:$PYTHONPATH
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    info | tests | sanitize | bench | bench_attention | bench_head | bench_step) stages+=("$word") ;;
    *) echo "gpu_check.sh: unknown stage '$word'; stages: info tests sanitize bench bench_attention bench_head bench_step; option: --dry-run" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(info tests sanitize bench bench_attention bench_head bench_step)
mkdir -p "$out"
gpu_tests=(tests/test_cuda_logit_stats.py tests/test_cuda_ops.py tests/test_cuda_attention.py tests/test_cuda_head.py tests/test_cuda_golden.py tests/test_cuda_verify.py tests/test_cuda_moe.py)
failed=()

info() {
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv
  "$python" -m unmask doctor
}
tests() {
  if [ $dry = 1 ]; then "$python" -m pytest -q --collect-only "${gpu_tests[@]}" | tail -n 2
  else "$python" -m pytest -q "${gpu_tests[@]}"; fi
}
# A small set under memcheck and racecheck; torch's caching allocator is off, so that an access outside a tensor is one.
sanitize() {
  local set=(tests/test_cuda_logit_stats.py::test_tiles_give_the_same_bits_as_one_pass tests/test_cuda_ops.py::test_rope_faults_and_duplicate_slots
    "tests/test_cuda_ops.py::test_many_candidates" "tests/test_cuda_ops.py::test_rows"
    "tests/test_cuda_attention.py::test_lengths_and_splits" tests/test_cuda_attention.py::test_faults_set_status_and_give_zeros
    "tests/test_cuda_attention.py::test_an_invalid_cache_row_reaches_only_its_readers"
    "tests/test_cuda_head.py::test_a_nan_stays_in_its_row" "tests/test_cuda_head.py::test_a_call_of_a_case_list_runs")
  if [ $dry = 1 ]; then "$python" -m pytest -q --collect-only "${set[@]}" | tail -n 2; return; fi
  local tool
  for tool in memcheck racecheck; do
    echo "-- compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 HYPOTHESIS_PROFILE=brief timeout 230 compute-sanitizer --tool "$tool" --error-exitcode 99 \
      "$python" -m pytest -q -x -k "not 5000 and not 4096 and not 9000" "${set[@]}" || return 1
  done
}
bench_part() {
  if [ $dry = 1 ]; then "$python" bench/gpu_ops.py --part "$1" --dry-run
  else "$python" bench/gpu_ops.py --part "$1" --out "$out"; fi
}
bench() { bench_part rest; }
bench_attention() { bench_part attention; }  # compiles flex_attention for each shape
bench_head() { bench_part head; }
bench_step() {  # compiles whole steps, anew for each of four cases
  if [ $dry = 1 ]; then "$python" bench/gpu_step.py --dry-run
  else "$python" bench/gpu_step.py --out "$out"; fi
}

for stage in "${stages[@]}"; do
  printf '\n==== %s\n' "$stage"
  begin=$SECONDS
  if "$stage"; then state=ok; else state=FAILED; failed+=("$stage"); fi
  printf -- '---- %s: %s, %d s\n' "$stage" "$state" $((SECONDS - begin))
done
[ ${#failed[@]} -eq 0 ] || { printf '\nfailed: %s\n' "${failed[*]}"; exit 1; }
printf '\nall stages passed\n'
