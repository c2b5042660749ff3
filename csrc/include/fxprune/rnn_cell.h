// The pointwise part of one time step of an LSTM or a GRU, over `count` hidden units of one row.
//
// Gate q of unit j lies at gates[q * hidden + j]; torch's order is i, f, g, o and r, z, n.
#pragma once

#include <cstdint>

#include "fxprune/math.h"

namespace fxprune {

// Calls f(offset, load, store) for each vector of `count` elements, the last one masked.
template <class V, class F>
void for_each_vector(int64_t count, F f) {
  for (int64_t j = 0; j < count; j += V::kWidth) {
    const auto mask = V::first(count - j);
    f([j, mask](const float* p) { return V::load(p + j, mask); },
      [j, mask](float* p, typename V::Reg v) { V::store(p + j, mask, v); });
  }
}

// gates: pre-activations, input and recurrent part added. c is updated in place.
//   c = sigmoid(f) * c + sigmoid(i) * tanh(g),   h = sigmoid(o) * tanh(c)
template <class V>
void lstm_cell(const float* gates, int64_t hidden, float* c, float* h, int64_t count) {
  using M = Math<V>;
  for_each_vector<V>(count, [&](auto load, auto store) {
    const auto i = M::sigmoid(load(gates)), f = M::sigmoid(load(gates + hidden));
    const auto g = M::tanh(load(gates + 2 * hidden)), o = M::sigmoid(load(gates + 3 * hidden));
    const auto state = V::fma(f, load(c), V::mul(i, g));
    store(c, state);
    store(h, V::mul(o, M::tanh(state)));
  });
}

// gates: the input's part, recurrent: the hidden state's part, biases included.
//   n = tanh(gates_n + sigmoid(r) * recurrent_n),   h = (1 - sigmoid(z)) * n + sigmoid(z) *
//   previous
template <class V>
void gru_cell(const float* gates, const float* recurrent, int64_t hidden, const float* previous,
              float* h, int64_t count) {
  using M = Math<V>;
  for_each_vector<V>(count, [&](auto load, auto store) {
    const auto sum = [&](int64_t at) { return V::add(load(gates + at), load(recurrent + at)); };
    const auto r = M::sigmoid(sum(0)), z = M::sigmoid(sum(hidden));
    const auto n = M::tanh(V::fma(r, load(recurrent + 2 * hidden), load(gates + 2 * hidden)));
    const auto keep = V::sub(V::set1(1.0f), z);
    store(h, V::fma(keep, n, V::mul(z, load(previous))));
  });
}

}  // namespace fxprune
