// The functions of libcuda and libtorch_cuda that a launch plan calls. They are opened by name when
// the first plan is made, so this module is built and imported without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cjepa {

// CUtensorMap: how the tensor memory accelerator reads blocks of a matrix. The driver fills it.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// Names and arguments are those of the CUDA driver API. A function handle, a context and a stream
// are pointers here, because CUDA's headers are not needed to build this.
struct Driver {
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                       void* stream, void** parameters, void** extra);
  int (*encode_tensor_map)(TensorMap* map, int dtype, unsigned rank, void* address,
                           const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle,
                           int l2_promotion, int fill);
  int (*fill_bytes)(uint64_t address, unsigned char value, size_t bytes, void* stream);
  int (*get_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*get_parameter)(void* function, size_t index, size_t* offset, size_t* size);
  int (*get_error_string)(int code, const char** text);
  int (*get_stream)(int32_t device, void** stream);  // of PyTorch: the current stream of a device
};

// Opens both libraries. The path of libtorch_cuda is that of the library that PyTorch has loaded.
// Throws std::runtime_error if a library or a function is missing. Once it has succeeded, further
// calls do nothing.
void open_driver(const std::string& libcuda, const std::string& libtorch_cuda);

// Throws std::logic_error before open_driver has succeeded.
const Driver& driver();

// Throws std::runtime_error with CUDA's own words unless the code means success.
void check_driver(int code, const char* call);

// Makes a context current on this thread while it lives. Autograd's threads may have none.
class CurrentContext {
 public:
  explicit CurrentContext(void* context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace cjepa
