// The way back through all steps of a HyperLSTM. What a step made beside the products is made
// again: reading it from memory would take as long.
#pragma once

#include "isa/lstm/chunk.h"

namespace hyperfast::HF_ISA {

template <class C>
struct BackwardPanels : ScalePanels<C> {
  Panels<C> hh, hyper_hh, of_z;

  static Index size(const HyperLstm<C>& p) {
    const Index H = p.hidden, E = p.hyper;
    return ScalePanels<C>::size(p) + Panels<C>::size(p.width(), H) + Panels<C>::size(4 * E, E) +
           Panels<C>::size(12 * p.embedding, E);
  }
  BackwardPanels(const HyperLstm<C>& p, Pieces<C> space) : ScalePanels<C>(p, space) {
    const auto make = [&](Index depth, Index n, const C* w) {
      const Panels<C> made{depth, n, space.take(Panels<C>::size(depth, n))};
      made.pack({w, n, 1});
      return made;
    };
    hh = make(p.width(), p.hidden, p.w.hh);
    hyper_hh = make(4 * p.hyper, p.hyper, p.w.hyper_hh);
    of_z = make(12 * p.embedding, p.hyper, p.w.z);
  }
};

// The gradients that are sums over all rows, those of one chunk: of an LSTM's normalisations, and
// of the biases behind them. They are sums of sums of few rows, which lose fewer digits.
template <class C>
struct LstmSums {
  Index n;
  C* data;

  static Index size(Index n) { return 14 * n; }
  LstmNorm<C> norm() const { return {data, data + 4 * n, data + 8 * n, data + 9 * n}; }
  C* bias() const { return data + 10 * n; }
  void clear() const { std::memset(data, 0, size(n) * sizeof(C)); }
  void add(const LstmSums& part) const {
    for (Index i = 0; i < size(n); ++i) data[i] += part.data[i];
  }
};

template <class C>
struct ChunkSums {
  LstmSums<C> main, hyper;
  C* d;  // (12, n, H), turned around

  static Index size(const HyperLstm<C>& p) {
    return 14 * (p.hidden + p.hyper) + 12 * p.embedding * p.hidden;
  }
  ChunkSums(const HyperLstm<C>& p, C* at)
      : main{p.hidden, at},
        hyper{p.hyper, at + 14 * p.hidden},
        d(at + 14 * (p.hidden + p.hyper)) {}
};

template <class C>
struct BackwardChunk {
  const HyperLstmBackward<C>& b;
  const BackwardPanels<C>& panels;
  const LstmChunk<C> chunk;
  const ChunkSums<C> sums;
  const HyperLstm<C>& p = b.forward;
  const Index H = p.hidden, E = p.hyper, n = p.embedding, wide = p.width();
  C *z = nullptr, *d = nullptr, *y = nullptr, *space = nullptr;
  LstmSums<C> few{}, hyper_few{};

  void run() {
    Pieces<C> own{scratch<C>(Slot::block, scratch_size())};
    z = own.take(chunk.count * 12 * n);
    d = own.take(scaled_rows * 8 * H);
    y = own.take(scaled_rows * 4 * H);
    space = own.take(6 * max(H, E));
    few = {H, own.take(LstmSums<C>::size(H))};
    hyper_few = {E, own.take(LstmSums<C>::size(E))};
    Index row = p.rows + chunk.first;
    for (Index step = p.steps - 1; step >= 0; --step) {
      row -= p.sizes[step];
      const Index m = chunk.counted(step);
      if (m == 0) continue;
      const LstmState<const C> before =
          step ? LstmState<const C>(p.states.from(row - p.sizes[step - 1], H, E))
               : p.start.from(chunk.first, H, E);
      back(row, m, before, b.carried.from(chunk.first, H, E));
    }
  }

 private:
  Index scratch_size() const {
    Index all = 0;
    for (const Index length : {chunk.count * 12 * n, scaled_rows * 8 * H, scaled_rows * 4 * H,
                               6 * max(H, E), LstmSums<C>::size(H), LstmSums<C>::size(E)})
      all += Pieces<C>::size(length);
    return all;
  }

  // One step. `later` holds the gradients of what it made, and then of what it was given.
  void back(Index row, Index m, LstmState<const C> before, LstmState<C> later) {
    const LstmState<const C> made = p.states.from(row, H, E);
    C *const dx = b.dx + row * wide, *const dp = b.dp + row * wide, *const dz = b.dz + row * 12 * n;
    for (Index i = 0; b.grad_h && i < m * H; ++i) later.h[i] += b.grad_h[row * H + i];
    chunk.embed(m, made.hyper_h, z);
    for (Index i = 0; i < m; i += scaled_rows) back_main(row, i, min(scaled_rows, m - i), before, later);
    panels.of_z.multiply(m, {dz, 12 * n, 1}, {later.hyper_h, E, 1}, {later.hyper_h, E, 1});
    hyper_few.clear();
    for (Index r = 0; r < m; ++r) {
      C* const to = dp + r * wide + 4 * H;
      chunk.hyper().back(p.made + (row + r) * wide + 4 * H, nullptr, before.hyper_c + r * E,
                         made.hyper_c + r * E, later.hyper_h + r * E, later.hyper_c + r * E, space,
                         hyper_few.norm(), to);
      std::memcpy(dx + r * wide + 4 * H, to, 4 * E * sizeof(C));
    }
    sums.hyper.add(hyper_few);
    panels.hh.multiply(m, {dp, wide, 1}, {}, {later.h, H, 1});
    panels.hyper_hh.multiply(m, {dp + 4 * H, wide, 1}, {}, {later.hyper_h, E, 1});
  }

