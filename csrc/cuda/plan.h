// A launch plan: what one call of an operator allocates, and the kernels that it launches on it.
//
// cjepa_kernels/triton/plans.py makes a plan of one ordinary run through the Triton code and hands
// it over as bytes. Running the plan repeats that run for other addresses and numbers, on the
// current stream, without any Python.
//
// A slot is a piece of memory that the call uses: first its tensors, in the order of the schema,
// then its results, then the workspace, which holds everything else that the call allocates.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace cjepa {

struct PlanResult {
  int32_t dtype;  // PyTorch's number of it
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

// The arguments of cuTensorMapEncodeTiled for a matrix, except for its address.
struct PlanTensorMap {
  uint32_t slot;
  int64_t offset;  // bytes
  int32_t dtype;
  int32_t swizzle;
  std::array<uint64_t, 2> sizes;  // columns, rows
  uint64_t row_stride;            // bytes
  std::array<uint32_t, 2> box;
};

struct PlanParameter {
  enum class Kind : uint8_t {
    kConstant,   // value holds the bytes
    kPointer,    // to slot, value bytes from its start
    kTensorMap,  // of number slot
    kNumber,     // number slot of the call as fp32
  };
  Kind kind;
  uint32_t slot;
  uint64_t value;
};

struct PlanLaunch {
  void* function;
  std::array<uint32_t, 3> grid;
  uint32_t threads;
  uint32_t shared_bytes;
  std::vector<PlanParameter> parameters;
  std::vector<uint32_t> parameter_sizes;  // bytes
};

struct Plan {
  uint32_t tensors = 0;  // that a call takes
  uint32_t numbers = 0;  // that a call takes
  // For each result of the schema, the tensors in it if it is a list, else 1.
  std::vector<uint32_t> list_lengths;
  std::vector<PlanResult> results;
  int64_t workspace_bytes = 0;
  uint64_t zeroed_bytes = 0;  // at the start of the workspace, before the first launch
  std::vector<PlanTensorMap> maps;
  std::vector<PlanLaunch> launches;
  void* context = nullptr;  // in which the functions were loaded
};

// Reads a plan and compares it with the machine code of its kernels. The plan belongs to the
// current context.
//
// Throws std::invalid_argument if the bytes are not a plan, or if a kernel takes other parameters
// than the plan says.
Plan read_plan(std::string_view bytes);

// There is no memory for a plan; nothing was launched.
struct AllocationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs a plan. Each result is a new tensor, which the caller owns.
//
// Throws AllocationError, or std::runtime_error for another error of CUDA or PyTorch; no result is
// left then.
void run_plan(const Plan& plan, const std::vector<AtenTensorHandle>& tensors,
              const std::vector<float>& numbers, std::vector<AtenTensorHandle>& results);

}  // namespace cjepa
