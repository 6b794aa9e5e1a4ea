// One row of the prediction loss and of its gradients, and the functions of an instruction set for
// it: plain data, like tile_core.h, and for the same reason without code.
#pragma once

#include <cstdint>

namespace cjepa {

enum class Normalization { kNone, kL2, kLayer };

// With d the difference of both sides: square, d^2, or, with c = d slope held within +-limit,
//   c (d - c half_width)      smooth-L1: slope 1 / beta, limit 1, half_width beta / 2
//                             Huber: slope 1, limit delta, half_width 1 / 2
// whose derivative is c.
template <typename T>
struct Penalty {
  bool square;
  T slope, limit, half_width;
};

// What a row is normalised by. L2: the norms of both sides; LayerNorm of the target: its mean and
// the inverse of its standard deviation; else nothing.
template <typename T>
struct RowStatistics {
  T first, second;
};

template <typename T>
struct PredictionRow {
  const T* prediction;
  const T* target;
  int64_t features;
  Normalization normalization;
  Penalty<T> penalty;
  T eps;  // L2: the smallest norm that is divided by
};

template <typename T>
struct PredictionGradient {
  RowStatistics<T> statistics;
  T factor;           // what reaches every element of the row from upstream,
  const T* upstream;  // and, unless null, each one by itself
  T* prediction;      // gradients; that of the target may be null
  T* target;
  bool past_caches;  // whether to write them around the caches, if they are aligned
};

// Functions of an instruction set.
template <typename T>
struct PredictionFunctions {
  // Returns the sum of the row's errors and leaves its statistics and, unless null, the errors.
  T (*forward)(const PredictionRow<T>&, RowStatistics<T>* statistics, T* errors);
  void (*gradient)(const PredictionRow<T>&, const PredictionGradient<T>&);
  void (*fence)();  // after gradients that went past the caches, before another thread may read
  void (*widen)(const uint16_t* bf16, int64_t count, T* out);
  void (*narrow)(const T* in, int64_t count, uint16_t* bf16);
};

}  // namespace cjepa
