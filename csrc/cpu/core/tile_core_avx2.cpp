#define CJEPA_VECTOR_BYTES 32
#define CJEPA_MICRO_ROWS 6  // 12 accumulators of 16 registers
#define CJEPA_FENCE() _mm_sfence()
#define CJEPA_STREAM(p, x) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)(x))
#include <immintrin.h>

#include "tile_core_impl.h"

namespace cjepa {
extern constinit const TileCore<float, float> kFloatAvx2 = Core<float>::table();
extern constinit const TileCore<double, double> kDoubleAvx2 = Core<double>::table();
}  // namespace cjepa
