// A mixer, some rows at a time through all layers. W1, the largest of what is generated, never
// leaves the registers.
#pragma once

#include "isa/mixer/panels.h"

namespace hyperfast::HF_ISA {

template <class C>
struct MixerForwardPanels : MixerPanels<C> {
  Lanes<C> reading;

  MixerForwardPanels(Arena<C>& space, const Mixer<C>& p)
      : MixerPanels<C>(space, p), reading(space, p.state, this->at.all) {}
  void pack(const Mixer<C>& p) const {
    MixerPanels<C>::pack(p);
    if (this->at.pads()) reading.clear();
    this->at.each_reading(
        p.w, [&](Index column, Index n, Linear<const C> l) { reading.take(column, 0, n, l); });
  }
};

// A bias is added, and columns before `until` end in a ReLU.
template <class C>
struct Read {
  Stored<C> to;
  const C* bias;
  Index until;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int, int v) {
      s += load(bias + j + v);
      if (j + v < until) s = s <= C(0) ? Vec<C>{} : s;
    });
    to(sums, o, j);
  }
};

// Columns of W1, one vector of the embedding for each agent: hidden += |w| q.
template <class C>
struct Mixed {
  const C* bias;
  View<const C> q;
  C* hidden;
  Index row;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    const Index agent = j / width<C>;
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      C* const to = hidden + (o + m) * row;
      const C* const values = q.data + (o + m) * q.row + agent;
      Vec<C> sum = load(to);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum += values[v] * magnitude_of<C>(sums[m][v] + load(bias + j + v * width<C>));
      store(to, sum);
    }
  }
};

// At most; with 96, each panel of the weights was fetched into the first-level cache for too few.
constexpr Index mixed_rows = 192;

template <class C>
struct MixerSpace {
  C *made, *w1, *w2, *parts;

  MixerSpace(Arena<C>& space, const Mixer<C>& p, const MixerColumns<C>& at)
      : made(space.take(p.kept ? 0 : mixed_rows * at.all)),
        w1(space.take(mixed_rows * at.agents * width<C>)),
        w2(space.take(mixed_rows * at.w2)),
        parts(space.take(mixed_rows * width<C>)) {}
};

template <class C>
static void mix(const Mixer<C>& p, const MixerForwardPanels<C>& panels, Index first, Index m) {
  const MixerColumns<C>& at = panels.at;
  const auto space = in_scratch<MixerSpace<C>, C>(Slot::block, p, at);
  constexpr int w = width<C>;
  C* const made = p.kept ? p.kept + first * at.all : space.made;
  const View<C> to{made, at.all, 1};
  panels.reading.multiply(m, {p.s + first * p.state, p.state, 1}, to,
                          Read<C>{{made, at.all}, panels.reading.bias, at.of_b1});
  C* const hidden = made + at.of_b1;
  const View<const C> q{p.q + first * p.agents, p.agents, 1};
  for (Index v = 0; v < at.vecs; ++v) {
    const Lanes<C> some = panels.w1.part(v * at.agents * w, at.agents * w);
    some.multiply(m, {made, at.all, 1}, {space.w1, at.agents * w, 1},
                  Mixed<C>{some.bias, q, hidden + v * w, at.all});
  }
  panels.w2.multiply(m, {made + at.of_w2, at.all, 1}, {space.w2, at.w2, 1},
                     Biased<C>{{space.w2, at.w2}, panels.w2.bias});
  for (Index r = 0; r < m; ++r) {
    const C *const row = made + r * at.all, *const w2 = space.w2 + r * at.w2;
    Vec<C> sum{};
    each_padded<C>(p.embed, [&](Index i, int lanes) {
      const Vec<C> e = activation<Act::elu>(load(row + at.of_b1 + i), C(0)).value;
      const Vec<C> v = load(row + at.of_v + i) * get(p.w.v.weight + i, lanes);
      sum += only<C>(e * magnitude_of<C>(load(w2 + i)) + v, lanes);
    });
    store(space.parts + r * w, sum);
  }
  C* const y = p.y + first;
  row_sums<C>(m, w, {space.parts, w, 1}, false, y);
  for (Index r = 0; r < m; ++r) y[r] += *p.w.v.bias;
}

template <class C>
static void mixer(const Mixer<C>& p) {
  const auto panels = in_scratch<MixerForwardPanels<C>, C>(Slot::head, p);
  panels.pack(p);
  const bool small = double(p.rows) * double(panels.at.all * p.state) < parallel_work;
  const Index each = rows_together(p.rows, mixed_rows, small ? 1 : thread_count());
  parallel(ceil_div(p.rows, each), small ? p.rows : 1, [&](Index begin, Index end) {
    for (Index first = begin * each; first < min(end * each, p.rows); first += each)
      mix<C>(p, panels, first, min(each, p.rows - first));
  });
}

}  // namespace hyperfast::HF_ISA
