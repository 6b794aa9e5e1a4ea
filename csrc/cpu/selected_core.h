// The tile core of the instruction set in use (see instruction_sets.h).
#pragma once

#include "core/tile_core.h"

namespace cjepa {

template <typename T, typename P>
const TileCore<T, P>& tile_core();

// Whether there is a core for pairs of bf16 numbers. Without one, bf16 operands are multiplied as
// fp32.
bool has_bf16_core();

}  // namespace cjepa
