// The tile core of the instruction set in use.
#pragma once

#include "tile_core.h"

namespace cjepa {

template <typename T>
const TileCore<T>& tile_core();

}  // namespace cjepa
