#include "planned_operator.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <variant>

#include "../cpu/arguments.h"
#include "plan.h"
#include "plan_table.h"

// PyTorch has this from 2.13 on. Before, it is a null pointer.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace cjepa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;

constexpr size_t kMostPlans = 256;
constexpr size_t kMostOperators = 64;
constexpr uintptr_t kAlignment = 16;  // bytes: Triton compiles another kernel for aligned pointers

PlanTable& table() {
  static PlanTable plans(kMostPlans);
  return plans;
}

// What a call that shall record gets from Python.
struct Recording {
  std::optional<Plan> plan;
  bool refused = false;
};
// Of the call on this thread; null if it shall not record.
thread_local Recording* wanted = nullptr;
thread_local uint64_t calls = 0;

using Argument = std::variant<Tensor, std::optional<Tensor>, std::vector<Tensor>, double,
                              std::vector<double>, bool, std::string, std::optional<ScalarType>>;

// Takes the arguments from the stack, which holds one reference to each.
Argument take_argument(StableIValue value, ArgumentKind kind) {
  using torch::stable::detail::to;
  switch (kind) {
    case ArgumentKind::kTensor:
      return to<Tensor>(value);
    case ArgumentKind::kOptionalTensor:
      return to<std::optional<Tensor>>(value);
    case ArgumentKind::kTensors:
      return to<std::vector<Tensor>>(value);
    case ArgumentKind::kNumber:
    case ArgumentKind::kFloat:
      return to<double>(value);
    case ArgumentKind::kFloats:
      return to<std::vector<double>>(value);
    case ArgumentKind::kBool:
      return to<bool>(value);
    case ArgumentKind::kString:
      return read_string(to<StringHandle>(value));
    case ArgumentKind::kOptionalDtype:
      return to<std::optional<ScalarType>>(value);
  }
  throw std::logic_error("an argument of no kind");
}

// Everything that a call needs to look its plan up and to run it.
class Call {
 public:
  Call(const PlannedOperator& planned, int64_t number, StableIValue* stack) : planned_(planned) {
    arguments_.reserve(planned.arguments.size());
    key_.reserve(16 * planned.arguments.size());
    tensors_.reserve(planned.arguments.size());
    key_.push_back(number);
    size_t number_index = 0;
    for (size_t k = 0; k < planned.arguments.size(); ++k) {
      const auto kind = static_cast<ArgumentKind>(planned.arguments[k]);
      arguments_.push_back(take_argument(stack[k], kind));
      if (kind == ArgumentKind::kNumber) {
        const double value = std::get<double>(arguments_.back());
        int64_t passed = 0;
        for (double boundary : planned.boundaries[number_index]) passed += value >= boundary;
        key_.push_back(passed);
        numbers_.push_back(static_cast<float>(value));
        ++number_index;
      } else {
        std::visit([this](const auto& argument) { add_to_key(argument); }, arguments_.back());
      }
    }
    add_settings_to_key();
  }

  const PlanKey& key() const { return key_; }

  // Whether a plan takes as many tensors and numbers as this call has, and gives the results of the
  // schema.
  bool fits(const Plan& plan) const {
    bool fits = plan.tensors == tensors_.size() && plan.numbers == numbers_.size() &&
                plan.list_lengths.size() == planned_.results.size();
    for (size_t k = 0; fits && k < planned_.results.size(); ++k)
      fits = plan.list_lengths[k] == 1 ||
             planned_.results[k] == static_cast<char>(ArgumentKind::kTensors);
    return fits;
  }

  void run(const Plan& plan, StableIValue* stack) const {
    std::vector<AtenTensorHandle> results;
    run_plan(plan, tensors_, numbers_, results);
    size_t next = 0;
    for (size_t k = 0; k < planned_.results.size(); ++k) {
      if (planned_.results[k] == static_cast<char>(ArgumentKind::kTensor)) {
        stack[k] = torch::stable::detail::from(results[next++]);
        continue;
      }
      std::vector<Tensor> list;
      for (uint32_t n = 0; n < plan.list_lengths[k]; ++n) list.emplace_back(results[next++]);
      stack[k] = torch::stable::detail::from(list);
    }
  }

