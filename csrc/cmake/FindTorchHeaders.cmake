# Finds an installed torch by its folder only: no find_package(Torch), which would drag in CUDA checks and at:: flags.
set(_find_torch [=[
import importlib.util, os, re, sys
spec = importlib.util.find_spec("torch")
if spec is None or not spec.origin:
    sys.exit(1)
folder = os.path.dirname(spec.origin)
version = re.search(r"__version__ = '([^']+)'", open(os.path.join(folder, "version.py")).read()).group(1)
print(folder, version, sep=chr(59), end="")
]=])
execute_process(COMMAND ${Python_EXECUTABLE} -c "${_find_torch}" OUTPUT_VARIABLE _torch RESULT_VARIABLE _torch_rc ERROR_QUIET)
list(LENGTH _torch _torch_n)
if(NOT _torch_rc EQUAL 0 OR _torch_n LESS 2)
  message(FATAL_ERROR
    "unmask: torch was not found by ${Python_EXECUTABLE}. Its headers are needed to build. Type these two commands:\n"
    "    pip install 'torch>=2.10' scikit-build-core pybind11 cmake ninja\n"
    "    pip install --no-build-isolation .")
endif()
list(GET _torch 0 UNMASK_TORCH_DIR)
list(GET _torch 1 UNMASK_TORCH_VERSION)
if(NOT EXISTS "${UNMASK_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "unmask: torch ${UNMASK_TORCH_VERSION} in ${UNMASK_TORCH_DIR} has no stable ABI headers; need torch >= 2.10: pip install 'torch>=2.10'")
endif()
message(STATUS "unmask: torch ${UNMASK_TORCH_VERSION} headers in ${UNMASK_TORCH_DIR}/include")

# 2.10 as torch encodes it: major in the top byte, minor in the next (0x0210... would mean 2.16 and compile silently).
set(UNMASK_TORCH_TARGET "((2ULL<<56)|(10ULL<<48))")

function(unmask_torch_includes target)
  target_include_directories(${target} SYSTEM PRIVATE "${UNMASK_TORCH_DIR}/include")
  target_compile_definitions(${target} PRIVATE "TORCH_TARGET_VERSION=${UNMASK_TORCH_TARGET}")
endfunction()

# The umbrella libtorch.so must be in DT_NEEDED: it brings libtorch_cpu, and libtorch_cuda in a CUDA build of torch,
# where the weak symbol for the current stream lives. `import torch` has loaded it before us, so no RPATH is set.
function(unmask_use_torch target)
  unmask_torch_includes(${target})
  target_link_options(${target} PRIVATE "-Wl,--no-as-needed" "${UNMASK_TORCH_DIR}/lib/libtorch.so" "-Wl,--as-needed"
    "-Wl,--allow-shlib-undefined")
  set_target_properties(${target} PROPERTIES SKIP_BUILD_RPATH ON)
endfunction()
