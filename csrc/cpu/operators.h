// The operators under the dispatch key CPU.
#pragma once

namespace cjepa {

// Their schemas, which Python defines. To be raised with every change to one of them.
inline constexpr int kSchemaVersion = 4;

// Not done on loading: Python first compares the schema versions.
void register_operators();

}  // namespace cjepa
