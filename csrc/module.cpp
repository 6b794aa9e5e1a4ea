// The compiled module cjepa_kernels._C: how it was built, what this CPU offers, and the numbers
// that Python shares with it. The operators register themselves with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>

#include "cpu/constants.h"
#include "cpu/core/prediction_row.h"
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

py::dict constants() {
  py::dict numbers;
  numbers["small_block"] = cjepa::kSmallBlock;
  numbers["large_block"] = cjepa::kLargeBlock;
  numbers["large_block_rows"] = cjepa::kLargeBlockRows;
  numbers["default_mebibytes"] = cjepa::kDefaultMebibytes;
  numbers["few_rows"] = cjepa::kFewRows;
  numbers["smallest_temperature"] = cjepa::kSmallestTemperature;
  numbers["largest_temperature"] = cjepa::kLargestTemperature;
  numbers["largest_logits"] = cjepa::kLargestLogits;
  numbers["layer_eps"] = cjepa::kLayerEps;
  return numbers;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of cjepa_kernels.";
  module.def("build_info", &build_info,
             "How this module was built and which instruction sets the CPU offers: a dict with "
             "version, schema, compiler, build_type, target, cxx_standard, pybind11, "
             "instruction_sets, instruction_set and hardware_threads.");
  module.def("constants", &constants,
             "The numbers on which Python has to agree with this module: a dict.");
  module.def("saved_exponentials_size", &cjepa::saved_exponentials_size, py::arg("rows"),
             "How many numbers the forward of NT-Xent saves for a backward over that many rows.");
  module.def("register_operators", &cjepa::register_operators,
             "Register the operators' CPU kernels with PyTorch. A second call does nothing.");
}
