// Sequences that a thread takes through all steps, alone: none needs another's state. What a step
// makes of them stays in the second-level cache.
#pragma once

#include "isa/lstm/cell.h"
#include "isa/product/arena.h"
#include "isa/rows/pieces.h"

namespace hyperfast::HF_ISA {

// Weights by which both ways multiply.
template <class C>
struct ScalePanels {
  Panels<C> z, d[12];

  ScalePanels(Arena<C>& space, const HyperLstm<C>& p)
      : z(space.take_panels(p.hyper, 12 * p.embedding)) {
    for (Panels<C>& one : d) one = space.take_panels(p.embedding, p.hidden);
  }
  void pack(const HyperLstm<C>& p) const {
    z.pack({p.w.z, 1, p.hyper});
    for (Index j = 0; j < 12; ++j) d[j].pack({p.w.d + j * p.hidden * p.embedding, 1, p.embedding});
  }
};

// Rows of which what scales them is in use at a time: with 1,024 gates 256 KiB of the second-level
// cache. With 16 the products of so few rows took 20% longer.
constexpr Index scaled_rows = 32;

template <class C>
struct LstmChunk {
  const HyperLstm<C>& p;
  const ScalePanels<C>& panels;
  Index first, count;  // sequences

  LstmCell<C> main() const { return {p.hidden, p.w.norm}; }
  LstmCell<C> hyper() const { return {p.hyper, p.w.hyper_norm}; }

  // How many of them have a step.
  Index counted(Index step) const {
    return step < p.steps ? min(max(p.sizes[step] - first, 0), count) : 0;
  }

  // z (m, 12 n), the embeddings of m rows of the hyper LSTM's output.
  void embed(Index m, const C* hyper_h, C* z) const {
    panels.z.multiply(m, {hyper_h, p.hyper, 1}, {p.w.z_bias, 0, 1}, {z, 12 * p.embedding, 1});
  }

  // What enters the main LSTM's gates, y (m, 4H), of m rows of what was made of x and h, and of
  // their embeddings; and what scales them, d (m, 8H), of h and then of x. Meanwhile what `ahead`
  // points to is fetched: `made`, where it comes from memory.
  void scale(Index m, const C* made, const C* z, C* d, C* y, const C* ahead = nullptr) const {
    const Index H = p.hidden, n = p.embedding;
    const auto multiply = [&](Index j, View<const C> init, View<C> to) {
      const Panels<C>& of_z = panels.d[j];
      of_z.multiply(m, {z + j * n, 12 * n, 1}, init, to,
                    ahead ? ahead + j * of_z.panels() * of_z.fetched(m) : nullptr);
    };
    for (Index j = 0; j < 8; ++j) multiply(j, {}, {d + j * H, 8 * H, 1});
    for (Index j = 0; j < 4; ++j) multiply(8 + j, {p.w.bias + j * H, 0, 1}, {y + j * H, 4 * H, 1});
    for (Index r = 0; r < m; ++r, d += 8 * H, y += 4 * H, made += p.made_width())
      each_vector<C>(4 * H, [&](Index i, int k) {
        const Vec<C> of_h = get(d + i, k) * get(made + 4 * H + i, k);
        put<C>(y + i, get(y + i, k) + of_h + get(d + 4 * H + i, k) * get(made + i, k), k);
      });
  }
};

// How sequences are shared by threads: few at a time, for the caches, and as many for each, but no
// more threads than they fill tiles, as each reads all weights at every step; half as few where
// some end early, so that all get long ones. The first sequences are the longest.
template <class C>
struct SequenceShares {
  Index all, chunk, chunks, workers;

  explicit SequenceShares(const HyperLstm<C>& p, Index most_workers = thread_count())
      : all(p.sequences()) {
    const Index most = p.sizes[p.steps - 1] < all ? 32 : 64;
    const bool small = double(p.rows) * double(p.gates() * (p.ins + p.hidden)) < parallel_work;
    const Index threads = min(min(thread_count(), most_workers), ceil_div(all, tile_rows));
    const Index each = ceil_div(all, small ? 1 : threads);
    chunk = ceil_div(each, ceil_div(each, most));
    chunks = ceil_div(all, chunk);
    workers = small ? 1 : min(chunks, threads);
  }

  // Calls body(worker), each on a thread.
  template <class F>
  void each_worker(const F& body) const {
    parallel(workers, 1, [&](Index begin, Index end) {
      for (Index worker = begin; worker < end; ++worker) body(worker);
      trim_scratch(Slot::panel);
    });
  }
  // Calls body(first, count) for each chunk of a worker.
  template <class F>
  void each_chunk(Index worker, const F& body) const {
    for (Index i = worker; i < chunks; i += workers) body(i * chunk, min(chunk, all - i * chunk));
  }
};

}  // namespace hyperfast::HF_ISA
