#define CJEPA_VECTOR_BYTES 32
#define CJEPA_MICRO_ROWS 6  // 12 accumulators of 16 registers
#include "tile_core_impl.h"

namespace cjepa {
extern const TileCore<float> kTileCoreFloatAvx2 = Core<float>::table();
extern const TileCore<double> kTileCoreDoubleAvx2 = Core<double>::table();
}  // namespace cjepa
