// Launch plans against a libcuda without a GPU: reading, checks, parameters, results, errors, and
// the table.
#include "../cuda/plan.h"

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "../cuda/driver.h"
#include "../cuda/plan_table.h"
#include "check.h"
#include "fake_cuda.h"

namespace cjepa::test {
namespace {

void* const kContext = reinterpret_cast<void*>(0x51);
constexpr int64_t kRows = 6, kColumns = 8;
constexpr int kFloat32 = 6;

template <typename Symbol>
Symbol* in_fake(const char* name) {
  static void* const library = dlopen(CJEPA_FAKE_CUDA, RTLD_NOW);
  CHECK(library != nullptr, "%s", dlerror());
  return reinterpret_cast<Symbol*>(dlsym(library, name));
}

// Opens the fake driver, with a context that is current on this thread.
void use_fake_driver() {
  open_driver(CJEPA_FAKE_CUDA, CJEPA_FAKE_CUDA);
  in_fake<void(void*)>("fake_set_context")(kContext);
}

class Bytes {
 public:
  template <typename... T>
  Bytes& add(T... values) {
    (text_.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
    return *this;
  }
  std::string text() const { return text_; }

 private:
  std::string text_;
};

// out = x + number, through a workspace of zeros to which the first kernel adds and which the
// second reads by a tensor map.
struct Example {
  FakeKernel add{[](void** parameters) {
                   const float* x = *static_cast<float**>(parameters[0]);
                   float* workspace = *static_cast<float**>(parameters[1]);
                   const float number = *static_cast<float*>(parameters[2]);
                   const int64_t size = *static_cast<int64_t*>(parameters[3]);
                   for (int64_t k = 0; k < size; ++k) workspace[k] += x[k] + number;
                   return 0;
                 },
                 {8, 8, 4, 8}};
  FakeKernel copy{[](void** parameters) {
                    const uint64_t* map = static_cast<TensorMap*>(parameters[0])->opaque;
                    const float* from = reinterpret_cast<float*>(map[0]);
                    float* out = *static_cast<float**>(parameters[1]);
                    for (uint64_t row = 0; row < map[2]; ++row)
                      for (uint64_t column = 0; column < map[1]; ++column)
                        out[row * map[1] + column] = from[row * map[3] / 4 + column];
                    return 0;
                  },
                  {128, 8}};

