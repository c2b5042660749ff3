// The gradient of the tile-wise GEMM's weight: of kept weights alone, in the packed layout.
//
// A block computes 64 kept rows x 64 features of a tile over its part of the tokens, 64 (in float
// 16) at a time: the rows of x that the tile's index names, and the tile's rows of g. Where there
// are fewer blocks than a GPU wants, tokens are cut in parts, whose sums another kernel adds.
#pragma once

#include <type_traits>

#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_pieces.cuh"

namespace fxprune::gpu {

// Products of a stage on the tensor cores. Rows of both operands lie token after token, 16-byte
// chunk c of row r at chunk c ^ r%8.
template <class T>
struct WeightGradientMma {
  static constexpr int kThreads = 128, kBlocks = 3, kTokens = 64, kRun = 8, kStages = 4;
  static constexpr int kOperandBytes = 64 * kTokens * 2;

  static FXPRUNE_GPU char* slot(char* operand, int row, int token) {
    return operand + panel_offset(row, token);
  }

  // Warps: 2 along rows, 2 along features, of 32 each.
  float sums[2][4][4] = {};

  FXPRUNE_GPU void multiply(const char* stage) {
    const int lane = thread() % 32, warp = thread() / 32;
    const int row = warp / 2 * 32, feature = warp % 2 * 32;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kTokens; k += 16) {
      uint32_t b[2][4];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 2; ++j) {
        load_matrices(b[j], stage + kOperandBytes +
                                panel_offset(feature + 16 * j + lane / 16 * 8 + lane % 8,
                                             k + lane / 8 % 2 * 8));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < 2; ++i) {
        uint32_t x[4];
        load_matrices(x, stage + panel_offset(row + 16 * i + lane % 16, k + lane / 16 * 8));
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sums[i][j], x, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Calls keep(row, feature, sum) for each sum of this thread.
  template <class Keep>
  FXPRUNE_GPU void each(Keep keep) const {
    const int lane = thread() % 32, warp = thread() / 32;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 32; ++i) {
      const int e = i % 4, j = i / 4 % 4;
      const int row = warp / 2 * 32 + i / 16 * 16 + e / 2 * 8 + lane / 4;
      keep(row, warp % 2 * 32 + 8 * j + lane % 4 * 2 + e % 2, sums[i / 16][j][e]);
    }
  }
};

// The same on the ordinary cores; operands lie row after row for each token.
struct WeightGradientFfma {
  static constexpr int kThreads = 256, kBlocks = 2, kTokens = 16, kRun = 1, kStages = 3;
  static constexpr int kPitch = 68;  // floats between tokens: rows of one token in all banks
  static constexpr int kOperandBytes = kTokens * kPitch * 4;

  static FXPRUNE_GPU char* slot(char* operand, int row, int token) {
    return operand + 4 * (token * kPitch + row);
  }

  float sums[4][4] = {};

  FXPRUNE_GPU void multiply(const char* stage) {
    const int tx = thread() % 16, ty = thread() / 16;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kTokens; ++k) {
      float x[4], g[4];
      Pack<float>::unpack(load_shared<Quad>(stage + 4 * (k * kPitch + 4 * ty)), x);
      Pack<float>::unpack(load_shared<Quad>(stage + kOperandBytes + 4 * (k * kPitch + 4 * tx)), g);
      FXPRUNE_UNROLLED
      for (int j = 0; j < 16; ++j) sums[j / 4][j % 4] += x[j / 4] * g[j % 4];
    }
  }

  template <class Keep>
  FXPRUNE_GPU void each(Keep keep) const {
    FXPRUNE_UNROLLED
    for (int i = 0; i < 16; ++i) {
      keep(thread() / 16 * 4 + i / 4, thread() % 16 * 4 + i % 4, sums[i / 4][i % 4]);
    }
  }
};

template <class T, bool Windowed>
struct TileWeightGradient {
  using Args = TileGradientArgs;
  using Product = std::conditional_t<sizeof(T) == 4, WeightGradientFfma, WeightGradientMma<T>>;
  static constexpr int kThreads = Product::kThreads, kBlocks = Product::kBlocks;
  static constexpr int kTokens = Product::kTokens, kRun = Product::kRun;
  static constexpr int kStages = Product::kStages, kSide = 64;
  static constexpr int kStageBytes = 2 * Product::kOperandBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  using Tokens = WindowTokens<T, kRun>;

