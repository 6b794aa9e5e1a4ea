// bf16 operands with the dot product of AVX512-BF16, which multiplies twice as many numbers in a
// cycle as an fp32 product.
#define CJEPA_VECTOR_BYTES 64
#define CJEPA_MICRO_ROWS 12
#define CJEPA_FENCE() _mm_sfence()
#define CJEPA_STREAM(p, x) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)(x))
#include <immintrin.h>

#include <cstdint>

#include "micro_tile.h"
#include "tile_core.h"
#include "tile_core_impl.h"

namespace cjepa {
namespace {

struct Bf16Operand {
  using P = Bf16Pair;
  using V = VectorOf<float>::type;
  using Packed = __m512bh;
  static constexpr int kNumbers = 2;
  typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
  static CJEPA_INLINE Packed load(const P* p) {
    return (Packed) * reinterpret_cast<const Words*>(p);
  }
  static CJEPA_INLINE Packed all(P x) { return (Packed)(Words{} + x); }
  static CJEPA_INLINE V multiply_add(V sum, Packed a, Packed b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
  static CJEPA_INLINE uint32_t high_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits >> 16;
  }
  // The rows are rounded to bf16 already.
  static CJEPA_INLINE P join(const float* row, int64_t k, int64_t features) {
    const float second = 2 * k + 1 < features ? row[2 * k + 1] : 0.0f;
    return high_half(row[2 * k]) | high_half(second) << 16;
  }
  static CJEPA_INLINE P join_rows(const float* x, int64_t stride) {
    return high_half(x[0]) | high_half(x[stride]) << 16;
  }
  // Coefficients are rounded here. A pair lies in one row or across two rows.
  static CJEPA_INLINE Halves round(V x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
  static CJEPA_INLINE void store_in_row(P* out, V x) { *reinterpret_cast<Halves*>(out) = round(x); }
  static CJEPA_INLINE void store_across_rows(P* out, const V (&x)[2]) {
    *reinterpret_cast<Words*>(out) = __builtin_convertvector(round(x[0]), Words) |
                                     __builtin_convertvector(round(x[1]), Words) << 16;
  }
};

}  // namespace

extern constinit const TileCore<float, Bf16Pair> kBf16Avx512 = Core<float, Bf16Operand>::table();

}  // namespace cjepa
