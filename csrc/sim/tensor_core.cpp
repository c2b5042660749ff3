// The matrix instructions of the simulator, from their layouts in the PTX manual.
#include <vector>

#include "sim/ptx.h"

namespace fxprune::gpu {
namespace {

using sim::Plant;

uint16_t half_of(uint32_t word, int part) {
  return static_cast<uint16_t>(word >> (16 * part));
}

// A matrix operand in shared memory as a wgmma descriptor gives it: elements that follow each other
// along m (or n), K rows of 128 bytes, 128-byte swizzle.
struct Operand {
  char* base;
  uint32_t start, panel;

  Operand(char* shared, uint64_t descriptor) : base(shared) {
    start = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
    panel = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) * 16;
    const uint32_t eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
    if (descriptor >> 62 != 1) sim::fault("gives wgmma a descriptor without the 128-byte swizzle");
    if (eight_rows != 1024) sim::fault("gives wgmma rows that are not 128 bytes apart");
    if (start % 1024 != 0) sim::fault("gives wgmma an operand that does not begin a swizzle atom");
  }
  const char* at(int k, int m) const {
    uint32_t address = start + m / 64 * panel + k / 8 * 1024 + k % 8 * 128 + m % 64 * 2;
    address ^= (address >> 7 & 7) << 4;
    if (sim::planted() == Plant::kSwizzle) address ^= 16;
    return base + address;
  }
};

}  // namespace

float shuffle_xor(float value, int mask) {
  struct Lane {
    float value, result;
    int mask;
  } lane{value, 0, mask};
  sim::collective("a shuffle", 32, &lane, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane* own = static_cast<Lane*>(lanes[i]);
      own->result = static_cast<Lane*>(lanes[(i ^ own->mask) & 31])->value;
    }
  });
  return lane.result;
}

namespace {

void load_four(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Lane {
    uint16_t row[8];
    uint32_t* r;
    bool transposed;
  } lane;
  const char* at = static_cast<const char*>(row);
  if (sim::planted() == Plant::kSwizzle) at = shared_memory() + (shared_address(row) ^ 16);
  sim::read_shared(lane.row, at, 16);
  lane.r = r;
  lane.transposed = transposed;
  sim::collective("ldmatrix", 32, &lane, [](void* const* lanes) {
    const int rotate = sim::planted() == Plant::kLaneMap ? 8 : 0;
    for (int i = 0; i < 32; ++i) {
      Lane* own = static_cast<Lane*>(lanes[i]);
      for (int j = 0; j < 4; ++j) {
        const auto element = [&](int k) {
          const int across = 2 * (i % 4) + k, down = i / 4;
          const int from = (8 * j + (own->transposed ? across : down) + rotate) % 32;
          return static_cast<const Lane*>(lanes[from])->row[own->transposed ? down : across];
        };
        own->r[j] = element(0) | static_cast<uint32_t>(element(1)) << 16;
      }
    }
  });
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const void* row) {
  load_four(r, row, false);
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_four(r, row, true);
}

// d += a * b of a warp: thread i holds rows i / 4 and 8 further, columns 2 * (i % 4) and the next.
template <class Lane, int K>
static void accumulate(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  const int flip = sim::planted() == Plant::kAccumulatorRow ? 1 : 0;
  for (int i = 0; i < 32; ++i) {
    Lane* own = static_cast<Lane*>(lanes[i]);
    for (int e = 0; e < 4; ++e) {
      const int row = i / 4 + 8 * ((e / 2) ^ flip), column = 2 * (i % 4) + e % 2;
      double sum = own->d[e];
      for (int k = 0; k < K; ++k) sum += double{a[row][k]} * b[k][column];
      own->d[e] = static_cast<float>(sum);
    }
  }
}

void multiply_warp(float* d, const uint32_t* a, const uint32_t* b, float (*convert)(uint16_t)) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    float (*convert)(uint16_t);
  } lane{d, a, b, convert};
  sim::collective("mma.sync", 32, &lane, [](void* const* lanes) {
    float a_full[16][16], b_full[16][8];
    for (int i = 0; i < 32; ++i) {
      const Lane* own = static_cast<const Lane*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int pair = 0; pair < 2; ++pair) {
        for (int j = 0; j < 4; ++j) {
          a_full[g + 8 * (j % 2)][2 * t + 8 * (j / 2) + pair] =
              own->convert(half_of(own->a[j], pair));
        }
        for (int j = 0; j < 2; ++j) {
          b_full[2 * t + 8 * j + pair][g] = own->convert(half_of(own->b[j], pair));
        }
      }
    }
    accumulate<Lane>(lanes, a_full, b_full);
  });
}

