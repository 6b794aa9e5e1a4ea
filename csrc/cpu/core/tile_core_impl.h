// The tile core in GNU vector extensions. One file for each instruction set includes it, after it
// defined these macros:
//   CJEPA_VECTOR_BYTES  width of a vector register
//   CJEPA_MICRO_ROWS    rows of the register tile, which is two vectors wide
//   CJEPA_STREAM(p, x)  stores x at p around the caches; only if there is such an instruction
//   CJEPA_FENCE()       makes such stores visible to other threads
// Everything is in an unnamed namespace, for the reason that tile_core.h gives.
#pragma once

#include "micro_tile.h"
#include "prediction_core.h"
#include "product_core.h"
#include "row_core.h"
#include "similarity_core.h"
#include "tile_core.h"

namespace cjepa {
namespace {

template <typename T, typename Operand = PlainOperand<T>>
struct Core {
  using P = typename Operand::P;
  using Similarity = SimilarityCore<T, Operand>;
  using Product = ProductCore<T, Operand>;
  using Row = RowCore<T, Operand>;

  // The result fills a constinit variable. Code that filled it when the module is loaded would use
  // this instruction set on every CPU.
  static constexpr TileCore<T, P> table() {
    return {.micro_rows = Similarity::MR,
            .panel = Similarity::NR,
            .scratch_size = &Similarity::scratch_size,
            .similarity = &Similarity::similarity,
            .coefficients = &Product::coefficients,
            .coefficients_over_rows = &Product::coefficients_over_rows,
            .product = &Product::product,
            .dot = &Row::dot,
            .add = &Row::add,
            .normalize = &Row::normalize,
            .pack = &Row::pack,
            .pack_panel = &Row::pack_panel,
            .pack_product = &Row::pack_product,
            .finish = &Row::finish,
            .prediction = PredictionCore<T>::table()};
  }
};

}  // namespace
}  // namespace cjepa
