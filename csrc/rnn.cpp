// fxprune::rnn_steps: the recurrence of one layer and direction of an LSTM or a GRU. The products
// with the inputs of all time steps are done; what is left is one small GEMM and the cell per step.
#include <cstring>
#include <vector>

#include "check_packed.h"
#include "fxprune/kernels.h"
#include "run.h"

namespace fxprune {
namespace {

struct Recurrence {
  TileGemm gemm;       // of the recurrent weight; x, residual and out are set per step
  const float* gates;  // (steps, batch, n)
  const float* h0;     // (batch, hidden)
  float* c;            // (batch, hidden), updated in place; null for a GRU
  float* sums;         // (batch, n): the products of the current step
  float* out;          // (steps, batch, hidden)
  int64_t steps, hidden;
  bool reverse;

  int64_t time(int64_t step) const { return reverse ? steps - 1 - step : step; }
  int64_t state() const { return gemm.m * hidden; }
  const float* previous(int64_t step) const {
    return step == 0 ? h0 : out + time(step - 1) * state();
  }

  TileGemm product(int64_t step) const {
    TileGemm a = gemm;
    a.x = previous(step);
    if (c != nullptr) a.residual = gates + time(step) * gemm.m * gemm.n;
    return a;
  }

  // The cells of rows [row, rows) and units [from, to).
  void cells(int64_t step, int64_t row, int64_t rows, int64_t from, int64_t to) const {
    const Kernels& k = kernels();
    float* to_out = out + time(step) * state();
    for (; row < rows; ++row) {
      const int64_t at = row * hidden + from, gate = row * gemm.n + from;
      if (c != nullptr) {
        k.lstm_cell(sums + gate, hidden, c + at, to_out + at, to - from);
      } else {
        k.gru_cell(gates + time(step) * gemm.m * gemm.n + gate, sums + gate, hidden,
                   previous(step) + at, to_out + at, to - from);
      }
    }
  }
};

template <class F>
void for_each_part(int64_t parts, const F& f) {
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

// Where to cut the tiles of a gate so that each part has about the same number of kept weights in
// all gates together. A tile also costs its epilogue and its cells.
std::vector<int64_t> unit_cuts(const TileGemm& a, int64_t each, int64_t parts) {
  const auto cost = [&](int64_t end) {
    int64_t sum = 16 * end;
    for (int64_t first = 0; first < a.tiles; first += each)
      sum += a.tile_ptr[first + end] - a.tile_ptr[first];
    return sum;
  };
  std::vector<int64_t> cuts(parts + 1, each);
  int64_t tile = 0;
  for (int64_t part = 0; part < parts; ++part) {
    while (tile < each && cost(tile) * parts < cost(each) * part) ++tile;
    cuts[part] = tile;
  }
  return cuts;
}

// With enough rows and a weight that stays in a core's L2, each thread takes rows through all steps
// and nothing waits. Else every step is cut: where tiles do not straddle gates, a thread computes
// all gates of its units and their cells at once; where they do, cells wait for all products.
void run(const Recurrence& r, int64_t values, int64_t threads) {
  constexpr int64_t kInCache = 256 * 1024;  // packed weights
  constexpr int64_t kWorth = 96 * 1024;     // products in a step that are worth waking a thread
  const Kernels& k = kernels();
  const TileGemm& g = r.gemm;
  const int64_t rows = g.m, each = r.hidden / g.granularity;
  const bool aligned = g.kept == g.n && r.hidden % g.granularity == 0;
  if (values * rows < kWorth) threads = 1;
  if (threads == 1 || (rows >= 6 * threads && values <= kInCache)) {
    return for_each_part(threads, [&](int64_t part) {
      const int64_t begin = rows * part / threads, end = rows * (part + 1) / threads;
      for (int64_t step = 0; step < r.steps; ++step) {
        k.tile_gemm_row_major(r.product(step), {0, begin, end, 0, g.tiles}, nullptr);
        r.cells(step, begin, end, 0, r.hidden);
      }
    });
  }
  const int64_t parts = aligned ? std::min(threads, each) : threads;
  const std::vector<int64_t> cuts = aligned ? unit_cuts(g, each, parts) : std::vector<int64_t>();
  for (int64_t step = 0; step < r.steps; ++step) {
    const TileGemm a = r.product(step);
    if (aligned) {
      for_each_part(parts, [&](int64_t part) {
        for (int64_t first = 0; first < g.tiles; first += each)
          k.tile_gemm_row_major(a, {0, 0, rows, first + cuts[part], first + cuts[part + 1]},
                                nullptr);
        r.cells(step, 0, rows, cuts[part] * g.granularity, cuts[part + 1] * g.granularity);
      });
    } else {
      for_each_part(parts, [&](int64_t part) {
        k.tile_gemm_row_major(
            a, {0, 0, rows, tile_cut(a, part, parts), tile_cut(a, part + 1, parts)}, nullptr);
      });
      for_each_part(parts, [&](int64_t part) {
        r.cells(step, 0, rows, r.hidden * part / parts, r.hidden * (part + 1) / parts);
      });
    }
  }
}

Tensor copy_of(const Tensor& like, const float* from, int64_t rows, int64_t width) {
  Tensor copy = empty_output(like, {rows, width});
  if (rows * width > 0) std::memcpy(copy.mutable_data_ptr(), from, rows * width * sizeof(float));
  return copy;
}

std::vector<Tensor> rnn_steps_cpu(const Tensor& gates_in, const Tensor& h_in,
                                  const OptionalTensor& c_in, const Tensor& values_in,
                                  const Tensor& index, const Tensor& tile_ptr,
                                  const Tensor& columns, const OptionalTensor& bias_in,
                                  int64_t granularity, bool reverse) {
  const bool lstm = c_in.has_value();
  check_tensor(gates_in, "gates", element_types().float32, "float32");
  check_tensor(h_in, "h", element_types().float32, "float32");
  STD_TORCH_CHECK(h_in.dim() == 2, "h must have shape (B, H), got ", shape_of(h_in));
  STD_TORCH_CHECK(gates_in.dim() == 3, "gates must have shape (T, B, ", lstm ? 4 : 3, " * H), got ",
                  shape_of(gates_in));
  const int64_t steps = gates_in.size(0), rows = h_in.size(0), hidden = h_in.size(1);
  const int64_t n = (lstm ? 4 : 3) * hidden;
  check_shape(gates_in, "gates", {steps, rows, n});
  Recurrence r{};
  const TileTensors tiles(index, tile_ptr, columns);
  const int64_t nnz = check_tiles(tiles.lists(), granularity, n, hidden, &r.gemm);
  check_shape(values_in, "values", {nnz});
  const OptionalTensor bias = float_input(bias_in, "bias", {n});
  const OptionalTensor c0 = float_input(c_in, "c", {rows, hidden});
  const Tensor gates = float_input(gates_in, "gates"), h = float_input(h_in, "h"),
               values = float_input(values_in, "values");
  Tensor out = empty_output(gates, {steps, rows, hidden});
  std::vector<Tensor> results{out};
  const int64_t state = rows * hidden;
  const float* last = data<float>(h);
  Tensor c;
  if (lstm) c = copy_of(h, data<float>(*c0), rows, hidden);
  if (steps > 0 && state > 0) {
    const Tensor sums = empty_output(gates, {rows, n});
    r.gemm.values = data<float>(values);
    r.gemm.bias = data_or_null(bias);
    r.gemm.activation = Activation::kNone;
    r.gemm.batch = 1;
    r.gemm.m = rows;
    r.gates = data<float>(gates);
    r.h0 = last;
    r.c = lstm ? static_cast<float*>(c.mutable_data_ptr()) : nullptr;
    r.sums = static_cast<float*>(sums.mutable_data_ptr());
    r.gemm.out = r.sums;
    r.out = static_cast<float*>(out.mutable_data_ptr());
    r.steps = steps;
    r.hidden = hidden;
    r.reverse = reverse;
    run(r, nnz, torch::stable::get_num_threads());
    last = r.out + r.time(steps - 1) * state;
  }
  results.push_back(copy_of(h, last, rows, hidden));
  if (lstm) results.push_back(c);
  return results;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("rnn_steps", TORCH_BOX(&fxprune::rnn_steps_cpu));
}
