// The compiled module cjepa_kernels._C: how it was built, what this CPU offers, and the numbers
// that Python shares with it. The operators register themselves with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "cpu/constants.h"
#include "cpu/core/prediction_row.h"
#include "cpu/operators.h"
#include "cuda/driver.h"
#include "cuda/planned_operator.h"
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

// The operator's own properties, then how the rest of the key is found, see PlannedOperator.
void register_planned_operator(const std::string& name, const std::string& dispatch_key,
                               const std::string& arguments, const std::string& results,
                               const std::vector<std::vector<double>>& boundaries,
                               const std::string& without_plan,
                               const std::vector<size_t>& fp32_arguments,
                               const py::function& fp32_products) {
  // The function is never released, because operators are not either. A call of an operator does
  // not hold Python's lock.
  PyObject* const function = py::function(fp32_products).release().ptr();
  cjepa::register_planned_operator({.name = name,
                                    .arguments = arguments,
                                    .results = results,
                                    .boundaries = boundaries,
                                    .without_plan = without_plan,
                                    .fp32_arguments = fp32_arguments,
                                    .fp32_products =
                                        [function] {
                                          const py::gil_scoped_acquire lock;
                                          return py::handle(function)().cast<int64_t>();
                                        }},
                                   dispatch_key);
}

void add_plans(py::module_& module) {
  module.def("open_driver", &cjepa::open_driver, py::arg("libcuda"), py::arg("libtorch_cuda"),
             "Open the libraries that launch plans call. Further calls do nothing.");
  module.def("register_planned_operator", &register_planned_operator, py::kw_only(),
             py::arg("name"), py::arg("dispatch_key"), py::arg("arguments"), py::arg("results"),
             py::arg("boundaries"), py::arg("without_plan"), py::arg("fp32_arguments"),
             py::arg("fp32_products"),
             "Give an operator a kernel that replays launch plans; csrc/cuda/planned_operator.h "
             "says what the arguments are.");
  module.def("wants_plan", &cjepa::wants_plan,
             "Whether the operator's call that runs on this thread shall record a launch plan.");
  module.def(
      "offer_plan", [](const py::bytes& plan) { cjepa::offer_plan(std::string(plan)); },
      py::arg("plan"), "Hand over the launch plan of the operator's call on this thread.");
  module.def("refuse_plan", &cjepa::refuse_plan,
             "Say that the recording of the call that runs on this thread gave no launch plan.");
  module.def("forget_plans", &cjepa::forget_plans, "Forget all launch plans.");
  module.def("plan_count", &cjepa::plan_count, "How many launch plans there are.");
  module.def("call_count", &cjepa::call_count,
             "How many calls of operators with launch plans this thread has begun.");
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
  add_plans(module);
}
