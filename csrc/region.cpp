// fxprune::region: a chain of operators as one call, from a program of step records
// (region_program.h), which is read once for each set of sizes.
//
// Intermediate values live in an arena with planned offsets and never become tensors. With at least
// one image per thread, every thread takes whole images through the whole program, so that nothing
// waits and an image's values stay in its core's cache; a few images take the late steps, whose
// values are small, in turn, so that weights stay there as well. Otherwise images run one after the
// other, each step cut over the threads, which stay together for the whole call. Steps at the end
// that multiply one row an image (a classifier) wait for all images: their weights are then read
// once.
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "geometry_cache.h"
#include "parallel.h"
#include "region_program.h"
#include "region_weights.h"
#include "run_attention.h"
#include "run_block.h"
#include "run_block_bf16.h"
#include "run_norm.h"
#include "run_pool.h"
#include "run_products.h"
#include "run_split.h"

namespace fxprune {
namespace {

template <class T>
class Region {
  using Program = RegionProgram<T>;
  using Step = typename Program::Step;

 public:
  // bases: of image 0 of every value, null where it is in the arena.
  Region(const Program& program, const RegionWeights<T>& weights, const std::vector<T*>& bases)
      : program_(program), weights_(weights), bases_(bases) {}

  void run() const {
    const int64_t pool = torch::stable::get_num_threads(), batch = program_.batch();
    const int64_t steps = static_cast<int64_t>(program_.steps().size());
    if (batch >= pool && batch > 1) {
      run_crew(pool, 1, [&] { for_each_unit(steps, pool, [&](int64_t s) { weights_.check(s); }); });
      const int64_t most = RegionPlan<T>::kTogether * pool,
                    groups = std::min(batch, (batch + most - 1) / most * pool);
      for_each_unit(groups, pool, [&](int64_t group) {
        run_images(batch * group / groups, batch * (group + 1) / groups);
      });
      run_tail(pool);
    } else {
      Arena arena(bytes(1, pool));
      const Room room = room_of(arena, pool);
      run_crew(pool, batch * steps * kSections, [&] {
        for (int64_t image = 0; image < batch; ++image) run_image(image, room, pool, image == 0);
        check(program_.plan().tail(), steps);
        run_tail(pool);
      });
    }
  }

 private:
  static constexpr bool kBf16 = Program::kBf16;
  static constexpr int64_t kSections = 2;  // most that a step is cut in

  // Where an image's values are: sums of split products, then those of early steps, then those of
  // late ones.
  struct Room {
    float* sums;
    T *early, *late;
    T* of(const Value& v) const { return (v.late ? late : early) + v.offset; }
  };
  int64_t bytes(int64_t images, int64_t pool) const {
    const RegionPlan<T>& plan = program_.plan();
    return sums(pool) * static_cast<int64_t>(sizeof(float)) +
           (plan.early_arena() + images * plan.late_arena()) * static_cast<int64_t>(sizeof(T));
  }
  Room room_of(Arena& arena, int64_t pool, int64_t image = 0) const {
    float* data = arena.data<float>();
    T* values = reinterpret_cast<T*>(data + sums(pool));
    return {data, values,
            values + program_.plan().early_arena() + image * program_.plan().late_arena()};
  }

  T* at(int64_t id, int64_t image, const Room& room) const {
    const Value& v = program_.values()[id];
    return bases_[id] != nullptr ? bases_[id] + image * floats(v.shape) : room.of(v);
  }

  int64_t gap(int64_t id) const { return id < 0 ? 0 : program_.values()[id].gap; }

  // The product of a step, ready to run.
  TileGemmOf<T> product(const Step& step, int64_t image, const Room& room) const {
    TileGemmOf<T> a = step.gemm;
    weights_.attach(step, &a);
    a.x = at(step.x, image, room), a.out = at(step.out, image, room);
    if (step.residual >= 0) a.residual = at(step.residual, image, room);
    if (step.gate >= 0) a.gate = at(step.gate, image, room);
    a.x_gap = gap(step.x), a.residual_gap = gap(step.residual), a.out_gap = gap(step.out);
    return a;
  }
  DepthwiseTapsOf<T> depthwise(const Step& step, int64_t image, const Room& room) const {
    DepthwiseTapsOf<T> a = step.depthwise;
    weights_.attach(step, &a);
    a.x = at(step.x, image, room), a.out = at(step.out, image, room);
    a.x_gap = gap(step.x), a.out_gap = gap(step.out);
    return a;
  }
  TileConvOf<T> convolution(const Step& step, int64_t image, const Room& room) const {
    TileConvOf<T> a = step.conv;
    weights_.attach(step, &a);
    a.x = at(step.x, image, room), a.out = at(step.out, image, room);
    if (step.residual >= 0) a.residual = at(step.residual, image, room);
    return a;
  }
  AttentionBf16 attention(const Step& step, int64_t image, const Room& room) const {
    AttentionBf16 a = step.attention;
    a.q = at(step.x, image, room), a.k = at(step.k, image, room);
    a.v = at(step.v, image, room), a.out = at(step.out, image, room);
    if (step.mask >= 0) a.mask = at(step.mask, image, room);
    a.q_gap = gap(step.x), a.k_gap = gap(step.k), a.v_gap = gap(step.v);
    a.mask_gap = gap(step.mask), a.out_gap = gap(step.out);
    return a;
  }