  // The main LSTM's part of rows i, ..., i + m - 1 of the chunk.
  void back_main(Index row, Index i, Index m, LstmState<const C> before, LstmState<C> later) {
    row += i;
    const C *const x = p.x + row * wide, *const made = p.made + row * wide;
    chunk.scale(m, x, made, z + i * 12 * n, d, y);
    few.clear();
    for (Index r = 0; r < m; ++r) {
      const Index at = (i + r) * H;
      chunk.main().back(y + r * 4 * H, p.keep ? p.keep + (row + r) * H : nullptr, before.c + at,
                        p.states.c + (row + r) * H, later.h + at, later.c + at, space, few.norm(),
                        y + r * 4 * H);
      back_scaled(x + r * wide, made + r * wide, y + r * 4 * H, d + r * 8 * H,
                  b.dx + (row + r) * wide, b.dp + (row + r) * wide);
    }
    sums.main.add(few);
    C* const dz = b.dz + row * 12 * n;
    for (Index j = 0; j < 12; ++j) {
      const View<const C> of_d = j < 8 ? View<const C>{d + j * H, 8 * H, 1}
                                       : View<const C>{y + (j - 8) * H, 4 * H, 1};
      multiply<C, C>(m, n, H, of_d, {p.w.d + j * H * n, n, 1}, {}, {dz + j * n, 12 * n, 1});
      if (!b.d) continue;
      C* const sum = sums.d + j * n * H;
      multiply<C, C>(n, H, m, {z + i * 12 * n + j * n, 1, 12 * n}, of_d, {sum, H, 1}, {sum, H, 1});
    }
  }

  // From dy (4H) the gradients of one row of x and of `made`; those of d replace it.
  void back_scaled(const C* x, const C* made, const C* dy, C* d, C* dx, C* dp) const {
    C* const bias = few.bias();
    each_vector<C>(4 * H, [&](Index i, int k) {
      const Vec<C> g = get(dy + i, k);
      put<C>(dp + i, g * get(d + i, k), k);
      put<C>(dx + i, g * get(d + 4 * H + i, k), k);
      put<C>(d + i, g * get(made + i, k), k);
      put<C>(d + 4 * H + i, g * get(x + i, k), k);
      put<C>(bias + i, get(bias + i, k) + g, k);
    });
  }
};

// The sum of all chunks', in their order, as the op returns it.
template <class C>
static void add_chunks(const HyperLstmBackward<C>& b, Index chunks, C* sums) {
  const HyperLstm<C>& p = b.forward;
  const Index H = p.hidden, n = p.embedding, size = ChunkSums<C>::size(p);
  const ChunkSums<C> all(p, sums);
  for (Index k = 1; k < chunks; ++k)
    for (Index i = 0; i < size; ++i) sums[i] += sums[k * size + i];
  const auto give = [](const C* from, Index count, C* to) {
    if (to) std::memcpy(to, from, count * sizeof(C));
  };
  const auto give_norm = [&](const LstmSums<C>& from, const LstmNorm<C>& to) {
    give(from.norm().scale, 4 * from.n, to.scale);
    give(from.norm().shift, 4 * from.n, to.shift);
    give(from.norm().c_scale, from.n, to.c_scale);
    give(from.norm().c_shift, from.n, to.c_shift);
  };
  give_norm(all.main, b.norm);
  give_norm(all.hyper, b.hyper_norm);
  give(all.main.bias(), 4 * H, b.bias);
  for (Index j = 0; b.d && j < 12; ++j)
    pack<C, C>(H, n, View<const C>{all.d + j * n * H, 1, H}, b.d + j * H * n, n, n);
}

template <class C>
static void hyper_lstm_backward(const HyperLstmBackward<C>& b) {
  const HyperLstm<C>& p = b.forward;
  const BackwardPanels<C> panels(p, {scratch<C>(Slot::head, BackwardPanels<C>::size(p))});
  const Index chunk = chunk_size(p), chunks = ceil_div(p.sequences(), chunk);
  const Index size = ChunkSums<C>::size(p);
  C* const sums = scratch<C>(Slot::sums, chunks * size);
  std::memset(sums, 0, chunks * size * sizeof(C));
  each_chunk(p, chunk, [&](Index first, Index count) {
    BackwardChunk<C>{b, panels, {p, panels, first, count}, {p, sums + first / chunk * size}}.run();
  });
  add_chunks(b, chunks, sums);
}

}  // namespace hyperfast::HF_ISA
