// _host: what is known at build time. No libtorch here; run-time facts come from the op `info`.
#include <string>

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information of unmask (no libtorch).";
  m.def(
      "build_info",
      [] {
        py::dict d;
        d["version"] = UNMASK_VERSION;
        d["torch_built"] = UNMASK_TORCH_BUILT;
        d["compiler"] = UNMASK_COMPILER;
        d["build_type"] = UNMASK_BUILD_TYPE;
        d["cuda_compiler"] = UNMASK_CUDA_COMPILER;
        d["cuda_archs"] = UNMASK_CUDA_ARCH_LIST;
        return d;
      },
      "Facts fixed when the package was built: version, torch and compilers used, CUDA architectures.");
}
