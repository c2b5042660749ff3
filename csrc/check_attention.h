// What attention demands of its sizes, alone and as a step of a region.
#pragma once

#include <cmath>
#include <cstdint>

#include "check.h"

namespace fxprune {

// Checks and fills in all but what points to data.
inline void check_attention(int64_t features, int64_t queries, int64_t keys, int64_t heads,
                            float scale, AttentionBf16* a) {
  STD_TORCH_CHECK(heads >= 1 && features % heads == 0, "heads must divide the ", features,
                  " features of q, got ", heads);
  STD_TORCH_CHECK(keys >= 1, "attention needs at least one key");
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, "scale must be above 0, got ", scale);
  a->heads = heads, a->depth = features / heads, a->queries = queries, a->keys = keys;
  a->scale = scale;
}

}  // namespace fxprune