void multiply_16x8x8(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    uint32_t a[4], b[2];
  } lane{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  sim::collective("mma.sync of TF32", 32, &lane, [](void* const* lanes) {
    const auto read = [](uint32_t bits) { return float_of_bits(bits & ~uint32_t{0x1fff}); };
    float a_full[16][8], b_full[8][8];
    for (int i = 0; i < 32; ++i) {
      const Lane* own = static_cast<const Lane*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int j = 0; j < 4; ++j) a_full[g + 8 * (j % 2)][t + 4 * (j / 2)] = read(own->a[j]);
      for (int j = 0; j < 2; ++j) b_full[t + 4 * j][g] = read(own->b[j]);
    }
    accumulate<Lane>(lanes, a_full, b_full);
  });
}

void multiply_warp_sparse(float* d, const uint32_t* a, const uint32_t* b, uint32_t places, int pair,
                          float (*convert)(uint16_t)) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    uint32_t places;
    int pair;
    float (*convert)(uint16_t);
  } lane{d, a, b, places, pair, convert};
  sim::collective("mma.sp", 32, &lane, [](void* const* lanes) {
    const auto of = [lanes](int i) { return static_cast<const Lane*>(lanes[i]); };
    const int pair = of(0)->pair ^ (sim::planted() == Plant::kPlaces ? 1 : 0);
    float a_full[16][32] = {}, b_full[32][8];
    for (int i = 0; i < 32; ++i) {
      const Lane* own = of(i);
      const int g = i / 4, t = i % 4;
      for (int j = 0; j < 4; ++j) {
        for (int part = 0; part < 2; ++part) {
          b_full[8 * j + 2 * t + part][g] = own->convert(half_of(own->b[j], part));
          // Kept element `column` of 16 of a row: one of two in a group of four k.
          const int row = g + 8 * (j % 2), column = 2 * t + 8 * (j / 2) + part;
          const uint32_t word = of(4 * g + 2 * pair + column / 8)->places >> (16 * (j % 2));
          const uint32_t group = word >> (column % 8 / 2 * 4) & 15;
          if ((group & 3) >= group >> 2) {
            sim::fault("gives mma.sp places of kept elements that do not rise");
          }
          const int place = static_cast<int>(part == 0 ? group & 3 : group >> 2);
          a_full[row][column / 2 * 4 + place] = own->convert(half_of(own->a[j], part));
        }
      }
    }
    accumulate<Lane>(lanes, a_full, b_full);
  });
}

void product_fence() {
  sim::collective("wgmma.fence", 128, nullptr, [](void* const*) { sim::product_fence(); });
}

void product_commit() {
  sim::collective("wgmma.commit_group", 128, nullptr, [](void* const*) { sim::product_commit(); });
}

void product_wait_for(int groups_left) {
  sim::collective("wgmma.wait_group", 128, nullptr,
                  [groups_left](void* const*) { sim::product_wait(groups_left); });
}

void multiply_warpgroup(float* d, uint64_t a, uint64_t b, bool accumulate,
                        float (*convert)(uint16_t)) {
  struct Lane {
    float* d;
    uint64_t a, b;
    bool accumulate;
    float (*convert)(uint16_t);
  } lane{d, a, b, accumulate, convert};
  sim::collective("wgmma.mma_async", 128, &lane, [](void* const* lanes) {
    const Lane first = *static_cast<const Lane*>(lanes[0]);
    std::vector<float*> sums(128);
    for (int i = 0; i < 128; ++i) {
      const Lane* own = static_cast<const Lane*>(lanes[i]);
      if (own->a != first.a || own->b != first.b || own->accumulate != first.accumulate) {
        sim::fault("gives wgmma other operands than the rest of its warpgroup");
      }
      sums[i] = own->d;
    }
    const Operand left(shared_memory(), first.a), right(shared_memory(), first.b);
    sim::Product product;
    product.operands = [left, right](const std::function<void(const char*)>& visit) {
      for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < 64; ++m) visit(left.at(k, m));
        for (int n = 0; n < 128; ++n) visit(right.at(k, n));
      }
    };
    product.run = [left, right, first, sums] {
      std::vector<float> l(64 * 16), r(128 * 16);
      const auto element = [&first](const char* at) {
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        return first.convert(bits);
      };
      for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < 64; ++m) l[m * 16 + k] = element(left.at(k, m));
        for (int n = 0; n < 128; ++n) r[n * 16 + k] = element(right.at(k, n));
      }
      const int flip = sim::planted() == Plant::kAccumulatorRow ? 1 : 0;
      for (int i = 0; i < 128; ++i) {
        for (int e = 0; e < 64; ++e) {
          const int row = i / 32 * 16 + i % 32 / 4 + 8 * ((e / 2 % 2) ^ flip);
          const int column = e / 4 * 8 + i % 4 * 2 + e % 2;
          double sum = first.accumulate ? sums[i][e] : 0.0;
          for (int k = 0; k < 16; ++k) sum += double{l[row * 16 + k]} * r[column * 16 + k];
          sums[i][e] = static_cast<float>(sum);
        }
      }
    };
    sim::product_issue(std::move(product));
  });
}

}  // namespace fxprune::gpu
