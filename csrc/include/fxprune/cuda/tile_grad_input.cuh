// The gradient of the tile-wise GEMM's input over kept weights.
//
// A block computes 64 rows of dx (K rows, or channels under a window) for some pixels. It goes
// through the pieces of its rows (TilePieces), one per tile and tap: the piece's weights, only the
// kept rows of them, are multiplied by the tile's rows of g on the tensor cores or the ordinary
// ones, and the products are added in shared memory to the rows of dx they belong to. So the work
// follows the kept weights, and nothing is added by two threads at once.
#pragma once

#include <type_traits>

#include "fxprune/cuda/tile_pieces.cuh"

namespace fxprune::gpu {

// A place in the block's pieces: piece after piece of kept rows, its features in stages.
struct PieceWalk {
  int64_t tile, piece;
  int64_t first;   // feature of the tile that the stage begins with
  int64_t width;   // features of the tile
  int tap, count;  // kept rows; 0 at the end

  FXPRUNE_GPU static PieceWalk begin(const TileGradientArgs& a, int64_t channel_block,
                                     int64_t group) {
    PieceWalk walk = {};
    walk.tap = -1;
    walk.next_piece(a, channel_block, group);
    return walk;
  }

  FXPRUNE_GPU void next(const TileGradientArgs& a, int64_t channel_block, int64_t group,
                        int features) {
    first += features;
    if (first >= width) next_piece(a, channel_block, group);
  }

  FXPRUNE_GPU void next_piece(const TileGradientArgs& a, int64_t channel_block, int64_t group) {
    const TileGemmArgs& g = a.gemm;
    first = 0;
    count = 0;
    for (;;) {
      if (++tap == a.taps()) {
        tap = 0;
        ++tile;
      }
      if (tile >= g.tiles) return;
      if (a.groups() > 1 &&
          load_global<int32_t>(g.columns + tile * g.granularity) / (g.n / a.groups()) != group) {
        tap = a.taps() - 1;
        continue;
      }
      piece = a.piece_at(tile, channel_block, tap);
      count = load_global<int32_t>(a.counts + piece);
      if (count > 0) break;
    }
    const int64_t left_over = g.kept - tile * g.granularity;
    width = left_over < g.granularity ? left_over : g.granularity;
  }

  // What the piece holds in place `i`.
  FXPRUNE_GPU uint32_t entry(const TileGradientArgs& a, int i) const {
    return load_global<uint32_t>(a.pieces + piece * kPieceRows + i);
  }
};

// Products of a stage on the tensor cores: 64 rows x 128 pixels, 64 features at a time. Rows of
// weights are those of the image.
template <class T>
struct GradientMma {
  static constexpr int kThreads = 128, kBlocks = 2, kTokens = 128, kFeatures = 64;
  static constexpr int kWeightBytes = kPanelBytes, kTokenRun = 8;
  static constexpr int kStageBytes = kWeightBytes + kTokens / kPanel * kPanelBytes;

  static FXPRUNE_GPU void copy_weights(const TileGradientArgs& a, const PieceWalk& walk,
                                       char* stage) {
    const TileGemmArgs& g = a.gemm;
    const int64_t before =
        load_global<int32_t>(static_cast<const int32_t*>(g.image) + g.tiles + walk.tile);
    const char* blocks_at = static_cast<const char*>(g.image) + g.layout().table_bytes() +
                            before * g.layout().block_bytes() + walk.first / kPanel * kPanelBytes;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kPieceRows * 8 / kThreads; ++i) {
      const int at = thread() + i * kThreads, s = at / 8, f = at % 8 * 8;
      if (s >= (walk.count + 15) / 16 * 16) continue;
      const uint32_t entry = walk.entry(a, s);
      const bool real = entry != kNoRow;
      const int64_t row = real ? entry / kPieceRows : 0;
      const char* from = blocks_at + row / kBlockRows * g.layout().block_bytes() +
                         panel_offset(static_cast<int>(row % kBlockRows), f);
      copy_async<16>(stage + panel_offset(s, f), from, real);
    }
  }

  // Where eight pixels of feature f go.
  static FXPRUNE_GPU char* token_slot(char* stage, int f, int column) {
    return stage + kWeightBytes + column / kPanel * kPanelBytes + panel_offset(f, column % kPanel);
  }

