#include "selected_core.h"

#include <stdexcept>
#include <string>

#include "../instruction_sets.h"

namespace cjepa {

using FloatCore = TileCore<float, float>;
using DoubleCore = TileCore<double, double>;
using Bf16Core = TileCore<float, Bf16Pair>;

extern const FloatCore kFloatBaseline;
extern const DoubleCore kDoubleBaseline;
#ifdef __x86_64__
extern const FloatCore kFloatAvx2, kFloatAvx512;
extern const DoubleCore kDoubleAvx2, kDoubleAvx512;
extern const Bf16Core kBf16Avx512;
#endif

namespace {

struct Cores {
  const FloatCore* f32;
  const DoubleCore* f64;
  const Bf16Core* bf16;  // null if the instruction set has none
};

Cores select() {
#ifdef __x86_64__
  const std::string& set = selected_instruction_set();
  if (set == "avx512_bf16") return {&kFloatAvx512, &kDoubleAvx512, &kBf16Avx512};
  if (set == "avx512") return {&kFloatAvx512, &kDoubleAvx512, nullptr};
  if (set == "avx2") return {&kFloatAvx2, &kDoubleAvx2, nullptr};
#endif
  return {&kFloatBaseline, &kDoubleBaseline, nullptr};
}

const Cores& cores() {
  static const Cores selected = select();
  return selected;
}

}  // namespace

template <>
const FloatCore& tile_core<float, float>() {
  return *cores().f32;
}

template <>
const DoubleCore& tile_core<double, double>() {
  return *cores().f64;
}

template <>
const Bf16Core& tile_core<float, Bf16Pair>() {
  if (!has_bf16_core()) throw std::logic_error("no bf16 core in this instruction set");
  return *cores().bf16;
}

bool has_bf16_core() { return cores().bf16 != nullptr; }

}  // namespace cjepa
