// The way back through all steps of a HyperLSTM. What a step made beside the large products is made
// again, which takes less than to read it from memory. Every product that makes the gradient of a
// matrix is of all rows of a chunk's step, which are in the cache.
#pragma once

#include "isa/lstm/sums.h"

namespace hyperfast::HF_ISA {

template <class C>
struct BackwardPanels : ScalePanels<C> {
  Panels<C> ih, hyper_ih, hh, hyper_hh, of_z;

  BackwardPanels(Arena<C>& space, const HyperLstm<C>& p)
      : ScalePanels<C>(space, p),
        ih(space.take_panels(4 * p.hidden, p.ins)),
        hyper_ih(space.take_panels(4 * p.hyper, p.ins)),
        hh(space.take_panels(p.gates(), p.hidden)),
        hyper_hh(space.take_panels(4 * p.hyper, p.hyper)),
        of_z(space.take_panels(12 * p.embedding, p.hyper)) {}
  void pack(const HyperLstm<C>& p, bool wants_x) const {
    ScalePanels<C>::pack(p);
    const auto straight = [](const Panels<C>& to, const C* w) { to.pack({w, to.n, 1}); };
    if (wants_x) straight(ih, p.w.ih), straight(hyper_ih, p.w.ih + 4 * p.hidden * p.ins);
    straight(hh, p.w.hh);
    straight(hyper_hh, p.w.hyper_hh);
    straight(of_z, p.w.z);
  }
};

template <class C>
struct BackwardSpace {
  Index wide;                        // elements from a row of dmade to the next
  C *z, *dz, *dmade, *d, *y, *more;  // dmade: the gradients of `made`
  CellSums<C> main, hyper;           // of few rows: sums of sums lose fewer digits

  BackwardSpace(Arena<C>& space, const HyperLstm<C>& p, Index rows)
      : wide(odd_lines<C>(p.made_width())),
        z(space.take(rows * 12 * p.embedding)),
        dz(space.take(rows * 12 * p.embedding)),
        dmade(space.take(rows * wide)),
        d(space.take(scaled_rows * 8 * p.hidden)),
        y(space.take(scaled_rows * 4 * p.hidden)),
        more(space.take(5 * max(p.hidden, p.hyper))),
        main(space, p.hidden),
        hyper(space, p.hyper) {}
};

template <class C>
struct BackwardChunk {
  const HyperLstmBackward<C>& b;
  const BackwardPanels<C>& panels;
  const LstmChunk<C> chunk;
  WorkerSums<C>& all_sums;
  const LstmSums<C>& sums = all_sums.recent;
  const HyperLstm<C>& p = b.forward;
  const Index H = p.hidden, E = p.hyper, n = p.embedding, wide = p.made_width();
  const BackwardSpace<C> s = in_scratch<BackwardSpace<C>, C>(Slot::block, p, chunk.count);

  void run() const {
    Index row = p.rows + chunk.first;
    for (Index step = p.steps - 1; step >= 0; --step) {
      row -= p.sizes[step];
      const Index m = chunk.counted(step);
      if (m == 0) continue;
      back(row, m, step ? p.states.from(row - p.sizes[step - 1], H, E) : start(),
           b.carried.from(chunk.first, H, E));
      all_sums.count(m);
    }
  }

 private:
  LstmState<const C> start() const { return p.start.from(chunk.first, H, E); }

  // One step of m sequences. `later` holds the gradients of what it made, and then of what it was
  // given.
  void back(Index row, Index m, LstmState<const C> before, LstmState<C> later) const {
    const LstmState<const C> made = p.states.from(row, H, E);
    for (Index i = 0; b.grad_h && i < m * H; ++i) later.h[i] += b.grad_h[row * H + i];
    chunk.embed(m, made.hyper_h, s.z);
    for (Index i = 0; i < m; i += scaled_rows)
      back_main(row, i, min(scaled_rows, m - i), before, later);
    back_embeddings(m, made.hyper_h, later.hyper_h);
    back_hyper(row, m, before, made, later);

    C *const of_main = s.dmade, *const of_h = s.dmade + 4 * H, *const of_hyper = s.dmade + 8 * H;
    const C* const x = p.x + row * p.ins;
    panels.hh.multiply(m, {of_h, s.wide, 1}, {}, {later.h, H, 1});
    panels.hyper_hh.multiply(m, {of_hyper, s.wide, 1}, {}, {later.hyper_h, E, 1});
    if (b.x) {
      C* const to = b.x + row * p.ins;
      panels.ih.multiply(m, {of_main, s.wide, 1}, {}, {to, p.ins, 1});
      panels.hyper_ih.multiply(m, {of_hyper, s.wide, 1}, {to, p.ins, 1}, {to, p.ins, 1});
    }
    if (b.w.ih) {
      sums.ih.add(0, 4 * H, m, of_main, s.wide, x, p.ins);
      sums.ih.add(4 * H, 4 * E, m, of_hyper, s.wide, x, p.ins);
    }
    if (b.w.hh) sums.hh.add(m, of_h, s.wide, before.h, H);
    if (b.w.hyper_hh) sums.hyper_hh.add(m, of_hyper, s.wide, before.hyper_h, E);
  }

