// The order in which the rows of a batch are worked on, and tensors of one number for each row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "packing.h"
#include "tensors.h"

namespace cjepa {

// The rows of one view, or of two views interleaved, sorted by class if there are classes.
//
// A caller counts the rows of one view after those of the other. The kernel's row a is row
// original(a) of the caller.
struct RowOrder {
  int64_t batch, views;              // rows of a view, and how many views
  std::vector<int64_t> interleaved;  // (rows) with classes: the row as a Source counts it
  std::vector<int64_t> class_ends;   // (rows) with classes: see Exclusion

  RowOrder(int64_t batch_, int64_t views_, const std::optional<Tensor>& classes)
      : batch(batch_), views(views_) {
    if (!classes.has_value()) return;
    const int64_t* of = data_of<int64_t>(*classes);
    std::vector<int64_t> samples(batch);
    std::iota(samples.begin(), samples.end(), int64_t{0});
    std::stable_sort(samples.begin(), samples.end(),
                     [of](int64_t k, int64_t l) { return of[k] < of[l]; });
    for (int64_t k = 0; k < batch; ++k)
      for (int64_t v = 0; v < views; ++v) interleaved.push_back(views * samples[k] + v);
    class_ends.resize(rows());
    int64_t end = rows();
    for (int64_t k = batch - 1; k >= 0; --k) {
      if (k + 1 < batch && of[samples[k]] != of[samples[k + 1]]) end = views * (k + 1);
      std::fill_n(class_ends.begin() + views * k, views, end);
    }
  }

  int64_t rows() const { return views * batch; }
  const int64_t* order() const { return interleaved.empty() ? nullptr : interleaved.data(); }
  const int64_t* ends() const { return class_ends.empty() ? nullptr : class_ends.data(); }
  int64_t original(int64_t a) const {
    const int64_t row = interleaved.empty() ? a : interleaved[a];
    return row % views * batch + row / views;
  }

  // The numbers of the caller's rows, in the order of the kernel.
  template <typename T>
  Tensor to_kernel(const Tensor& numbers) const {
    Tensor out = new_tensor(numbers, {rows()}, dtype_of<T>());
    const T* from = data_of<T>(numbers);
    const int64_t stride = numbers.stride(0);
    T* to = data_of<T>(out);
    for (int64_t a = 0; a < rows(); ++a) to[a] = from[original(a) * stride];
    return out;
  }

  // The same the other way round.
  template <typename T>
  Tensor to_caller(const Tensor& numbers) const {
    if (views == 1 && interleaved.empty()) return numbers;
    Tensor out = new_tensor(numbers, {rows()}, dtype_of<T>());
    const T* from = data_of<T>(numbers);
    T* to = data_of<T>(out);
    for (int64_t a = 0; a < rows(); ++a) to[original(a)] = from[a];
    return out;
  }

  // For each row of the kernel, which of them is the positive, or -1. Without `positives` the views
  // of a sample are.
  std::vector<int64_t> positives_of_rows(const std::optional<Tensor>& positives) const {
    std::vector<int64_t> out(rows());
    if (!positives.has_value()) {
      for (int64_t a = 0; a < rows(); ++a) out[a] = a ^ 1;
      return out;
    }
    const int64_t* of = data_of<int64_t>(*positives);
    std::vector<int64_t> place(rows());  // of each of the caller's rows in the kernel
    for (int64_t a = 0; a < rows(); ++a) place[original(a)] = a;
    for (int64_t a = 0; a < rows(); ++a) {
      const int64_t positive = of[original(a)];
      out[a] = positive < 0 ? -1 : place[positive];
    }
    return out;
  }

  // Moves the rows of a view's gradient, which lie in the order of the kernel, to their places.
  template <typename T>
  void restore_rows(Tensor& grad) const {
    if (interleaved.empty()) return;
    const int64_t features = grad.size(1);
    T* rows_of = data_of<T>(grad);
    std::vector<T> moving(features);
    std::vector<bool> placed(batch);
    for (int64_t first = 0; first < batch; ++first) {
      if (placed[first]) continue;
      // The row in `moving` goes where it belongs, and takes along the row that lies there.
      std::copy_n(rows_of + first * features, features, moving.data());
      for (int64_t k = first; !placed[k];) {
        placed[k] = true;
        k = interleaved[views * k] / views;
        std::swap_ranges(moving.begin(), moving.end(), rows_of + k * features);
      }
    }
  }
};

}  // namespace cjepa
