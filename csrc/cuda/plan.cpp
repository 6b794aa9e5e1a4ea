#include "plan.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "driver.h"

namespace cjepa {
namespace {

// Newer versions of PyTorch have a longer name for this check.
void check_torch(AOTITorchError code, const char* call) {
  if (code != 0) throw std::runtime_error(std::string(call) + " failed");
}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  template <typename T>
  T read() {
    static_assert(std::is_arithmetic_v<T>);
    if (bytes_.size() < sizeof(T)) throw std::invalid_argument("the plan ends too early");
    T value;
    std::memcpy(&value, bytes_.data(), sizeof(T));
    bytes_.remove_prefix(sizeof(T));
    return value;
  }

  template <typename T, size_t N>
  std::array<T, N> read_array() {
    std::array<T, N> values;
    for (T& value : values) value = read<T>();
    return values;
  }

  // Reads a number of elements, and then each of them by read_element.
  template <typename ReadElement>
  auto read_list(const ReadElement& read_element) {
    const uint32_t size = read<uint32_t>();
    // Each element takes at least one byte, so a damaged size cannot ask for all memory.
    if (size > bytes_.size()) throw std::invalid_argument("the plan ends too early");
    std::vector<decltype(read_element())> elements;
    elements.reserve(size);
    for (uint32_t k = 0; k < size; ++k) elements.push_back(read_element());
    return elements;
  }

  bool at_end() const { return bytes_.empty(); }