  struct Item {
    int64_t tile, row, feature, part;
    int64_t rows, width, from;  // of the tile: kept rows, features, first row of the index
  };

  // Blocks of 64 rows are numbered through all tiles; there may be fewer than the grid has.
  static FXPRUNE_GPU bool item_of(const Args& a, int64_t i, Item* item) {
    const TileGemmArgs& g = a.gemm;
    item->part = i % a.parts;
    i /= a.parts;
    item->feature = i % g.layout().panels() * kSide;
    i /= g.layout().panels();
    const int32_t* first_block = a.table + g.tiles;
    if (i >= load_global<int32_t>(first_block + g.tiles)) return false;
    int64_t low = 0, high = g.tiles - 1;  // the last tile that begins at most there
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (load_global<int32_t>(first_block + middle) <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    item->tile = low;
    item->row = (i - load_global<int32_t>(first_block + low)) * kSide;
    item->from = load_global<int32_t>(g.tile_ptr + low);
    item->rows = load_global<int32_t>(g.tile_ptr + low + 1) - item->from;
    const int64_t left_over = g.kept - low * g.granularity;
    item->width = left_over < g.granularity ? left_over : g.granularity;
    return item->feature < item->width;
  }

  static FXPRUNE_GPU void fill(const Args& a, const Item& item, int64_t stage, char* to) {
    const TileGemmArgs& g = a.gemm;
    const int64_t per_image = stages_per_image(g.m);
    const int64_t image = stage / per_image, token = stage % per_image * kTokens;
    constexpr int kAcross = kTokens / kRun;
    const int column = thread() % kAcross * kRun;
    const int64_t left = g.m - token - column;
    if constexpr (Windowed) {
      const Tokens tokens(g, item.tile, image, token + column);
      FXPRUNE_UNROLLED
      for (int i = 0; i < kSide * kAcross / kThreads; ++i) {
        const int row = thread() / kAcross + i * (kThreads / kAcross);
        const bool real = item.row + row < item.rows;
        const int32_t k =
            real ? load_global<int32_t>(g.index + item.from + item.row + row) : int32_t{0};
        copy_seen(g.window, tokens, k, real, Product::slot(to, row, column));
      }
    } else {
      const T* x = static_cast<const T*>(g.x) + image * g.k * g.m + token + column;
      FXPRUNE_UNROLLED
      for (int i = 0; i < kSide * kAcross / kThreads; ++i) {
        const int row = thread() / kAcross + i * (kThreads / kAcross);
        const bool real = item.row + row < item.rows;
        const int64_t k =
            real ? load_global<int32_t>(g.index + item.from + item.row + row) : int32_t{0};
        copy_run(x + k * g.m, real ? left : 0, a, Product::slot(to, row, column));
      }
    }
    const T* grad = static_cast<const T*>(a.grad) + image * g.n * g.m + token + column;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kSide * kAcross / kThreads; ++i) {
      const int f = thread() / kAcross + i * (kThreads / kAcross);
      const bool real = item.feature + f < item.width;
      const int64_t place = item.tile * g.granularity + item.feature + f;
      const int64_t feature = real ? load_global<int32_t>(g.columns + place) : 0;
      copy_run(grad + feature * g.m, real ? left : 0, a,
               Product::slot(to + Product::kOperandBytes, f, column));
    }
  }

