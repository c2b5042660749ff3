// Arguments of attention on feature-major activations.
//
//   out[h, e, i] = sum over j of p[h, j, i] * v[h, e, j]
//   p[h, :, i]   = softmax over the keys j of (scale * sum over e of k[h, e, j] * q[h, e, i]
//                                              + mask[j, i])
//
// A query of which the mask leaves no key gives zeros. Scores and sums are float; p is rounded to
// the activations' type before it multiplies v, and divided by its sum afterwards.
#pragma once

#include <cstdint>

#include "fxprune/bf16.h"
#include "fxprune/tile_image.h"

namespace fxprune {

template <class T>
struct AttentionOf {
  const T* q;      // (heads * depth, queries)
  const T *k, *v;  // (heads * depth, keys)
  const T* mask;   // (keys, queries) or null
  T* out;          // (heads * depth, queries)
  int64_t heads, depth, queries, keys;
  float scale;                                                         // above 0
  int64_t q_gap = 0, k_gap = 0, v_gap = 0, mask_gap = 0, out_gap = 0;  // numbers between two rows

  int64_t blocks() const { return (queries + kPixels - 1) / kPixels; }
};

using AttentionBf16 = AttentionOf<Bf16>;

}  // namespace fxprune
