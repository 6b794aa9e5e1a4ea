// Operators whose kernel replays launch plans, for any schema.
//
// A call looks its plan up by a key: the operator and everything on which the launches depend. With
// a plan it runs without Python. Without one it calls an overload of the same operator that is
// implemented in Python. If wants_plan says so, that overload records its launches and hands a plan
// over by offer_plan before it returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace cjepa {

enum class ArgumentKind : char {
  kTensor = 't',
  kOptionalTensor = 'o',
  kTensors = 'l',
  kNumber = 'n',  // a parameter of the plan
  kFloat = 'f',   // part of the key, like all that follow
  kFloats = 'F',
  kBool = 'b',
  kString = 's',
  kOptionalDtype = 'd',
};

struct PlannedOperator {
  std::string name;       // with its namespace, without an overload
  std::string arguments;  // an ArgumentKind for each argument
  std::string results;    // kTensor or kTensors for each result
  // For each kNumber in order: the numbers at which the launches change. The key holds how many of
  // them the number reaches.
  std::vector<std::vector<double>> boundaries;
  std::string without_plan;  // the overload in Python
  // Positions of the arguments that decide in which dtype operands are multiplied: the first of
  // them that is not None does. If that is fp32, the key holds what `fp32_products` returns,
  // because PyTorch's setting for tf32 counts.
  std::vector<size_t> fp32_arguments;
  std::function<int64_t()> fp32_products;
};

// Registers the operator's kernel for a dispatch key, such as "CUDA". Throws std::invalid_argument
// for letters that are no kind, and std::length_error for more operators than there is room for.
void register_planned_operator(PlannedOperator planned, const std::string& dispatch_key);

// Whether the call that runs on this thread shall record a plan.
bool wants_plan();

// Reads a plan for the call that runs on this thread. Throws like read_plan, and std::logic_error
// if there is no such call.
void offer_plan(std::string_view bytes);

// Says that the recording of the call that runs on this thread gave no plan.
void refuse_plan();

// How many calls of planned operators this thread has begun.
uint64_t call_count();

// Forgets all plans, for example after the table of configurations has changed.
void forget_plans();

// How many plans there are.
size_t plan_count();

}  // namespace cjepa
