// The GPU operators that others are made of.
#pragma once

#include "cuda/structure.h"

namespace fxprune::cuda_ops {

Tensor depthwise_taps(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
                      const OptionalTensor& bias_in, const IntList& kernel_size,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      const Text& activation);

Tensor tile_gemm(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                 const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                 const OptionalTensor& residual_in, const OptionalTensor& gate_in,
                 int64_t out_features, int64_t granularity, int64_t feature_dim,
                 const Text& activation);

// Rows (rows, columns) -> (columns, rows) in memory of its own.
Tensor transposed(const Tensor& x, int64_t rows, int64_t columns, gpu::Element element,
                  void* stream);

// False when FXPRUNE_CUDA_ISA=sm_80 leaves the kernels for newer GPUs unused.
bool newest_kernels();

}  // namespace fxprune::cuda_ops
