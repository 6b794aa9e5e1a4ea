#define CJEPA_VECTOR_BYTES 64
#define CJEPA_MICRO_ROWS 12  // 24 accumulators of 32 registers
#define CJEPA_FENCE() _mm_sfence()
#define CJEPA_STREAM(p, x) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)(x))
#include <immintrin.h>

#include "tile_core_impl.h"

namespace cjepa {
extern constinit const TileCore<float, float> kFloatAvx512 = Core<float>::table();
extern constinit const TileCore<double, double> kDoubleAvx512 = Core<double>::table();
}  // namespace cjepa
