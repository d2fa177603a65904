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
  Panels<C> ih, hh, hyper_of_x, hyper_of_h, hyper_hh;

  ForwardPanels(Arena<C>& space, const HyperLstm<C>& p)
      : ScalePanels<C>(space, p),
        ih(space.take_panels(p.ins, 4 * p.hidden)),
        hh(space.take_panels(p.hidden, 4 * p.hidden)),
        hyper_of_x(space.take_panels(p.ins, 4 * p.hyper)),
        hyper_of_h(space.take_panels(p.hidden, 4 * p.hyper)),
        hyper_hh(space.take_panels(p.hyper, 4 * p.hyper)) {}
  void pack(const HyperLstm<C>& p) const {
    ScalePanels<C>::pack(p);
    const auto turned = [](const Panels<C>& to, const C* w) { to.pack({w, 1, to.depth}); };
    turned(ih, p.w.ih);
    turned(hh, p.w.hh);
    turned(hyper_of_x, p.w.ih + 4 * p.hidden * p.ins);
    turned(hyper_of_h, p.w.hh + 4 * p.hidden * p.hidden);
    turned(hyper_hh, p.w.hyper_hh);
  }
};

template <class C>
struct ForwardSpace {
  C *z, *d, *y, *more, *made;
  C *c, *hyper_h, *hyper_c;

  ForwardSpace(Arena<C>& space, const HyperLstm<C>& p, Index rows)
      : z(space.take(rows * 12 * p.embedding)),
        d(space.take(scaled_rows * 8 * p.hidden)),
        y(space.take(scaled_rows * 4 * p.hidden)),
        more(space.take(max(p.hidden, p.hyper))),
        made(space.take(p.made ? 0 : rows * p.made_width())),
        c(space.take(rows * p.hidden)),
        hyper_h(space.take(rows * p.hyper)),
        hyper_c(space.take(rows * p.hyper)) {}
};

template <class C>
static void run_chunk(const HyperLstm<C>& p, const ForwardPanels<C>& w, Index first, Index count) {
  const LstmChunk<C> chunk{p, w, first, count};
  const auto s = in_scratch<ForwardSpace<C>, C>(Slot::block, p, count);
  const Index H = p.hidden, E = p.hyper, I = p.ins, wide = p.made_width();

  LstmState<const C> before = p.start.from(first, H, E);
  Index row = first;
  for (Index step = 0; step < p.steps; row += p.sizes[step++]) {
    const Index m = chunk.counted(step), next = chunk.counted(step + 1);
    if (m == 0) break;
    LstmState<C> after = p.states.from(row, H, E);
    if (!p.states.c) after = {after.h, s.c, s.hyper_h, s.hyper_c};
    C* const made = p.made ? p.made + row * wide : s.made;
    C* const hyper = made + 8 * H;
    const View<const C> x{p.x + row * I, I, 1}, h{before.h, H, 1}, so_far{hyper, wide, 1};

    w.ih.multiply(m, x, {}, {made, wide, 1});
    w.hh.multiply(m, h, {}, {made + 4 * H, wide, 1});
    w.hyper_of_x.multiply(m, x, {p.w.hyper_bias, 0, 1}, {hyper, wide, 1});
    w.hyper_of_h.multiply(m, h, so_far, {hyper, wide, 1});
    w.hyper_hh.multiply(m, {before.hyper_h, E, 1}, so_far, {hyper, wide, 1});
    for (Index r = 0; r < m; ++r)
      chunk.hyper().step(hyper + r * wide, nullptr, before.hyper_c + r * E, s.more,
                         after.hyper_c + r * E, after.hyper_h + r * E);
    chunk.embed(m, after.hyper_h, s.z);
    for (Index r = 0; r < m; ++r) {
      const Index in_block = r % scaled_rows;
      if (in_block == 0)
        chunk.scale(min(scaled_rows, m - r), made + r * wide, s.z + r * 12 * p.embedding, s.d, s.y);
      chunk.main().step(s.y + in_block * 4 * H, p.keep ? p.keep + (row + r) * H : nullptr,
                        before.c + r * H, s.more, after.c + r * H, after.h + r * H);
    }
    if (next < m)
      copy_state<C>(m - next, H, E, after.from(next, H, E), p.ends.from(first + next, H, E));
    before = after;
  }
}

template <class C>
static void hyper_lstm(const HyperLstm<C>& p) {
  const auto panels = in_scratch<ForwardPanels<C>, C>(Slot::head, p);
  panels.pack(p);
  const SequenceShares<C> shares(p);
  shares.each_worker([&](Index worker) {
    shares.each_chunk(worker,
                      [&](Index first, Index count) { run_chunk(p, panels, first, count); });
  });
}

}  // namespace hyperfast::HF_ISA