  // Calls the overload in Python, whose results then lie on the stack.
  void run_without_plan(StableIValue* stack) const {
    for (size_t k = 0; k < arguments_.size(); ++k)
      stack[k] =
          std::visit([](const auto& argument) { return torch::stable::detail::from(argument); },
                     arguments_[k]);
    if (torch_call_dispatcher(planned_.name.c_str(), planned_.without_plan.c_str(), stack,
                              TORCH_ABI_VERSION) == 0)
      return;
    const char* words = torch_exception_get_what_without_backtrace != nullptr
                            ? torch_exception_get_what_without_backtrace()
                            : nullptr;
    // cjepa_kernels/triton/planned.py looks for the first words.
    throw std::runtime_error(planned_.name + " failed in Python" +
                             (words != nullptr ? std::string(": ") + words : ""));
  }

 private:
  void add_to_key(const Tensor& tensor) {
    const AtenTensorHandle handle = tensor.get();
    void* address = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address));
    key_.push_back(static_cast<int64_t>(tensor.scalar_type()));
    key_.push_back(tensor.get_device_index());
    // A kernel may get an address with an offset, so its alignment follows from the remainder.
    key_.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % kAlignment));
    key_.push_back(tensor.dim());
    for (int64_t k = 0; k < tensor.dim(); ++k) {
      key_.push_back(tensor.size(k));
      key_.push_back(tensor.stride(k));
    }
    tensors_.push_back(handle);
  }
  void add_to_key(const std::optional<Tensor>& tensor) {
    key_.push_back(tensor.has_value());
    if (tensor.has_value()) add_to_key(*tensor);
  }
  void add_to_key(const std::vector<Tensor>& list) {
    key_.push_back(static_cast<int64_t>(list.size()));
    for (const Tensor& tensor : list) add_to_key(tensor);
  }
  void add_to_key(double value) {
    int64_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    key_.push_back(bits);
  }
  void add_to_key(const std::vector<double>& values) {
    key_.push_back(static_cast<int64_t>(values.size()));
    for (double value : values) add_to_key(value);
  }
  void add_to_key(bool value) { key_.push_back(value); }
  void add_to_key(const std::string& text) {
    key_.push_back(static_cast<int64_t>(text.size()));
    for (size_t k = 0; k < text.size(); k += sizeof(int64_t)) {
      int64_t word = 0;
      std::memcpy(&word, text.data() + k, std::min(sizeof word, text.size() - k));
      key_.push_back(word);
    }
  }
  void add_to_key(const std::optional<ScalarType>& dtype) {
    key_.push_back(dtype.has_value() ? static_cast<int64_t>(*dtype) : -1);
  }

  // The process may change these between two calls.
  void add_settings_to_key() {
    for (const char* name : {"CJEPA_WORKSPACE_MIB", "CJEPA_GLUON", "CJEPA_LAUNCH_PLANS"}) {
      const char* value = std::getenv(name);
      add_to_key(std::string(value == nullptr ? "" : value));
    }
    for (size_t position : planned_.fp32_arguments) {
      const Argument& argument = arguments_[position];
      std::optional<ScalarType> dtype;
      if (const auto* tensor = std::get_if<Tensor>(&argument)) dtype = tensor->scalar_type();
      if (const auto* option = std::get_if<std::optional<ScalarType>>(&argument)) dtype = *option;
      if (!dtype.has_value()) continue;
      if (*dtype == ScalarType::Float) key_.push_back(planned_.fp32_products());
      return;
    }
  }

  const PlannedOperator& planned_;
  std::vector<Argument> arguments_;
  PlanKey key_;
  std::vector<AtenTensorHandle> tensors_;
  std::vector<float> numbers_;
};