  void check(size_t begin, size_t end) const {
    for (size_t s = begin; s < end; ++s) weights_.check(s);
  }

  // Floats that hold the sums of split products, whichever are.
  int64_t sums(int64_t pool) const {
    if constexpr (!kBf16) {
      for (const Step& step : program_.steps())
        if (step.code == Step::kGemm && splits_k(step.gemm, step.feature_major, pool))
          return pool * kSumsStride;
    }
    return 0;
  }

  // first: whether what the steps read is still to be checked.
  void run_image(int64_t image, const Room& room, int64_t pool, bool first) const {
    for (size_t s = 0; s < program_.plan().tail();) {
      const Step& step = program_.steps()[s];
      if (first) check(s, s + std::max<int64_t>({step.block, step.feeds_next + 1, 1}));
      s += run_at(s, image, room, pool);
    }
  }

  // Images [begin, end) in this thread.
  void run_images(int64_t begin, int64_t end) const {
    const RegionPlan<T>& plan = program_.plan();
    Arena arena(bytes(end - begin, 1));
    size_t late = 0;
    for (int64_t image = begin; image < end; ++image) {
      const Room room = room_of(arena, 1, image - begin);
      for (late = 0; late < plan.late();) late += run_at(late, image, room, 1);
    }
    for (size_t s = late, steps = 0; s < plan.tail(); s += steps) {
      for (int64_t image = begin; image < end; ++image)
        steps = run_at(s, image, room_of(arena, 1, image - begin), 1);
    }
  }

  // Runs step `s` and those that run together with it; returns how many.
  size_t run_at(size_t s, int64_t image, const Room& room, int64_t pool) const {
    const Step* step = &program_.steps()[s];
    if (runs_block(s, image, room, pool)) return step->block;
    if (step->feeds_next) {
      run_expand_depthwise(product(step[0], image, room), depthwise(step[1], image, room), pool);
      return 2;
    }
    run_step(*step, image, room, pool);
    return 1;
  }

  void run_tail(int64_t pool) const {
    const std::vector<Step>& steps = program_.steps();
    for (size_t s = program_.plan().tail(); s < steps.size(); ++s) {
      TileGemmOf<T> a = product(steps[s], 0, Room{});
      a.m = program_.batch();
      if (a.m > 0 && a.n > 0) run_tile_gemm(a, false, pool);
    }
  }

  // Runs the block that begins at step `s` band by band; false where there is none, or too little
  // of it for all threads.
  bool runs_block(size_t s, int64_t image, const Room& room, int64_t pool) const {
    const Step* step = &program_.steps()[s];
    if (step->block == 0) return false;
    if (step[1].code == Step::kGemm) {
      const TileGemmOf<T> first = product(step[0], image, room);
      const int64_t blocks = product_blocks(first, pool);
      if (blocks > 1) run_products(first, product(step[1], image, room), blocks, pool);
      return blocks > 1;
    }
    if constexpr (kBf16) {
      const DepthwiseTapsBf16 d = depthwise(step[1], image, room);
      const int64_t bands = block_bands(d, pool);
      if (bands == 0) return false;
      run_block(product(step[0], image, room), d, product(step[2], image, room), bands, pool);
      return true;
    } else {
      const bool conv = step->code == Step::kConv;
      const TileGemm expand = conv ? TileGemm{} : product(*step, image, room),
                     project = step->block == 3 ? product(step[2], image, room) : TileGemm{};
      const TileConv window = conv ? convolution(*step, image, room) : TileConv{};
      const FusedBlock block = {conv ? nullptr : &expand, conv ? &window : nullptr,
                                depthwise(step[1], image, room),
                                step->block == 3 ? &project : nullptr};
      const int64_t bands = block_bands(block, pool);
      if (bands == 0) return false;
      run_block(block, bands, pool);
      return true;
    }
  }