  struct Sums {
    float v[4][4][4];
  };

  // A warp owns 32 pixels and all rows.
  static FXPRUNE_GPU void multiply(const char* stage, int count, Sums& sums) {
    const int lane = thread() % 32, token = thread() / 32 * 32;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kFeatures; k += 16) {
      uint32_t b[2][4];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 2; ++j) {
        const int row = k + lane / 8 % 2 * 8 + lane % 8, column = token + 16 * j + lane / 16 * 8;
        load_matrices_transposed(b[j], stage + kWeightBytes + column / kPanel * kPanelBytes +
                                           panel_offset(row, column % kPanel));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        if (16 * i >= count) continue;
        uint32_t w[4];
        load_matrices(w, stage + panel_offset(16 * i + lane % 16, k + lane / 16 * 8));
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sums.v[i][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Adds the piece's products to rows of `total` that are `pitch` floats apart, and clears them.
  static FXPRUNE_GPU void add(const TileGradientArgs& a, const PieceWalk& walk, Sums& sums,
                              char* total, int pitch) {
    const int lane = thread() % 32, token = thread() / 32 * 32 + lane % 4 * 2;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; ++i) {
      const int s = 8 * i + lane / 4;
      if (s < walk.count) {
        const int row = static_cast<int>(walk.entry(a, s) % kPieceRows);
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          FXPRUNE_UNROLLED
          for (int e = 0; e < 2; ++e) {
            char* at = total + 4 * (row * pitch + token + 8 * j + e);
            store_shared<float>(at, load_shared<float>(at) + sums.v[i / 2][j][i % 2 * 2 + e]);
          }
        }
      }
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) sums.v[i / 2][j / 2][i % 2 * 2 + j % 2] = 0.0f;
    }
  }
};

// The same on the ordinary cores: 64 rows x 64 pixels, 16 features at a time, a thread 4 x 4.
struct GradientFfma {
  static constexpr int kThreads = 256, kBlocks = 2, kTokens = 64, kFeatures = 16;
  static constexpr int kWeightBytes = kFeatures * kPieceRows * 4, kTokenRun = 1;
  static constexpr int kStageBytes = kWeightBytes + kFeatures * kTokens * 4;

  static FXPRUNE_GPU void copy_weights(const TileGradientArgs& a, const PieceWalk& walk,
                                       char* stage) {
    const TileGemmArgs& g = a.gemm;
    const int64_t start = load_global<int32_t>(g.tile_ptr + walk.tile) * g.granularity;
    const float* values = static_cast<const float*>(g.values) + start + walk.first;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kPieceRows * kFeatures / kThreads; ++i) {
      const int at = thread() + i * kThreads, s = at / kFeatures, f = at % kFeatures;
      const uint32_t entry = walk.entry(a, s);
      const bool real = entry != kNoRow && walk.first + f < walk.width;
      const int64_t row = real ? entry / kPieceRows : 0;
      const float* from = values + row * walk.width + (real ? f : 0);
      copy_async<4>(stage + 4 * (f * kPieceRows + s), from, real);
    }
  }

  static FXPRUNE_GPU char* token_slot(char* stage, int f, int column) {
    return stage + kWeightBytes + 4 * (f * kTokens + column);
  }

  struct Sums {
    float v[4][4];
  };

  static FXPRUNE_GPU void multiply(const char* stage, int, Sums& sums) {
    const int tx = thread() % 16, ty = thread() / 16;
    FXPRUNE_UNROLLED
    for (int f = 0; f < kFeatures; ++f) {
      float w[4], g[4];
      Pack<float>::unpack(load_shared<Quad>(stage + 4 * (f * kPieceRows + 4 * ty)), w);
      Pack<float>::unpack(load_shared<Quad>(stage + kWeightBytes + 4 * (f * kTokens + 4 * tx)), g);
      FXPRUNE_UNROLLED
      for (int j = 0; j < 16; ++j) sums.v[j / 4][j % 4] += w[j / 4] * g[j % 4];
    }
  }

  static FXPRUNE_GPU void add(const TileGradientArgs& a, const PieceWalk& walk, Sums& sums,
                              char* total, int pitch) {
    const int tx = thread() % 16, ty = thread() / 16;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      const int s = 4 * ty + i;
      if (s < walk.count) {
        const int row = static_cast<int>(walk.entry(a, s) % kPieceRows);
        char* at = total + 4 * (row * pitch + 4 * tx);
        float sum[4];
        Pack<float>::unpack(load_shared<Quad>(at), sum);
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) sum[j] += sums.v[i][j];
        store_shared<Quad>(at, Pack<float>::pack(sum));
      }
      FXPRUNE_UNROLLED
      for (int j = 0; j < 4; ++j) sums.v[i][j] = 0.0f;
    }
  }
};