// An operator gets a function of its own, because the dispatcher does not tell a function which
// operator it runs.
struct Registered {
  PlannedOperator planned;
  std::unique_ptr<StableLibrary> library;
};
std::mutex registering;
std::array<Registered, kMostOperators> registered;
size_t registered_count = 0;

template <size_t number>
void run_operator(StableIValue* stack, uint64_t, uint64_t) {
  ++calls;
  const PlannedOperator& planned = registered[number].planned;
  const Call call(planned, static_cast<int64_t>(number), stack);
  struct Scope {
    explicit Scope(Recording* own) : outer(std::exchange(wanted, own)) {}
    ~Scope() { wanted = outer; }
    Recording* const outer;
  };
  if (const std::shared_ptr<const Plan> plan = table().find(call.key())) {
    const Scope scope(nullptr);
    try {
      call.run(*plan, stack);
    } catch (const AllocationError&) {
      // In Python this raises PyTorch's own exception, unless there is memory after all.
      call.run_without_plan(stack);
    }
    return;
  }
  // A call inside of another one, for example in a hook, is no part of that one's plan.
  Recording own;
  const Scope scope(table().shall_record(call.key()) ? &own : nullptr);
  call.run_without_plan(stack);
  if (own.plan.has_value() && call.fits(*own.plan))
    table().add(call.key(), std::move(*own.plan));
  else if (own.plan.has_value() || own.refused)
    table().refuse(call.key());
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

template <size_t... numbers>
constexpr std::array<Boxed, sizeof...(numbers)> boxed_functions(std::index_sequence<numbers...>) {
  return {&run_operator<numbers>...};
}
constexpr auto kBoxed = boxed_functions(std::make_index_sequence<kMostOperators>());

void check_kinds(const PlannedOperator& planned) {
  size_t numbers = 0;
  for (char kind : planned.arguments) {
    if (std::string_view("tolnfFbsd").find(kind) == std::string_view::npos)
      throw std::invalid_argument(planned.name + ": there is no kind of argument " + kind);
    numbers += kind == static_cast<char>(ArgumentKind::kNumber);
  }
  for (char kind : planned.results)
    if (std::string_view("tl").find(kind) == std::string_view::npos)
      throw std::invalid_argument(planned.name + ": there is no kind of result " + kind);
  if (planned.boundaries.size() != numbers)
    throw std::invalid_argument(planned.name + ": one list of boundaries for each number");
  for (size_t position : planned.fp32_arguments)
    if (position >= planned.arguments.size())
      throw std::invalid_argument(planned.name + ": there is no argument " +
                                  std::to_string(position));
}

}  // namespace

void register_planned_operator(PlannedOperator planned, const std::string& dispatch_key) {
  check_kinds(planned);
  const std::lock_guard<std::mutex> lock(registering);
  if (registered_count == kMostOperators)
    throw std::length_error("there is no room for another operator with launch plans");
  const std::string::size_type colons = planned.name.find("::");
  if (colons == std::string::npos)
    throw std::invalid_argument(planned.name + " must have a namespace");
  Registered& slot = registered[registered_count];
  slot.planned = std::move(planned);
  slot.library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL,
                                                 slot.planned.name.substr(0, colons).c_str(),
                                                 dispatch_key.c_str(), __FILE__, __LINE__);
  slot.library->impl(slot.planned.name.c_str() + colons + 2, kBoxed[registered_count]);
  ++registered_count;
}

bool wants_plan() { return wanted != nullptr; }

void offer_plan(std::string_view bytes) {
  if (wanted == nullptr) throw std::logic_error("no call on this thread records a plan");
  wanted->plan = read_plan(bytes);
}

void refuse_plan() {
  if (wanted != nullptr) wanted->refused = true;
}

uint64_t call_count() { return calls; }

void forget_plans() { table().clear(); }

size_t plan_count() { return table().size(); }

}  // namespace cjepa