  std::string bytes() const {
    Bytes b;
    constexpr uint32_t tensor = 0, out = 1, workspace = 2;
    constexpr int64_t bytes = 4 * kRows * kColumns;
    const uint8_t constant = 0, pointer = 1, map = 2, number = 3;
    b.add(uint32_t{1}, uint32_t{1}, uint32_t{1}, uint32_t{1});   // tensors, numbers, list lengths
    b.add(uint32_t{1}, kFloat32, uint32_t{2}, kRows, kColumns);  // results
    b.add(uint32_t{2}, kColumns, int64_t{1});
    b.add(bytes, static_cast<uint64_t>(bytes));       // workspace, and its zeroed bytes
    b.add(uint32_t{1}, workspace, int64_t{0}, 7, 3);  // tensor maps
    b.add(static_cast<uint64_t>(kColumns), static_cast<uint64_t>(kRows));
    b.add(uint64_t{4 * kColumns}, uint32_t{8}, uint32_t{2});
    b.add(uint32_t{2});  // launches
    b.add(reinterpret_cast<uint64_t>(&add), 5u, 6u, 7u, 128u, 1024u, uint32_t{4});
    b.add(pointer, tensor, uint64_t{0}, pointer, workspace, uint64_t{0}, number, uint32_t{0},
          uint64_t{0}, constant, uint32_t{0}, static_cast<uint64_t>(kRows * kColumns));
    b.add(uint32_t{4}, 8u, 8u, 4u, 8u);
    b.add(reinterpret_cast<uint64_t>(&copy), 1u, 1u, 1u, 32u, 0u, uint32_t{2});
    b.add(map, uint32_t{0}, uint64_t{0}, pointer, out, uint64_t{0});
    b.add(uint32_t{2}, 128u, 8u);
    return b.text();
  }
};

torch::stable::Tensor new_matrix() {
  AtenTensorHandle handle = nullptr;
  const int64_t sizes[2] = {kRows, kColumns}, strides[2] = {kColumns, 1};
  aoti_torch_empty_strided(2, sizes, strides, kFloat32, aoti_torch_device_type_cpu(), 0, &handle);
  return torch::stable::Tensor(handle);
}

torch::stable::Tensor run(const Plan& plan, const torch::stable::Tensor& x, float number) {
  std::vector<AtenTensorHandle> results;
  run_plan(plan, {x.get()}, {number}, results);
  CHECK(results.size() == 1, "%zu results", results.size());
  return torch::stable::Tensor(results[0]);
}

void check_sum(const torch::stable::Tensor& x, const torch::stable::Tensor& out, float number) {
  CHECK(out.dim() == 2 && out.size(0) == kRows && out.size(1) == kColumns, "another shape");
  const auto* a = static_cast<const float*>(x.const_data_ptr());
  const auto* b = static_cast<const float*>(out.const_data_ptr());
  for (int64_t k = 0; k < kRows * kColumns; ++k)
    CHECK(b[k] == a[k] + number, "element %ld: %g + %g is %g", static_cast<long>(k), a[k], number,
          b[k]);
}

void fill(torch::stable::Tensor& x) {
  Random random;
  auto* data = static_cast<float*>(x.mutable_data_ptr());
  for (int64_t k = 0; k < kRows * kColumns; ++k) data[k] = static_cast<float>(random.normal());
}

// The message of the exception that the function throws; empty if it throws none.
template <typename Function>
std::string message_of(const Function& function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

CJEPA_TEST(a_plan_runs_for_other_tensors_and_numbers) {
  use_fake_driver();
  const Example example;
  const Plan plan = read_plan(example.bytes());
  CHECK(plan.context == kContext, "another context");
  for (float number : {0.5f, -2.0f}) {
    torch::stable::Tensor x = new_matrix();
    fill(x);
    check_sum(x, run(plan, x, number), number);
  }
  const FakeLaunch& last = *in_fake<FakeLaunch>("fake_last_launch");
  CHECK(last.stream == kFakeStream && last.threads == 32, "another stream or block");
}

CJEPA_TEST(a_thread_without_a_context_gets_that_of_the_plan) {
  use_fake_driver();
  const Example example;
  const Plan plan = read_plan(example.bytes());
  torch::stable::Tensor x = new_matrix();
  fill(x);
  std::thread([&] {
    check_sum(x, run(plan, x, 1), 1);
    void* current = nullptr;
    driver().get_context(&current);
    CHECK(current == nullptr, "the context is still current after the call");
  }).join();
}

CJEPA_TEST(a_plan_that_differs_from_the_machine_code_is_refused) {
  use_fake_driver();
  for (const std::vector<size_t>& sizes :
       {std::vector<size_t>{8, 8, 8, 8}, {8, 8, 4}, {8, 8, 4, 8, 8}}) {
    Example example;
    example.add.parameter_sizes = sizes;
    const std::string message = message_of([&] { read_plan(example.bytes()); });
    CHECK(message.find("a kernel takes") != std::string::npos, "%s", message.c_str());
  }
}

CJEPA_TEST(damaged_bytes_are_refused) {
  use_fake_driver();
  const Example example;
  const std::string bytes = example.bytes();
  for (size_t length = 0; length < bytes.size(); ++length)
    CHECK(!message_of([&] { read_plan(bytes.substr(0, length)); }).empty(), "%zu bytes", length);
  CHECK(!message_of([&] { read_plan(bytes + "x"); }).empty(), "a byte too many");
}

CJEPA_TEST(a_plan_without_memory_launches_nothing) {
  use_fake_driver();
  Example example;
  bool launched = false;
  example.add.run = [&launched](void**) { return launched = true, 0; };
  Plan plan = read_plan(example.bytes());
  // So many bytes that PyTorch refuses them before it asks an allocator, of which a sanitizer would
  // complain.
  plan.results.front().sizes = plan.results.front().strides = {int64_t{1} << 40, int64_t{1} << 40};
  bool refused = false;
  try {
    run(plan, new_matrix(), 1);
  } catch (const AllocationError&) {
    refused = true;
  }
  CHECK(refused && !launched, "refused: %d, launched: %d", refused, launched);
}

CJEPA_TEST(an_error_of_cuda_has_its_words) {
  use_fake_driver();
  Example example;
  example.copy.run = [](void**) { return 1; };
  const Plan plan = read_plan(example.bytes());
  torch::stable::Tensor x = new_matrix();
  const std::string message = message_of([&] { run(plan, x, 1); });
  CHECK(message == "cuLaunchKernel: invalid value (CUDA error 1)", "%s", message.c_str());
}

Plan plan_of(uint32_t tensors) {
  Plan plan;
  plan.tensors = tensors;
  return plan;
}

CJEPA_TEST(the_table_keeps_the_plans_used_last) {
  PlanTable table(2);
  CHECK(!table.shall_record({1}) && table.shall_record({1}), "a key is met once, then again");
  for (int k = 0; k < 3; ++k) {
    CHECK(table.shall_record({1}), "given up after %d refusals", k);
    table.refuse({1});
  }
  CHECK(!table.shall_record({1}), "a call that can have no plan is recorded for ever");
  table.add({1}, plan_of(1));
  table.add({2}, plan_of(2));
  CHECK(!table.shall_record({1}), "a key with a plan needs no other");
  const std::shared_ptr<const Plan> first = table.find({1});
  CHECK(first != nullptr && first->tensors == 1, "the plan of another key");
  table.add({3}, plan_of(3));
  CHECK(table.find({2}) == nullptr && table.size() == 2, "the plan used last was dropped");
  table.add({1}, plan_of(4));
  CHECK(first->tensors == 1 && table.find({1})->tensors == 4, "a plan in use was changed");
  table.clear();
  CHECK(table.find({1}) == nullptr && table.size() == 0 && first->tensors == 1, "not cleared");
}

CJEPA_TEST(the_table_serves_several_threads) {
  PlanTable table(8);
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < 4; ++thread)
    threads.emplace_back([&table, thread] {
      for (int64_t k = 0; k < 2000; ++k) {
        const int64_t key = (k * 7 + thread) % 12;
        const std::shared_ptr<const Plan> plan = table.find({key});
        CHECK(plan == nullptr || plan->tensors == static_cast<uint32_t>(key), "another key's plan");
        if (table.shall_record({key})) table.add({key}, plan_of(static_cast<uint32_t>(key)));
        if (k % 500 == 0) table.clear();
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(table.size() <= 8, "%zu plans", table.size());
}

}  // namespace
}  // namespace cjepa::test
