// Numbers in a row, a vector at a time.
#pragma once

#include "isa/simd/vector.h"
#include "kernels.h"

namespace hyperfast::HF_ISA {

// Calls body(first, count) for each vector of n elements; the last may be a part.
template <class T, class F>
static inline void each_vector(Index n, const F& body) {
  constexpr int w = width<Acc<T>>;
  Index i = 0;
  for (; i + w <= n; i += w) body(i, w);
  if (i < n) body(i, int(n - i));
}

template <class T>
static inline Vec<Acc<T>> get(const T* p, int count) {
  return count == width<Acc<T>> ? load_wide(p) : load_wide_part(p, count);
}

template <class T>
static inline void put(T* p, Vec<Acc<T>> v, int count) {
  if (count == width<Acc<T>>) return store_narrow(p, v);
  if constexpr (std::is_same_v<T, Acc<T>>) return store_part(p, v, count);
  for (int i = 0; i < count; ++i) p[i] = narrow<T>(v[i]);
}

// n numbers as another type holds them.
template <class From, class To>
static inline void convert(Index n, const From* from, To* to) {
  each_vector<To>(n, [&](Index i, int count) { put<To>(to + i, get(from + i, count), count); });
}

// to[i] += from[i] over rows, few at a time: sums of sums lose fewer digits.
template <class C>
static void add_rows(Index m, Index n, const C* from, Index row, C* to) {
  constexpr Index few = 16;
  each_vector<C>(n, [&](Index i, int k) {
    Vec<C> all = get(to + i, k);
    for (Index r = 0; r < m;) {
      Vec<C> total{};
      for (const Index last = r + few * few < m ? r + few * few : m; r < last;) {
        Vec<C> sum{};
        for (const Index end = r + few < last ? r + few : last; r < end; ++r)
          sum += get(from + r * row + i, k);
        total += sum;
      }
      all += total;
    }
    put<C>(to + i, all, k);
  });
}

}  // namespace hyperfast::HF_ISA
