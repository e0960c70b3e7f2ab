#!/usr/bin/env bash
# Builds unmask into .venv of this repository (nothing outside is touched) and leaves it importable there with all test tools.
# Quick when nothing changed. UNMASK_TORCH names the torch to install if none is there (default torch==2.13.0), with any pip options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=.venv

if [ ! -x "$venv/bin/pip" ]; then
  "$python" -m venv "$venv"
fi
has() { "$venv/bin/python" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }
pip() { "$venv/bin/pip" --disable-pip-version-check install --quiet "$@"; }

has torch || pip ${UNMASK_TORCH:-torch==2.13.0}
has scikit_build_core pybind11 ninja || pip "scikit-build-core>=0.10" "pybind11>=2.13" ninja
command -v cmake >/dev/null || has cmake || pip "cmake>=3.22"
export PATH="$PWD/$venv/bin:$PATH"

# What the package is made of; unchanged since the last install = nothing to do.
stamp=$(find csrc python CMakeLists.txt pyproject.toml README.md -type f ! -name '*.so' ! -path '*/__pycache__/*' -print0 | sort -z |
  xargs -0 sha256sum | sha256sum; "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))'; command -v nvcc || true; echo "${CMAKE_ARGS:-}")
if [ "$stamp" != "$(cat "$venv/unmask.stamp" 2>/dev/null || true)" ]; then
  echo "Building unmask (the first build takes minutes, with nvcc a few more) ..." >&2
  pip --no-build-isolation ".[test]"
  echo "$stamp" > "$venv/unmask.stamp"
fi
