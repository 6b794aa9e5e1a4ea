#define CJEPA_VECTOR_BYTES 64
#define CJEPA_MICRO_ROWS 12  // 24 accumulators of 32 registers
#include "tile_core_impl.h"

namespace cjepa {
extern const TileCore<float> kTileCoreFloatAvx512 = Core<float>::table();
extern const TileCore<double> kTileCoreDoubleAvx512 = Core<double>::table();
}  // namespace cjepa
