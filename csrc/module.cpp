// The compiled module cjepa_kernels._C: how it was built and what this CPU offers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>

#include "cpu/operators.h"
#include "instruction_sets.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = CJEPA_VERSION;
  info["schema"] = cjepa::kSchemaVersion;
  info["compiler"] = CJEPA_COMPILER;
  info["build_type"] = CJEPA_BUILD_TYPE;
  info["target"] = CJEPA_TARGET;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["pybind11"] =
      std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  info["instruction_sets"] = cjepa::available_instruction_sets();
  info["instruction_set"] = cjepa::selected_instruction_set();
  info["hardware_threads"] = std::thread::hardware_concurrency();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of cjepa_kernels.";
  module.def("build_info", &build_info,
             "How this module was built and which instruction sets the CPU offers: a dict with "
             "version, schema, compiler, build_type, target, cxx_standard, pybind11, "
             "instruction_sets, instruction_set and hardware_threads.");
  module.def("register_operators", &cjepa::register_operators,
             "Make the operators' CPU kernels known to PyTorch; a second call does nothing.");
}
