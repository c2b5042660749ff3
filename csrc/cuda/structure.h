// A tile-packed weight and a convolution window as the CUDA operators get them.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/arguments.h"

namespace fxprune {

using IntList = std::vector<int64_t>;

inline void check_pair(const IntList& v, const char* name, int64_t least) {
  STD_TORCH_CHECK(v.size() == 2, name, " must have 2 entries, got ", v.size());
  for (int64_t entry : v) {
    STD_TORCH_CHECK(entry >= least && entry <= 1 << 20, name, " must lie in [", least,
                    ", 1048576], got ", entry);
  }
}

inline void check_windows(const IntList& kernel_size, const IntList& stride, const IntList& padding,
                          const IntList& dilation) {
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
}

template <class Conv>
void set_windows(const IntList& kernel_size, const IntList& stride, const IntList& padding,
                 const IntList& dilation, Conv* a) {
  a->kernel_h = kernel_size[0], a->kernel_w = kernel_size[1];
  a->stride_h = stride[0], a->stride_w = stride[1];
  a->pad_h = padding[0], a->pad_w = padding[1];
  a->dilation_h = dilation[0], a->dilation_w = dilation[1];
}

// The window of a checked convolution as the kernels' 32-bit fields.
template <class Conv, class Args>
void copy_windows(const Conv& g, Args* a) {
  int* const fields[] = {&a->kernel_h, &a->kernel_w, &a->stride_h,   &a->stride_w,
                         &a->pad_h,    &a->pad_w,    &a->dilation_h, &a->dilation_w};
  const int64_t values[] = {g.kernel_h, g.kernel_w, g.stride_h,   g.stride_w,
                            g.pad_h,    g.pad_w,    g.dilation_h, g.dilation_w};
  for (int i = 0; i < 8; ++i) *fields[i] = static_cast<int>(values[i]);
}

// The geometry of a convolution of x (B, C, H, W), an image on a GPU.
template <class Conv>
Conv check_image(const Tensor& x, const IntList& kernel_size, const IntList& stride,
                 const IntList& padding, const IntList& dilation) {
  check_windows(kernel_size, stride, padding, dilation);
  check_cuda_tensor(x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, H, W), got ", shape_of(x));
  Conv g{};
  g.batch = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  set_windows(kernel_size, stride, padding, dilation, &g);
  check_window(&g);
  return g;
}

// The sizes of a checked depthwise convolution as the kernels' fields.
inline void copy_sizes(const DepthwiseTaps& g, gpu::DepthwiseArgs* a) {
  a->batch = g.batch, a->channels = g.channels;
  a->height = small_size(g.height, "height"), a->width = small_size(g.width, "width");
  a->out_h = small_size(g.out_h, "height"), a->out_w = small_size(g.out_w, "width");
}

// The structure of a tile-packed weight: what shapes tell.
struct Structure {
  Tensor index, tile_ptr, columns;
  int64_t rows, kept, granularity, tiles;

  Structure(const Tensor& index_in, const Tensor& tile_ptr_in, const Tensor& columns_in,
            int64_t granularity_in, const Tensor& x)
      : index(list(index_in, "index", x)),
        tile_ptr(list(tile_ptr_in, "tile_ptr", x)),
        columns(list(columns_in, "columns", x)),
        rows(index.size(0)),
        kept(columns.size(0)) {
    STD_TORCH_CHECK(granularity_in >= 1, "granularity must be at least 1, got ", granularity_in);
    granularity = std::min(granularity_in, std::max<int64_t>(kept, 1));
    tiles = (kept + granularity - 1) / granularity;
    STD_TORCH_CHECK(tile_ptr.size(0) == tiles + 1, "tile_ptr must have ", tiles + 1,
                    " entries for ", kept, " columns in tiles of ", granularity, ", got ",
                    tile_ptr.size(0));
  }

