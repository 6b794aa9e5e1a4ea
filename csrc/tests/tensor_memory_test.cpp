// Tensors on the kernels' own memory. They are a part of the prediction loss's program, which runs
// with the cache of blocks as well as without it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "../cpu/memory.h"
#include "../cpu/tensors.h"
#include "check.h"

namespace cjepa::test {
namespace {

CJEPA_TEST(tensors_of_the_kernels_memory) {
  for (const ScalarType dtype :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    const int64_t bytes = with_number(dtype, [](auto x) { return sizeof x; });
    for (const int64_t rows : {0, 1, 5, 3001}) {
      for (const bool zero : {false, true}) {
        const std::vector<int64_t> shape{rows, 3, 101};
        {  // memory that the system may hand out again, and that is not zero
          std::vector<char> dirty(rows * 303 * bytes, 1);
          asm volatile("" : : "r"(dirty.data()) : "memory");
        }
        const Tensor t = zero ? zero_tensor(shape, dtype) : cached_tensor(shape, dtype);
        CHECK(t.dim() == 3 && t.size(0) == rows && t.size(1) == 3 && t.size(2) == 101 &&
                  t.is_contiguous() && t.scalar_type() == dtype && t.numel() == rows * 303,
              "%ld rows", rows);
        char* const data = static_cast<char*>(t.mutable_data_ptr());
        if (zero)
          CHECK(std::all_of(data, data + t.numel() * bytes, [](char x) { return x == 0; }),
                "%ld rows are not all zero", rows);
        else
          CHECK(rows == 0 || reinterpret_cast<uintptr_t>(data) % 64 == 0, "%p is not aligned",
                data);
        std::fill_n(data, t.numel() * bytes, 1);  // ends the test if some of it is missing
      }
    }
  }
  const char* const limit = std::getenv("CJEPA_CACHE_MIB");
  if (limit != nullptr && std::atof(limit) == 0) return;
  // A copy of a tensor keeps the memory. The last one gives it back.
  const std::vector<int64_t> shape{1021, 257};
  std::optional<Tensor> t = cached_tensor(shape, ScalarType::Float);
  const void* const data = t->const_data_ptr();
  std::optional<Tensor> copy = t;
  t.reset();
  CHECK(cached_tensor(shape, ScalarType::Float).const_data_ptr() != data, "memory that is in use");
  copy.reset();
  const Tensor first = cached_tensor(shape, ScalarType::Float),
               second = cached_tensor(shape, ScalarType::Float);
  CHECK(first.const_data_ptr() == data || second.const_data_ptr() == data,
        "the memory did not return to the cache");
}

}  // namespace
}  // namespace cjepa::test
