// The tile core in GNU vector extensions; included once per instruction set with
//   CJEPA_VECTOR_BYTES  width of a vector register
//   CJEPA_MICRO_ROWS    rows of the register tile; it is two vectors wide
//   CJEPA_STREAM(p, x)  if there is such an instruction: store x at p around the caches
//   CJEPA_FENCE()       what makes such stores visible to other threads
// Everything is in an unnamed namespace: see tile_core.h.
#include "prediction_core.h"
#include "product_core.h"
#include "row_core.h"
#include "similarity_core.h"

namespace cjepa {
namespace {

template <typename T, typename Operand = PlainOperand<T>>
struct Core {
  using P = typename Operand::P;
  using Similarity = SimilarityCore<T, Operand>;
  using Product = ProductCore<T, Operand>;
  using Row = RowCore<T, Operand>;

  // For a constinit variable: code that fills it on loading would be of this instruction set, on
  // every CPU.
  static constexpr TileCore<T, P> table() {
    return {Similarity::MR,
            Similarity::NR,
            &Similarity::scratch_size,
            &Similarity::similarity,
            &Product::coefficients,
            &Product::coefficients_over_rows,
            &Product::product,
            &Row::dot,
            &Row::add,
            &Row::normalize,
            &Row::pack,
            &Row::pack_product,
            &Row::finish,
            PredictionCore<T>::table()};
  }
};

}  // namespace
}  // namespace cjepa