  static Tensor list(const Tensor& t, const char* name, const Tensor& x) {
    STD_TORCH_CHECK(t.dim() == 1, name, " must have one dimension, got shape ", shape_of(t));
    return list_input(t, name, x, element_types().int32, "int32");
  }
  template <class T>
  static const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
  }
  void check_features(int64_t out_features) const {
    STD_TORCH_CHECK(out_features >= 0 && kept <= out_features, "columns must hold at most ",
                    out_features, " output features, got ", kept);
  }
  // The number of packed weights follows from the shapes but for the K rows of a narrower last
  // tile.
  bool may_hold(int64_t count) const {
    const int64_t missing = rows * granularity - count, narrower = tiles * granularity - kept;
    return narrower == 0 ? missing == 0
                         : missing >= 0 && missing % narrower == 0 && missing / narrower <= rows;
  }
  // bytes: in each element of `values`, where it holds bytes.
  void check_values(const Tensor& values, int64_t bytes = 1) const {
    STD_TORCH_CHECK(
        values.dim() == 1 && values.size(0) % bytes == 0 && may_hold(values.size(0) / bytes),
        "values must have ", tiles * granularity == kept ? "" : "at most ",
        rows * granularity * bytes, bytes == 1 ? " elements for " : " bytes for ", rows,
        " kept rows in tiles of ", granularity, ", got shape ", shape_of(values));
  }
  void check_count(int64_t nnz) const {
    STD_TORCH_CHECK(may_hold(nnz), "nnz must be ", tiles * granularity == kept ? "" : "at most ",
                    rows * granularity, " for ", rows, " kept rows in tiles of ", granularity,
                    ", got ", nnz);
  }
  // Sets the structure's part of an argument record.
  template <class Args>
  void fill(Args* a) const {
    a->index = data<int32_t>(index);
    a->tile_ptr = data<int32_t>(tile_ptr);
    a->columns = data<int32_t>(columns);
    a->kept = kept;
    a->granularity = granularity;
    a->tiles = tiles;
  }
};

// The weights of a structure: packed values of x's type, or the image of them that was made when
// the weight was packed: uint8, or int8 for 16-bit weights kept two in four. That of float32
// weights is their bytes, rounded to TF32.
struct PackedValues {
  gpu::TileImage layout;
  bool floats, is_image;
  Tensor values;
  OptionalTensor derived;

  // halves: whether the kernel takes the image of weights kept two in four.
  PackedValues(const Tensor& given, const Structure& structure, const Tensor& x,
               bool halves = false)
      : layout{structure.tiles, structure.rows, structure.granularity},
        floats(type_of(x) == element_types().float32),
        is_image(type_of(given) == aoti_torch_dtype_uint8() ||
                 (halves && !floats && type_of(given) == aoti_torch_dtype_int8())),
        values(is_image ? list_input(given, "values", x, type_of(given), "an image")
                        : like_input(given, "values", x)) {
    layout.halved = is_image && type_of(given) == aoti_torch_dtype_int8();
    if (floats || !is_image) {
      structure.check_values(values, is_image ? sizeof(float) : 1);
    } else {
      check_shape(values, "values", {layout.bytes()});
    }
    STD_TORCH_CHECK(!is_image || reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0,
                    "values, an image, must begin at a multiple of 16 bytes; clone() it");
  }

  // Sets the weights' part of `a`, whose structure is set, and derives an image where one is
  // missing.
  void fill(gpu::TileGemmArgs* a, void* stream) {
    a->values = values.const_data_ptr();
    a->halved = layout.halved;
    a->tf32 = floats && is_image;
    if (floats) return;
    if (!is_image) {
      derived = empty_like(values, {layout.bytes()}, aoti_torch_dtype_uint8());
      gpu::tile_image_cuda({layout, a->values, a->tile_ptr, a->kept, derived->mutable_data_ptr()},
                           stream);
    }
    a->image = (is_image ? values : *derived).const_data_ptr();
  }
};

}  // namespace fxprune