  // kRun tokens in a row, of which `left` exist.
  static FXPRUNE_GPU void copy_run(const T* from, int64_t left, const Args& a, char* slot) {
    if constexpr (kRun == 1) {
      copy_async<4>(slot, left > 0 ? from : a.grad, left > 0);
    } else if (a.gemm.vector) {
      copy_async<16>(slot, left > 0 ? from : a.grad, left > 0);
    } else {
      uint16_t element[kRun];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kRun; ++j)
        element[j] = j < left ? load_global<uint16_t>(from + j) : uint16_t{0};
      store_shared<Quad>(slot, quad_of(element));
    }
  }

  // K row `k` of kRun output pixels.
  static FXPRUNE_GPU void copy_seen(const TileWindow& w, const Tokens& tokens, int32_t k, bool real,
                                    char* slot) {
    const typename Tokens::Tap tap = Tokens::tap_of(w, k);
    if constexpr (kRun == 1) {
      bool inside;
      const T* from = tokens.at(w, tap, 0, &inside);
      inside = inside && real;
      copy_async<4>(slot, inside ? from : tokens.x, inside);
    } else {
      uint16_t element[kRun];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kRun; ++j) {
        bool inside;
        const T* from = tokens.at(w, tap, j, &inside);
        element[j] = real && inside ? load_global<uint16_t>(from) : uint16_t{0};
      }
      store_shared<Quad>(slot, quad_of(element));
    }
  }

  static FXPRUNE_BOTH int64_t stages_per_image(int64_t m) { return (m + kTokens - 1) / kTokens; }
  static FXPRUNE_BOTH int64_t stages(const Args& a) {
    return a.gemm.batch * stages_per_image(a.gemm.m);
  }

  static FXPRUNE_GPU void run(const Args& a) {
    Item item;
    if (!item_of(a, block(0), &item)) return;
    const int64_t all = stages(a), begin = all * item.part / a.parts,
                  end = all * (item.part + 1) / a.parts;
    Product product;
    through_ring<kStages, kStageBytes>(
        shared_memory(), end - begin, [&](int64_t i, char* to) { fill(a, item, begin + i, to); },
        [&](int64_t, const char* stage) { product.multiply(stage); });
    const int64_t start = item.from * a.gemm.granularity;
    product.each([&](int row, int f, float sum) {
      if (item.row + row >= item.rows || item.feature + f >= item.width) return;
      const int64_t at = start + (item.row + row) * item.width + item.feature + f;
      if (a.parts > 1) {
        store_global<float>(a.partial + item.part * a.nnz + at, sum);
      } else {
        store_global<T>(static_cast<T*>(a.gemm.out) + at, from_float<T>(sum));
      }
    });
  }
};

// Adds the parts of each weight's sum, first to last.
template <class T>
struct TileWeightParts {
  using Args = TileGradientArgs;
  static constexpr int kThreads = 256, kBlocks = 4;

  static FXPRUNE_GPU void run(const Args& a) {
    for (int64_t i = block(0) * kThreads + thread(); i < a.nnz; i += blocks(0) * kThreads) {
      float sum = 0.0f;
      for (int64_t part = 0; part < a.parts; ++part) {
        sum += load_global<float>(a.partial + part * a.nnz + i);
      }
      store_global<T>(static_cast<T*>(a.gemm.out) + i, from_float<T>(sum));
    }
  }
};

// Blocks of 64 rows x 64 features, at most: the rows of each tile are not known to the host.
FXPRUNE_BOTH int64_t weight_gradient_blocks(const TileGemmArgs& g) {
  return g.layout().most_blocks() * g.layout().panels();
}

// In how many parts the tokens are cut. It follows from sizes alone, so that any GPU rounds alike:
// enough for about 512 blocks, and at least eight stages in each.
template <class T>
int64_t weight_gradient_parts(const TileGradientArgs& a) {
  const int64_t blocks = weight_gradient_blocks(a.gemm);
  const int64_t most = TileWeightGradient<T, false>::stages(a) / 8;
  const int64_t wanted = blocks > 0 ? 512 / blocks : 1;
  return wanted < most ? (wanted > 1 ? wanted : 1) : (most > 1 ? most : 1);
}

// All of `a` is set but `gemm.vector`.
template <class T, class Launcher>
void tile_grad_weight(Launcher& launcher, TileGradientArgs a) {
  if (a.nnz == 0) return;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool windowed = a.gemm.window.groups > 0;
  a.gemm.vector =
      a.gemm.m % Pack<T>::kCount == 0 && aligned(a.grad) && (windowed || aligned(a.gemm.x));
  const int64_t table[3] = {a.gemm.tiles / TileTable::kThreads + 1, 1, 1};
  launcher.template launch<TileTable>(
      table, 0, {a.gemm.layout(), nullptr, a.gemm.tile_ptr, a.gemm.kept, a.table});
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t grid[3] = {weight_gradient_blocks(a.gemm) * a.parts, 1, 1};
    launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
  };
  if (windowed) {
    launch(TileWeightGradient<T, true>());
  } else {
    launch(TileWeightGradient<T, false>());
  }
  if (a.parts == 1) return;
  const int64_t wanted = (a.nnz + 255) / 256;
  const int64_t grid[3] = {wanted < 4096 ? wanted : 4096, 1, 1};
  launcher.template launch<TileWeightParts<T>>(grid, 0, a);
}

}  // namespace fxprune::gpu
