#!/usr/bin/env bash
# build_variant.sh NAME [CMake options]: another build of the op library, without CUDA, in build/NAME/_C.so (UNMASK_C_LIBRARY picks it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=$1
shift
export PATH="$PWD/.venv/bin:$PATH"
cmake -S . -B "build/$name" -G Ninja -DUNMASK_CUDA=OFF -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DSKBUILD_PROJECT_VERSION=0 \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" "$@" > "build/$name.log" || { cat "build/$name.log"; exit 1; }
ninja -C "build/$name" _C >> "build/$name.log" || { tail -n 60 "build/$name.log"; exit 1; }
