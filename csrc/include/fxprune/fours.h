// Four vectors as one: each operation on all of them in turn, so that four chains of dependent
// operations are under way at once. V: the vectors' operations (vec_*.h).
#pragma once

namespace fxprune {

template <class V>
struct Fours {
  struct Reg {
    typename V::Reg a, b, c, d;  // members, no array: the compiler keeps them in registers
  };
  static constexpr int kWidth = 4 * V::kWidth;

  template <class F>
  static Reg each(F f, Reg x) {
    return {f(x.a), f(x.b), f(x.c), f(x.d)};
  }
  template <class F>
  static Reg each(F f, Reg x, Reg y) {
    return {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)};
  }

  static Reg load(const float* p) {
    return {V::load(p), V::load(p + V::kWidth), V::load(p + 2 * V::kWidth),
            V::load(p + 3 * V::kWidth)};
  }
  static void store(float* p, Reg x) {
    V::store(p, x.a);
    V::store(p + V::kWidth, x.b);
    V::store(p + 2 * V::kWidth, x.c);
    V::store(p + 3 * V::kWidth, x.d);
  }
  static Reg set1(float a) {
    const typename V::Reg x = V::set1(a);
    return {x, x, x, x};
  }
  static Reg zero() { return set1(0.0f); }
  static Reg add(Reg x, Reg y) { return each(V::add, x, y); }
  static Reg sub(Reg x, Reg y) { return each(V::sub, x, y); }
  static Reg mul(Reg x, Reg y) { return each(V::mul, x, y); }
  static Reg div(Reg x, Reg y) { return each(V::div, x, y); }
  static Reg ratio(Reg x, Reg y) { return each(V::ratio, x, y); }
  static Reg sixth(Reg x) { return each(V::sixth, x); }
  static Reg max(Reg x, Reg y) { return each(V::max, x, y); }
  static Reg min(Reg x, Reg y) { return each(V::min, x, y); }
  static Reg scale(Reg x, Reg n) { return each(V::scale, x, n); }
  static Reg fma(Reg x, Reg y, Reg z) {
    return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b), V::fma(x.c, y.c, z.c),
            V::fma(x.d, y.d, z.d)};
  }
};

}  // namespace fxprune
