// Sequences that a thread takes through all steps, alone: none needs another's state. Their states
// stay in the second-level cache, and the weights, packed once, are read from there or the third.
#pragma once

#include "isa/lstm/cell.h"
#include "isa/product/panels.h"

namespace hyperfast::HF_ISA {

// Consecutive pieces of scratch memory, on lines of their own.
template <class C>
struct Pieces {
  C* next;

  static Index size(Index n) { return round_up(n, 64 / Index(sizeof(C))); }
  C* take(Index n) {
    C* const piece = next;
    next += size(n);
    return piece;
  }
};

// Weights by which both ways multiply.
template <class C>
struct ScalePanels {
  Panels<C> z, d[12];

  static Index size(const HyperLstm<C>& p) {
    const Index n = p.embedding;
    return Panels<C>::size(p.hyper, 12 * n) + 12 * Panels<C>::size(n, p.hidden);
  }
  ScalePanels(const HyperLstm<C>& p, Pieces<C>& space) {
    const Index n = p.embedding, H = p.hidden, E = p.hyper;
    z = {E, 12 * n, space.take(Panels<C>::size(E, 12 * n))};
    z.pack({p.w.z, 1, E});
    for (int j = 0; j < 12; ++j) {
      d[j] = {n, H, space.take(Panels<C>::size(n, H))};
      d[j].pack({p.w.d + j * H * n, 1, n});
    }
  }
};

template <class C>
struct LstmChunk {
  const HyperLstm<C>& p;
  const ScalePanels<C>& panels;
  Index first, count;  // sequences

  LstmCell<C> main() const { return {p.hidden, p.w.norm}; }
  LstmCell<C> hyper() const { return {p.hyper, p.w.hyper_norm}; }

  Index counted(Index step) const {
    return step < p.steps ? min(max(p.sizes[step] - first, 0), count) : 0;
  }

  // z (m, 12 n), the embeddings of m rows of the hyper LSTM's output.
  void embed(Index m, const C* hyper_h, C* z) const {
    panels.z.multiply(m, {hyper_h, p.hyper, 1}, {p.w.z_bias, 0, 1}, {z, 12 * p.embedding, 1});
  }

  // What enters the main LSTM's gates, y (m, 4H), of m rows of x, of h times its weights, and of
  // embeddings; and what scales them, d (m, 8H).
  void scale(Index m, const C* x, const C* made, const C* z, C* d, C* y) const {
    const Index H = p.hidden, n = p.embedding, wide = p.width();
    for (Index j = 0; j < 4; ++j) {
      const auto multiply = [&](Index kind, View<const C> init, View<C> to) {
        const Index at = 4 * kind + j;
        panels.d[at].multiply(m, {z + at * n, 12 * n, 1}, init, to);
      };
      multiply(0, {}, {d + j * H, 8 * H, 1});
      multiply(1, {}, {d + (4 + j) * H, 8 * H, 1});
      multiply(2, {p.w.bias + j * H, 0, 1}, {y + j * H, 4 * H, 1});
    }
    for (Index r = 0; r < m; ++r, d += 8 * H, y += 4 * H, made += wide, x += wide)
      each_vector<C>(4 * H, [&](Index i, int k) {
        const Vec<C> sum = get(y + i, k) + get(d + i, k) * get(made + i, k);
        put<C>(y + i, sum + get(d + 4 * H + i, k) * get(x + i, k), k);
      });
  }
};

// Rows of which what scales them is in use at a time: with 1,024 gates 128 KiB of the second-level
// cache.
constexpr Index scaled_rows = 16;

// Calls body(first, count) for chunks of all sequences, shared by the threads as they come free:
// the first sequences have the most steps.
template <class C, class F>
static void each_chunk(const HyperLstm<C>& p, Index chunk, const F& body) {
  const Index all = p.sequences(), chunks = ceil_div(all, chunk);
  Index next = 0;
  parallel(min(chunks, thread_count()), 1, [&](Index, Index) {
    for (Index i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < chunks;)
      body(i * chunk, min(chunk, all - i * chunk));
  });
}

// Sequences a chunk: few for the caches, alike for all threads; half as many where some end early,
// so that the others can be shared out again.
template <class C>
static Index chunk_size(const HyperLstm<C>& p) {
  const Index all = p.sequences(), most = p.sizes[p.steps - 1] < all ? 32 : 64;
  const Index work = p.rows * p.width() * p.hidden;
  const Index threads = work < parallel_work ? 1 : thread_count();
  const Index each = ceil_div(all, threads);
  return ceil_div(each, ceil_div(each, most));
}

}  // namespace hyperfast::HF_ISA
