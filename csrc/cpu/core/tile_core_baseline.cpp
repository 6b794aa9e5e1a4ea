// The instructions that every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define CJEPA_VECTOR_BYTES 16
#ifdef __aarch64__
#define CJEPA_MICRO_ROWS 12  // 24 accumulators of 32 registers
#else
#define CJEPA_MICRO_ROWS 6  // 12 accumulators of 16 registers
#endif
#include "tile_core_impl.h"

namespace cjepa {
extern constinit const TileCore<float, float> kFloatBaseline = Core<float>::table();
extern constinit const TileCore<double, double> kDoubleBaseline = Core<double>::table();
}  // namespace cjepa
