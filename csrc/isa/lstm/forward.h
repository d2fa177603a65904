// All steps of a HyperLSTM.
#pragma once

#include "isa/lstm/chunk.h"

namespace hyperfast::HF_ISA {

template <class C>
static void copy_state(Index rows, Index hidden, Index hyper, LstmState<const C> from,
                       LstmState<C> to) {
  const auto copy = [&](Index n, const C* a, C* b) { std::memcpy(b, a, n * rows * sizeof(C)); };
  copy(hidden, from.h, to.h);
  copy(hidden, from.c, to.c);
  copy(hyper, from.hyper_h, to.hyper_h);
  copy(hyper, from.hyper_c, to.hyper_c);
}

template <class C>
struct ForwardPanels : ScalePanels<C> {
  Panels<C> hh, hyper_of_h, hyper_hh;

  static Index size(const HyperLstm<C>& p) {
    const Index H = p.hidden, E = p.hyper;
    return ScalePanels<C>::size(p) + Panels<C>::size(H, 4 * H) + Panels<C>::size(H, 4 * E) +
           Panels<C>::size(E, 4 * E);
  }
  ForwardPanels(const HyperLstm<C>& p, Pieces<C> space) : ScalePanels<C>(p, space) {
    const Index H = p.hidden, E = p.hyper;
    const auto make = [&](Index depth, Index n, const C* w) {
      const Panels<C> made{depth, n, space.take(Panels<C>::size(depth, n))};
      made.pack({w, 1, depth});
      return made;
    };
    hh = make(H, 4 * H, p.w.hh);
    hyper_of_h = make(H, 4 * E, p.w.hh + 4 * H * H);
    hyper_hh = make(E, 4 * E, p.w.hyper_hh);
  }
};

template <class C>
static void run_chunk(const HyperLstm<C>& p, const ForwardPanels<C>& w, Index first, Index count) {
  const LstmChunk<C> chunk{p, w, first, count};
  const Index H = p.hidden, E = p.hyper, n = p.embedding, wide = p.width();
  const Index lengths[] = {count * 12 * n,      scaled_rows * 8 * H, scaled_rows * 4 * H,
                           4 * max(H, E),       count * wide,        count * H,
                           count * E,           count * E};
  Index all = 0;
  for (const Index length : lengths) all += Pieces<C>::size(length);
  Pieces<C> space{scratch<C>(Slot::block, all)};
  C* spare[8];
  for (int i = 0; i < 8; ++i) spare[i] = space.take(lengths[i]);
  C *const z = spare[0], *const d = spare[1], *const y = spare[2], *const gates = spare[3];

  LstmState<const C> before = p.start.from(first, H, E);
  Index row = first;
  for (Index step = 0; step < p.steps; row += p.sizes[step++]) {
    const Index m = chunk.counted(step), next = chunk.counted(step + 1);
    if (m == 0) break;
    C* const made = p.made ? p.made + row * wide : spare[4];
    LstmState<C> after = p.states.from(row, H, E);
    if (!p.states.c) after = {after.h, spare[5], spare[6], spare[7]};
    const C* const x = p.x + row * wide;

    const View<const C> h{before.h, H, 1};
    const View<C> of_hyper{made + 4 * H, wide, 1};
    w.hh.multiply(m, h, {}, {made, wide, 1});
    w.hyper_of_h.multiply(m, h, {x + 4 * H, wide, 1}, of_hyper);
    w.hyper_hh.multiply(m, {before.hyper_h, E, 1}, {of_hyper.data, wide, 1}, of_hyper);
    for (Index r = 0; r < m; ++r)
      chunk.hyper().step(of_hyper.data + r * wide, nullptr, before.hyper_c + r * E, gates,
                         after.hyper_c + r * E, after.hyper_h + r * E);
    chunk.embed(m, after.hyper_h, z);
    for (Index i = 0; i < m; i += scaled_rows) {
      const Index rows = min(scaled_rows, m - i);
      chunk.scale(rows, x + i * wide, made + i * wide, z + i * 12 * n, d, y);
      for (Index r = 0; r < rows; ++r) {
        const Index at = (i + r) * H;
        chunk.main().step(y + r * 4 * H, p.keep ? p.keep + row * H + at : nullptr, before.c + at,
                          gates, after.c + at, after.h + at);
      }
    }
    if (next < m)
      copy_state<C>(m - next, H, E, after.from(next, H, E), p.ends.from(first + next, H, E));
    before = after;
  }
}

template <class C>
static void hyper_lstm(const HyperLstm<C>& p) {
  const ForwardPanels<C> panels(p, {scratch<C>(Slot::head, ForwardPanels<C>::size(p))});
  each_chunk(p, chunk_size(p),
             [&](Index first, Index count) { run_chunk(p, panels, first, count); });
}

}  // namespace hyperfast::HF_ISA
