// Arguments of attention on row-major activations, one head of one image.
//
//   out[i, e] = sum over j of p[i, j] * v[j, e]
//   p[i, :]   = softmax over the keys j of (scale * sum over e of q[i, e] * k[j, e] + mask[i, j])
//
// A query of which the mask leaves no key gives zeros.
#pragma once

#include <cstdint>

namespace fxprune {

struct AttentionRows {
  const float* q;      // [queries][q_pitch]
  const float *k, *v;  // [keys][k_pitch], [keys][v_pitch]
  const float* mask;   // [queries][mask_pitch] or null
  float* out;          // [queries][out_pitch]
  int64_t depth, queries, keys;
  float scale;                                               // above 0
  int64_t q_pitch, k_pitch, v_pitch, mask_pitch, out_pitch;  // mask_pitch 0: one row for all
};

}  // namespace fxprune
