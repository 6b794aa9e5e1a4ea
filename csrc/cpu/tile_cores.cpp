#include "tile_cores.h"

#include <string>

#include "../instruction_sets.h"

namespace cjepa {

extern const TileCore<float> kTileCoreFloatBaseline;
extern const TileCore<double> kTileCoreDoubleBaseline;
#ifdef __x86_64__
extern const TileCore<float> kTileCoreFloatAvx2, kTileCoreFloatAvx512;
extern const TileCore<double> kTileCoreDoubleAvx2, kTileCoreDoubleAvx512;
#endif

template <>
const TileCore<float>& tile_core<float>() {
#ifdef __x86_64__
  const std::string& set = selected_instruction_set();
  if (set == "avx512") return kTileCoreFloatAvx512;
  if (set == "avx2") return kTileCoreFloatAvx2;
#endif
  return kTileCoreFloatBaseline;
}

template <>
const TileCore<double>& tile_core<double>() {
#ifdef __x86_64__
  const std::string& set = selected_instruction_set();
  if (set == "avx512") return kTileCoreDoubleAvx512;
  if (set == "avx2") return kTileCoreDoubleAvx2;
#endif
  return kTileCoreDoubleBaseline;
}

}  // namespace cjepa