// Stages: of weights and g in shared memory at a time.
template <class T, bool Windowed, int Stages>
struct TileInputGradient {
  using Args = TileGradientArgs;
  using Product = std::conditional_t<sizeof(T) == 4, GradientFfma, GradientMma<T>>;
  static constexpr int kThreads = Product::kThreads, kBlocks = Product::kBlocks;
  static constexpr int kTokens = Product::kTokens, kRun = Product::kTokenRun;
  static constexpr int kFeatures = Product::kFeatures, kStages = Stages;
  static constexpr int kPitch = kTokens + 8;  // floats between rows of dx in shared memory
  static constexpr int kTotalBytes = kPieceRows * kPitch * 4;
  static constexpr int kSharedBytes = kStages * Product::kStageBytes + kTotalBytes;

  // A thread always copies the same pixels.
  using Tokens = GradientTokens<T, kRun>;
  struct NoTokens {
    FXPRUNE_GPU NoTokens(const Args&, int64_t) {}
  };
  using Window = std::conditional_t<Windowed, Tokens, NoTokens>;

  struct Item {
    int64_t pixel, image, channel_block, group;
  };

  static FXPRUNE_GPU Item item_of(const Args& a, int64_t i) {
    const int64_t pixel_blocks = (a.pixels() + kTokens - 1) / kTokens;
    Item item;
    item.pixel = i % pixel_blocks * kTokens;
    i /= pixel_blocks;
    item.image = i % a.gemm.batch;
    i /= a.gemm.batch;
    item.channel_block = i % a.channel_blocks();
    item.group = i / a.channel_blocks();
    return item;
  }

