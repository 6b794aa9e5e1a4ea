// The interface of the prediction loss of one row and of its gradients. Like tile_core.h, and for
// the same reason, it is plain data without code.
#pragma once

#include <cstdint>

namespace cjepa {

// Added to the variance in the LayerNorm of the target, as in torch.nn.functional.layer_norm.
inline constexpr double kLayerEps = 1e-5;

enum class Normalization { kNone, kL2, kLayer };

// The penalty of the difference d of both sides: d^2 if `square` is set. Else it is
//   c (d - c half_width), in which c is d slope, clamped to +-limit
// and its derivative is c. Smooth-L1 has slope 1 / beta, limit 1 and half_width beta / 2. Huber has
// slope 1, limit delta and half_width 1 / 2.
template <typename T>
struct Penalty {
  bool square;
  T slope, limit, half_width;
};

// The numbers that normalise a row. With L2 they are the norms of both sides. With LayerNorm of the
// target they are its mean and the inverse of its standard deviation. Else they are 0.
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
  T eps;  // with L2: lower bound on the norm used for normalisation
};

template <typename T>
struct PredictionGradient {
  RowStatistics<T> statistics;
  T factor;           // upstream gradient of every element of the row
  const T* upstream;  // to which that of each single element is added, unless null
  T* prediction;      // gradient of the prediction
  T* target;          // gradient of the target, or null
  bool past_caches;   // whether to write the gradients around the caches, if they are aligned
};

// The functions of one instruction set.
template <typename T>
struct PredictionFunctions {
  // Returns the sum of the row's errors. Writes its statistics and, unless it is null, the errors.
  T (*forward)(const PredictionRow<T>&, RowStatistics<T>* statistics, T* errors);
  void (*gradient)(const PredictionRow<T>&, const PredictionGradient<T>&);
  // To be called after gradients were written around the caches, before another thread may read.
  void (*fence)();
  void (*widen)(const uint16_t* bf16, int64_t count, T* out);
  void (*narrow)(const T* in, int64_t count, uint16_t* bf16);
};

}  // namespace cjepa
