// Runs prepared attention on the thread pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/kernels.h"
#include "parallel.h"

namespace fxprune {

// Parts that the queries of each head are cut in, at most `most`. Heads are cut first: what is
// packed of a head's keys and values serves all of its queries. Few heads: their queries as well.
inline int64_t query_parts(int64_t heads, int64_t most, int64_t pool) {
  return pool == 1 ? 1 : std::clamp<int64_t>((2 * pool + heads - 1) / heads, 1, most);
}

inline void run_attention(const AttentionBf16& a, int64_t pool) {
  const Bf16Kernels& k = kernels().bf16;
  const int64_t blocks = a.blocks();
  if (a.heads == 0 || blocks == 0) return;
  const int64_t parts = query_parts(a.heads, blocks, pool);
  for_each_unit(a.heads * parts, pool, [&](int64_t unit) {
    const int64_t head = unit / parts, part = unit % parts;
    k.attention_bf16(a, head, blocks * part / parts, blocks * (part + 1) / parts,
                     scratch(k.attention_scratch(a)));
  });
}

}  // namespace fxprune