  // The main LSTM's part of rows i, ..., i + m - 1 of a step.
  void back_main(Index row, Index i, Index m, LstmState<const C> before, LstmState<C> later) const {
    row += i;
    const C* const made = p.made + row * wide;
    C *const z = s.z + i * 12 * n, *const dz = s.dz + i * 12 * n;
    chunk.scale(m, made, z, s.d, s.y, made);
    s.main.clear();
    for (Index r = 0; r < m; ++r) {
      const Index at = (i + r) * H;
      C* const y = s.y + r * 4 * H;
      chunk.main().back(y, p.keep ? p.keep + (row + r) * H : nullptr, before.c + at,
                        p.states.c + (row + r) * H, later.h + at, later.c + at, s.more,
                        s.main.norm(), y);
      back_scaled(made + r * wide, y, s.d + r * 8 * H, s.dmade + (i + r) * s.wide);
    }
    add_rows(m, 4 * H, s.y, 4 * H, s.main.bias());
    sums.main.add(s.main);
    for (Index j = 0; j < 12; ++j) {
      const View<const C> of_d =
          j < 8 ? View<const C>{s.d + j * H, 8 * H, 1} : View<const C>{s.y + (j - 8) * H, 4 * H, 1};
      multiply<C, C>(m, n, H, of_d, {p.w.d + j * H * n, n, 1}, {}, {dz + j * n, 12 * n, 1});
      if (b.w.d) sums.d[j].add(m, z + j * n, 12 * n, of_d.data, of_d.row);
    }
  }

  // From dy (4H) the gradients of what was made of x and h, dmade (8H); those of d replace it.
  void back_scaled(const C* made, const C* dy, C* d, C* dmade) const {
    each_vector<C>(4 * H, [&](Index i, int k) {
      const Vec<C> g = get(dy + i, k);
      C *const of_h = d + i, *const of_x = d + 4 * H + i;
      put<C>(dmade + i, g * get(of_x, k), k);
      put<C>(dmade + 4 * H + i, g * get(of_h, k), k);
      put<C>(of_x, g * get(made + i, k), k);
      put<C>(of_h, g * get(made + 4 * H + i, k), k);
    });
  }

  void back_embeddings(Index m, const C* hyper_h, C* dhyper_h) const {
    panels.of_z.multiply(m, {s.dz, 12 * n, 1}, {dhyper_h, E, 1}, {dhyper_h, E, 1});
    add_rows(m, 12 * n, s.dz, 12 * n, sums.z_bias);
    if (b.w.z) sums.z.add(m, s.dz, 12 * n, hyper_h, E);
  }

  void back_hyper(Index row, Index m, LstmState<const C> before, LstmState<const C> made,
                  LstmState<C> later) const {
    s.hyper.clear();
    for (Index r = 0; r < m; ++r)
      chunk.hyper().back(p.made + (row + r) * wide + 8 * H, nullptr, before.hyper_c + r * E,
                         made.hyper_c + r * E, later.hyper_h + r * E, later.hyper_c + r * E, s.more,
                         s.hyper.norm(), s.dmade + r * s.wide + 8 * H);
    add_rows(m, 4 * E, s.dmade + 8 * H, s.wide, s.hyper.bias());
    sums.hyper.add(s.hyper);
  }
};

// Bytes of all workers' sums, unless what was kept for the way back is more.
constexpr Index most_sums = Index{256} << 20;

template <class C>
static void hyper_lstm_backward(const HyperLstmBackward<C>& b) {
  const HyperLstm<C>& p = b.forward;
  const auto panels = in_scratch<BackwardPanels<C>, C>(Slot::head, p);
  panels.pack(p, b.x);
  const Index size = WorkerSums<C>::size_of(b);
  const SequenceShares<C> shares(
      p, max(max(most_sums / Index(sizeof(C)), p.rows * p.made_width()) / (2 * size), 1));
  C* const all = scratch<C>(Slot::sums, shares.workers * 2 * size);
  shares.each_worker([&](Index worker) {
    WorkerSums<C> sums(b, size, all + worker * 2 * size);
    shares.each_chunk(worker, [&](Index first, Index sequences) {
      BackwardChunk<C>{b, panels, {p, panels, first, sequences}, sums}.run();
    });
    sums.gather();
  });
  parallel(size, Index{1} << 16, [&](Index begin, Index end) {
    for (Index k = 1; k < shares.workers; ++k)
      for (Index i = begin; i < end; ++i) all[i] += all[k * 2 * size + i];
  });
  WorkerSums<C>::at(all, b).give(p, b.w);
}

}  // namespace hyperfast::HF_ISA