  void run_step(const Step& step, int64_t image, const Room& room, int64_t pool) const {
    const T* x = at(step.x, image, room);
    T* out = at(step.out, image, room);
    if (step.code == Step::kMean) {
      const Shape& shape = program_.values()[step.x].shape;
      const int64_t size = floats(shape) / shape[0], pitch = size + gap(step.x),
                    parts = std::min(shape[0], 4 * pool);
      for_each_unit(parts, pool, [&](int64_t part) {
        const int64_t begin = shape[0] * part / parts, end = shape[0] * (part + 1) / parts;
        run_channel_mean(x + begin * pitch, out + begin, end - begin, size, pitch);
      });
    } else if (step.code == Step::kDepthwise) {
      const DepthwiseTapsOf<T> a = depthwise(step, image, room);
      if (a.channels > 0) run_depthwise(a, pool);
    } else if (step.code == Step::kGemm) {
      const TileGemmOf<T> a = product(step, image, room);
      if (a.m == 0 || a.n == 0) return;
      if constexpr (!kBf16) {
        if (splits_k(a, step.feature_major, pool)) return run_tile_gemm_split(a, room.sums, pool);
      }
      run_tile_gemm(a, step.feature_major, pool);
    } else if (step.code == Step::kPool) {
      MaxPoolOf<T> a = step.pool;
      a.x = x, a.out = out, a.x_gap = gap(step.x), a.out_gap = gap(step.out);
      run_max_pool(a, pool);
    } else if (step.code == Step::kNorm) {
      ChannelNormOf<T> a = step.norm;
      weights_.attach(step, &a);
      a.x = x, a.out = out, a.x_gap = gap(step.x), a.out_gap = gap(step.out);
      run_channel_norm(a, pool);
    } else if (step.code == Step::kAttention) {
      if constexpr (kBf16) run_attention(attention(step, image, room), pool);
    } else {
      const TileConvOf<T> a = convolution(step, image, room);
      if (a.n > 0) run_tile_conv(a, pool);
    }
  }

  const Program& program_;
  const RegionWeights<T>& weights_;
  const std::vector<T*>& bases_;
};

// All that a program depends on.
using ProgramKey = std::tuple<const Kernels*, std::vector<int64_t>, std::string, std::string>;

template <class T>
std::shared_ptr<const RegionProgram<T>> program_of(const std::vector<Tensor>& x,
                                                   const std::vector<Tensor>& packed, Text layout,
                                                   Text text, const std::vector<int64_t>& outputs) {
  static GeometryCache<RegionProgram<T>, ProgramKey> cache;
  std::vector<int64_t> sizes = {static_cast<int64_t>(x.size()),
                                static_cast<int64_t>(packed.size())};
  std::vector<Shape> shapes;
  for (const Tensor& t : x) {
    STD_TORCH_CHECK(t.dim() >= 2 && t.size(0) == x[0].size(0),
                    "every region input must have shape (B, C, *) with one B, got ", shape_of(t));
    Shape& shape = shapes.emplace_back();
    for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
    sizes.push_back(t.dim());
    sizes.insert(sizes.end(), shape.begin(), shape.end());
  }
  std::vector<int32_t> types;
  for (const Tensor& t : packed) types.push_back(type_of(t));
  sizes.insert(sizes.end(), types.begin(), types.end());
  sizes.insert(sizes.end(), outputs.begin(), outputs.end());
  const ProgramKey key = {&kernels(), std::move(sizes), std::move(layout.value),
                          std::move(text.value)};
  return cache.get(key, [&] {
    return std::make_shared<RegionProgram<T>>(shapes, types, std::get<2>(key), std::get<3>(key),
                                              outputs);
  });
}

template <class T>
std::vector<Tensor> run_region(const std::vector<Tensor>& x, const std::vector<Tensor>& packed,
                               Text layout, Text text, const std::vector<int64_t>& outputs) {
  std::vector<Tensor> inputs, results;
  for (const Tensor& t : x)
    inputs.push_back(std::is_same_v<T, Bf16> ? bf16_input(t, "x") : float_input(t, "x"));
  const auto program = program_of<T>(x, packed, std::move(layout), std::move(text), outputs);
  const Bundle bundle(program->layout(), packed);
  const RegionWeights<T> weights(*program, bundle);
  std::vector<T*> bases(program->values().size());
  for (size_t i = 0; i < inputs.size(); ++i) bases[i] = const_cast<T*>(data<T>(inputs[i]));
  for (const int64_t id : outputs) {
    Shape shape = program->values()[id].shape;
    shape.insert(shape.begin(), program->batch());
    bases[id] =
        static_cast<T*>(results.emplace_back(empty_output(inputs[0], shape)).mutable_data_ptr());
  }
  std::optional<Arena> rows;
  if (const int64_t count = program->plan().rows()) rows.emplace(count * sizeof(T));
  for (size_t i = 0; i < bases.size(); ++i) {
    const Value& v = program->values()[i];
    if (v.place == Value::kRows) bases[i] = rows->template data<T>() + v.offset;
  }
  Region<T>(*program, weights, bases).run();
  return results;
}

std::vector<Tensor> region_cpu(std::vector<Tensor> x, std::vector<Tensor> packed, Text layout,
                               Text program, std::vector<int64_t> outputs) {
  STD_TORCH_CHECK(!x.empty(), "region needs at least one input");
  return is_bf16(x[0], "x")
             ? run_region<Bf16>(x, packed, std::move(layout), std::move(program), outputs)
             : run_region<float>(x, packed, std::move(layout), std::move(program), outputs);
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("region", TORCH_BOX(&fxprune::region_cpu));
}