 private:
  std::string_view bytes_;
};

PlanResult read_result(Reader& in) {
  PlanResult result;
  result.dtype = in.read<int32_t>();
  result.sizes = in.read_list([&] { return in.read<int64_t>(); });
  result.strides = in.read_list([&] { return in.read<int64_t>(); });
  return result;
}

PlanTensorMap read_map(Reader& in) {
  PlanTensorMap map;
  map.slot = in.read<uint32_t>();
  map.offset = in.read<int64_t>();
  map.dtype = in.read<int32_t>();
  map.swizzle = in.read<int32_t>();
  map.sizes = in.read_array<uint64_t, 2>();
  map.row_stride = in.read<uint64_t>();
  map.box = in.read_array<uint32_t, 2>();
  return map;
}

PlanLaunch read_launch(Reader& in) {
  PlanLaunch launch;
  launch.function = reinterpret_cast<void*>(in.read<uint64_t>());
  launch.grid = in.read_array<uint32_t, 3>();
  launch.threads = in.read<uint32_t>();
  launch.shared_bytes = in.read<uint32_t>();
  launch.parameters = in.read_list([&] {
    PlanParameter parameter;
    parameter.kind = static_cast<PlanParameter::Kind>(in.read<uint8_t>());
    parameter.slot = in.read<uint32_t>();
    parameter.value = in.read<uint64_t>();
    return parameter;
  });
  launch.parameter_sizes = in.read_list([&] { return in.read<uint32_t>(); });
  return launch;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Checks that no index in the plan is out of range.
void check_indices(const Plan& plan) {
  size_t results = 0;
  for (uint32_t length : plan.list_lengths) results += length;
  require(results == plan.results.size(), "the lists do not hold all results");
  require(plan.workspace_bytes >= 0, "the workspace has a negative size");
  require(plan.zeroed_bytes <= static_cast<uint64_t>(plan.workspace_bytes),
          "zeros lie outside of the workspace");
  const size_t slots = plan.tensors + plan.results.size() + 1;
  for (const PlanResult& result : plan.results)
    require(result.sizes.size() == result.strides.size(), "a result has sizes without strides");
  for (const PlanTensorMap& map : plan.maps)
    require(map.slot < slots, "a tensor map lies in no slot");
  for (const PlanLaunch& launch : plan.launches) {
    require(launch.parameters.size() == launch.parameter_sizes.size(), "a parameter has no size");
    for (const PlanParameter& parameter : launch.parameters) {
      using Kind = PlanParameter::Kind;
      const size_t limit = parameter.kind == Kind::kPointer     ? slots
                           : parameter.kind == Kind::kTensorMap ? plan.maps.size()
                           : parameter.kind == Kind::kNumber    ? plan.numbers
                                                                : 1;
      require(parameter.kind <= Kind::kNumber, "a parameter is of no known kind");
      require(parameter.slot < limit, "a parameter refers to nothing");
    }
  }
}

// How Triton packs parameters is its private matter. The driver knows the sizes that the machine
// code was compiled for, so a plan need not trust that this Triton packs them as the last one did.
void check_parameters(const PlanLaunch& launch) {
  size_t offset = 0, size = 0, index = 0;
  for (; driver().get_parameter(launch.function, index, &offset, &size) == 0; ++index) {
    require(index < launch.parameter_sizes.size(), "a kernel takes more parameters than its plan");
    require(size == launch.parameter_sizes[index], "a kernel takes a parameter of another size");
  }
  require(index == launch.parameter_sizes.size(), "a kernel takes fewer parameters than its plan");
}

// What a call allocates. Deleting the workspace after the last launch is safe in the order of the
// stream.
class Allocations {
 public:
  explicit Allocations(size_t number) : handles_(number, nullptr) {}
  ~Allocations() {
    for (AtenTensorHandle handle : handles_)
      if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
  }
  Allocations(const Allocations&) = delete;
  Allocations& operator=(const Allocations&) = delete;
  AtenTensorHandle& operator[](size_t k) { return handles_[k]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

char* address_of(AtenTensorHandle tensor) {
  void* address = nullptr;
  check_torch(aoti_torch_get_data_ptr(tensor, &address), "aoti_torch_get_data_ptr");
  return static_cast<char*>(address);
}

std::vector<TensorMap> encode_maps(const Plan& plan, const std::vector<char*>& slots) {
  std::vector<TensorMap> maps(plan.maps.size());
  constexpr int kNoInterleave = 0, kPromoteTo128Bytes = 2, kFillWithZeros = 0;
  const uint32_t element_strides[2] = {1, 1};
  for (size_t k = 0; k < maps.size(); ++k) {
    const PlanTensorMap& map = plan.maps[k];
    check_driver(driver().encode_tensor_map(&maps[k], map.dtype, 2, slots[map.slot] + map.offset,
                                            map.sizes.data(), &map.row_stride, map.box.data(),
                                            element_strides, kNoInterleave, map.swizzle,
                                            kPromoteTo128Bytes, kFillWithZeros),
                 "cuTensorMapEncodeTiled");
  }
  return maps;
}

// Where the parameters of a launch lie, and the pointers among them.
struct ParameterMemory {
  explicit ParameterMemory(const Plan& plan) {
    size_t most = 0;
    for (const PlanLaunch& launch : plan.launches) most = std::max(most, launch.parameters.size());
    addresses.resize(most);
    pointers.resize(most);
  }
  std::vector<void*> addresses;
  std::vector<char*> pointers;
};

void launch_kernel(const PlanLaunch& launch, const std::vector<char*>& slots,
                   std::vector<TensorMap>& maps, const std::vector<float>& numbers, void* stream,
                   ParameterMemory& memory) {
  auto& [addresses, pointers] = memory;
  for (size_t k = 0; k < launch.parameters.size(); ++k) {
    const PlanParameter& parameter = launch.parameters[k];
    switch (parameter.kind) {
      case PlanParameter::Kind::kConstant:
        addresses[k] = const_cast<uint64_t*>(&parameter.value);
        break;
      case PlanParameter::Kind::kPointer:
        pointers[k] = slots[parameter.slot] + parameter.value;
        addresses[k] = &pointers[k];
        break;
      case PlanParameter::Kind::kTensorMap:
        addresses[k] = &maps[parameter.slot];
        break;
      case PlanParameter::Kind::kNumber:
        addresses[k] = const_cast<float*>(&numbers[parameter.slot]);
        break;
    }
  }
  check_driver(driver().launch_kernel(launch.function, launch.grid[0], launch.grid[1],
                                      launch.grid[2], launch.threads, 1, 1, launch.shared_bytes,
                                      stream, addresses.data(), nullptr),
               "cuLaunchKernel");
}

}  // namespace

Plan read_plan(std::string_view bytes) {
  Reader in(bytes);
  Plan plan;
  plan.tensors = in.read<uint32_t>();
  plan.numbers = in.read<uint32_t>();
  plan.list_lengths = in.read_list([&] { return in.read<uint32_t>(); });
  plan.results = in.read_list([&] { return read_result(in); });
  plan.workspace_bytes = in.read<int64_t>();
  plan.zeroed_bytes = in.read<uint64_t>();
  plan.maps = in.read_list([&] { return read_map(in); });
  plan.launches = in.read_list([&] { return read_launch(in); });
  require(in.at_end(), "the plan is followed by something else");
  require(plan.tensors > 0, "the plan takes no tensor");
  check_indices(plan);
  for (const PlanLaunch& launch : plan.launches) check_parameters(launch);
  check_driver(driver().get_context(&plan.context), "cuCtxGetCurrent");
  return plan;
}

void run_plan(const Plan& plan, const std::vector<AtenTensorHandle>& tensors,
              const std::vector<float>& numbers, std::vector<AtenTensorHandle>& results) {
  if (tensors.size() != plan.tensors || numbers.size() != plan.numbers)
    throw std::logic_error("a plan was run with tensors or numbers of another one");
  int32_t device_type = 0, device = 0;
  check_torch(aoti_torch_get_device_type(tensors[0], &device_type), "aoti_torch_get_device_type");
  check_torch(aoti_torch_get_device_index(tensors[0], &device), "aoti_torch_get_device_index");
  void* stream = nullptr;
  check_torch(driver().get_stream(device, &stream), "aoti_torch_get_current_cuda_stream");
  const size_t result_count = plan.results.size();
  std::vector<char*> slots;
  slots.reserve(plan.tensors + result_count + 1);
  for (AtenTensorHandle tensor : tensors) slots.push_back(address_of(tensor));
  Allocations owned(result_count + 1);
  const auto allocate = [&](size_t k, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides, int32_t dtype) {
    if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype, device_type, device, &owned[k]) != 0)
      throw AllocationError("there is no memory for a launch plan");
    slots.push_back(address_of(owned[k]));
  };
  for (size_t k = 0; k < result_count; ++k)
    allocate(k, plan.results[k].sizes, plan.results[k].strides, plan.results[k].dtype);
  allocate(result_count, {plan.workspace_bytes}, {1}, aoti_torch_dtype_uint8());
  {
    const CurrentContext context(plan.context);
    if (plan.zeroed_bytes > 0)
      check_driver(driver().fill_bytes(reinterpret_cast<uint64_t>(slots.back()), 0,
                                       plan.zeroed_bytes, stream),
                   "cuMemsetD8Async");
    std::vector<TensorMap> maps = encode_maps(plan, slots);
    ParameterMemory memory(plan);
    for (const PlanLaunch& launch : plan.launches)
      launch_kernel(launch, slots, maps, numbers, stream, memory);
  }
  results.clear();
  for (size_t k = 0; k < result_count; ++k) results.push_back(std::exchange(owned[k], nullptr));
}

}  // namespace cjepa
