// What the CUDA operators demand of their arguments, and where their work goes. Only shapes, types
// and devices are looked at: values stay on the GPU, so that nothing waits and CUDA graphs can
// record the call.
//
// With FXPRUNE_SIMULATED the operators take tensors of the CPU and run on the simulator
// (csrc/sim/operators.cpp), so that their checks and their hand-over are tested without a GPU.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "check.h"
#include "cuda/operators.h"

// Starts the registration of GPU operators, or of their simulated twins.
#ifdef FXPRUNE_SIMULATED
#define FXPRUNE_GPU_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fxprune_simulated, CPU, m)
#else
#define FXPRUNE_GPU_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fxprune, CUDA, m)
#endif

namespace fxprune {

// The element types of the CUDA kernels, as torch's C interface numbers them.
inline gpu::Element check_element(const Tensor& x) {
  static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(),
                                  aoti_torch_dtype_bfloat16()};
  const int32_t given = type_of(x);
  for (int i = 0; i < 3; ++i) {
    if (given == types[i]) return static_cast<gpu::Element>(i);
  }
  STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
}

inline bool on_gpu(const Tensor& t) {
#ifdef FXPRUNE_SIMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline void check_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(on_gpu(t) && t.get_device_index() == x.get_device_index(), name,
                  " must be on the GPU of x");
}

// An argument of x's type on x's GPU, made contiguous. Absent optionals stay absent.
inline Tensor like_input(const Tensor& t, const char* name, const Tensor& x) {
  check_device(t, name, x);
  STD_TORCH_CHECK(type_of(t) == type_of(x), name, " must have the type of x");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor like_input(const OptionalTensor& t, const char* name, const Tensor& x,
                                 const std::vector<int64_t>& shape) {
  if (!t.has_value()) return t;
  check_shape(*t, name, shape);
  return like_input(*t, name, x);
}

inline Tensor list_input(const Tensor& t, const char* name, const Tensor& x, int32_t type,
                         const char* type_name) {
  check_device(t, name, x);
  STD_TORCH_CHECK(type_of(t) == type, name, " must be ", type_name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline const void* address(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// An uninitialised tensor on the GPU of `like`.
inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& shape, int32_t type) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(),
                                                   static_cast<int64_t>(shape.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

#ifdef FXPRUNE_SIMULATED
inline void* current_stream(const Tensor&) {
  return nullptr;
}
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
#else
// torch's current stream on the GPU of x. The function lives in libtorch_cuda, which a CPU-only
// torch does not have, so it is looked up at the first call instead of linked.
inline void* current_stream(const Tensor& x) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(x.get_device_index(), &stream));
  return stream;
}

// Makes the GPU of a tensor the current one until the end of the scope.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {}
};
#endif

inline void check_cuda_tensor(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(on_gpu(x), name, " must be on a GPU");
}

// The kernels index within one plane by 32-bit integers.
inline int small_size(int64_t value, const char* what) {
  STD_TORCH_CHECK(value <= (int64_t{1} << 30), what, " must be at most 2**30, got ", value);
  return static_cast<int>(value);
}

}  // namespace fxprune
