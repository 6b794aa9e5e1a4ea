// Registers the operators under the dispatch key CPU.
#pragma once

namespace cjepa {

// The version of the schemas, which Python defines. If you change a schema, increase this number
// and SCHEMA_VERSION in cjepa_kernels/backends.py: Python uses no module of another version.
inline constexpr int kSchemaVersion = 7;

// Loading the module does not register anything: Python compares the schema versions first. A
// second call does nothing.
void register_operators();

}  // namespace cjepa