  static FXPRUNE_GPU void fill(const Args& a, const Item& item, const PieceWalk& walk,
                               const Window& window, char* stage) {
    const TileGemmArgs& g = a.gemm;
    Product::copy_weights(a, walk, stage);
    const int column = thread() % (kTokens / kRun) * kRun;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kFeatures * kTokens / kRun / kThreads; ++i) {
      const int f = thread() / (kTokens / kRun) + i * (kThreads / (kTokens / kRun));
      const bool real = walk.first + f < walk.width;
      const int64_t place = walk.tile * g.granularity + walk.first + f;
      const int64_t feature = real ? load_global<int32_t>(g.columns + place) : 0;
      const T* plane = static_cast<const T*>(a.grad) + (item.image * g.n + feature) * g.m;
      char* slot = Product::token_slot(stage, f, column);
      if constexpr (Windowed) {
        copy_seen(g.window, walk.tap, window, plane, real, slot);
      } else {
        copy_run(plane + item.pixel + column, g.m - item.pixel - column, a, real, slot);
      }
    }
  }

  // kRun elements in a row, of which `left` exist.
  static FXPRUNE_GPU void copy_run(const T* from, int64_t left, const Args& a, bool real,
                                   char* slot) {
    if constexpr (kRun == 1) {
      real = real && left > 0;
      copy_async<4>(slot, real ? from : a.grad, real);
    } else if (a.gemm.vector) {
      real = real && left > 0;
      copy_async<16>(slot, real ? from : a.grad, real);
    } else {
      uint16_t element[kRun];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kRun; ++j) {
        element[j] = real && j < left ? load_global<uint16_t>(from + j) : uint16_t{0};
      }
      store_shared<Quad>(slot, quad_of(element));
    }
  }

  // The elements of g that kRun pixels feed under a tap.
  static FXPRUNE_GPU void copy_seen(const TileWindow& w, int tap, const Tokens& tokens,
                                    const T* plane, bool real, char* slot) {
    if constexpr (kRun == 1) {
      const int64_t at = tokens.at(w, tap, 0);
      real = real && at >= 0;
      copy_async<4>(slot, real ? plane + at : plane, real);
    } else {
      uint16_t element[kRun];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kRun; ++j) {
        const int64_t at = tokens.at(w, tap, j);
        element[j] = real && at >= 0 ? load_global<uint16_t>(plane + at) : uint16_t{0};
      }
      store_shared<Quad>(slot, quad_of(element));
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const Item item = item_of(a, block(0));
    const Window window(a, item.pixel + thread() % (kTokens / kRun) * kRun);
    char* total = shared_memory() + kStages * Product::kStageBytes;
    for (int i = thread(); i < kPieceRows * kPitch; i += kThreads) {
      store_shared<float>(total + 4 * i, 0.0f);
    }
    typename Product::Sums sums = {};
    PieceWalk walk = PieceWalk::begin(a, item.channel_block, item.group), ahead = walk;
    int filled = 0;
    const auto fill_next = [&] {
      if (ahead.count > 0) {
        fill(a, item, ahead, window, shared_memory() + filled % kStages * Product::kStageBytes);
        ahead.next(a, item.channel_block, item.group, kFeatures);
        ++filled;
      }
      copy_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) fill_next();
    for (int i = 0; walk.count > 0; ++i) {
      copy_wait<kStages - 2>();
      barrier();  // the stage is there for all, and nobody reads the one before any more
      fill_next();
      const char* stage = shared_memory() + i % kStages * Product::kStageBytes;
      Product::multiply(stage, walk.count, sums);
      if (walk.first + kFeatures >= walk.width) Product::add(a, walk, sums, total, kPitch);
      walk.next(a, item.channel_block, item.group, kFeatures);
    }
    copy_wait<0>();
    barrier();
    store(a, item, total);
  }

  static FXPRUNE_GPU void store(const Args& a, const Item& item, const char* total) {
    constexpr int kWide = Pack<T>::kCount;
    const int64_t pixels = a.pixels();
    for (int i = thread(); i < kPieceRows * kTokens / kWide; i += kThreads) {
      const int row = i / (kTokens / kWide), column = i % (kTokens / kWide) * kWide;
      const int64_t channel = item.channel_block * kPieceRows + row;
      const int64_t left = pixels - item.pixel - column;
      if (channel >= a.channels() || left <= 0) continue;
      const int64_t plane = (item.image * a.groups() + item.group) * a.channels() + channel;
      T* out = static_cast<T*>(a.gemm.out) + plane * pixels + item.pixel + column;
      float v[kWide];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kWide; ++j) {
        v[j] = load_shared<float>(total + 4 * (row * kPitch + column + j));
      }
      if (a.gemm.vector) {
        store_global<Quad>(out, Pack<T>::pack(v));
      } else {
        FXPRUNE_UNROLLED
        for (int j = 0; j < kWide; ++j) {
          if (j < left) store_global<T>(out + j, from_float<T>(v[j]));
        }
      }
    }
  }
};

// All of `a` is set but `gemm.vector`; a window has groups > 0.
template <class T, class Launcher>
void tile_grad_input(Launcher& launcher, TileGradientArgs a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.gemm.vector = a.pixels() % Pack<T>::kCount == 0 && a.gemm.m % Pack<T>::kCount == 0 &&
                  aligned(a.grad) && aligned(a.gemm.out);
  if (a.piece_count() > 0) {
    const int64_t grid[3] = {a.channel_blocks() * a.taps(),
                             a.gemm.tiles < 65535 ? a.gemm.tiles : 65535, 1};
    launcher.template launch<TilePieces>(grid, TilePieces::kSharedBytes, a);
  }
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t grid[3] = {(a.pixels() + Kernel::kTokens - 1) / Kernel::kTokens * a.gemm.batch *
                                 a.channel_blocks() * a.groups(),
                             1, 1};
    launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
  };
  // Three stages hide more of the memory's latency, but not every GPU has room for them.
  const bool windowed = a.gemm.window.groups > 0;
  if constexpr (TileInputGradient<T, true, 3>::kSharedBytes > kLeastSharedBytes) {
    if (launcher.most_shared_bytes() < TileInputGradient<T, true, 3>::kSharedBytes) {
      if (windowed) return launch(TileInputGradient<T, true, 2>());
      return launch(TileInputGradient<T, false, 2>());
    }
  }
  if (windowed) return launch(TileInputGradient<T, true, 3>());
  launch(TileInputGradient<T, false, 3>());
}

}  // namespace fxprune::gpu
