// The way back through a mixer. W1 is made again, once, for its slope and for the gradient of the
// values alike: to store it takes as long. Rows are cut into shares whose sums are added up at the
// end: so gradients lose fewer digits, and do not depend on the number of threads.
#pragma once

#include "isa/mixer/forward.h"

namespace hyperfast::HF_ISA {

template <class C>
struct MixerBackwardPanels : MixerPanels<C> {
  // What turns gradients of W1 and W2 into those of the hidden layers, and these into the state's.
  Lanes<C> from_w1, from_w2, from_reading;

  MixerBackwardPanels(Arena<C>& space, const MixerBackward<C>& b)
      : MixerPanels<C>(space, b.forward),
        from_w1(space, b.of_hidden() ? this->at.w1 : 0, this->at.H),
        from_w2(space, b.of_hidden() ? this->at.w2 : 0, this->at.H),
        from_reading(space, b.s ? this->at.all : 0, this->at.state) {}
  void pack(const MixerBackward<C>& b) const {
    const Mixer<C>& p = b.forward;
    MixerPanels<C>::pack(p);
    if (this->at.pads()) from_w1.clear(), from_w2.clear(), from_reading.clear();
    const auto rows = [](const Lanes<C>& to, Index row, const C* from, Index n, Index ins) {
      HF_ISA::pack<C, C>(n, ins, {from, ins, 1}, to.data + row * to.row, to.row, ins);
    };
    if (b.of_hidden()) {
      this->at.each_run_of_w1([&](Index column, Index o, Index n) {
        rows(from_w1, column, p.w.w1.weight + o * p.hyper, n, p.hyper);
      });
      rows(from_w2, 0, p.w.w2.weight, p.embed, p.hyper);
    }
    if (b.s)
      this->at.each_reading(p.w, [&](Index column, Index n, Linear<const C> l) {
        rows(from_reading, column, l.weight, n, p.state);
      });
  }
};

// Sums over rows: of the weights, turned around where the panels are, and of the biases.
template <class C>
struct MixerSums {
  Panels<C> reading, w1, w2;
  C *of_reading, *of_w1, *of_w2, *of_v, *bias_of_v;

  MixerSums(Arena<C>& space, const MixerColumns<C>& at)
      : reading(space.take_panels(at.state, at.all)),
        w1(space.take_panels(at.w1, at.H)),
        w2(space.take_panels(at.w2, at.H)),
        of_reading(space.take(at.all)),
        of_w1(space.take(at.w1)),
        of_w2(space.take(at.w2)),
        of_v(space.take(at.w2)),
        bias_of_v(space.take(1)) {}
  static Index size(const MixerColumns<C>& at) {
    Arena<C> count{nullptr};
    MixerSums(count, at);
    return count.taken;
  }

  // to (n, panels.depth) = columns [first, first + n), turned around.
  static void give_columns(const Panels<C>& from, Index first, Index n, C* to) {
    for (Index l = 0, count; l < n; l += count) {
      const Index column = first + l, lane = column % lanes<C>;
      count = min(lanes<C> - lane, n - l);
      pack<C, C>(count, from.depth, {from.data + (column - lane) * from.depth + lane, 1, lanes<C>},
                 to + l * from.depth, from.depth, from.depth);
    }
  }
  // to (n, columns) = rows [first, first + n).
  static void give_rows(const Panels<C>& from, Index first, Index n, Index columns, C* to) {
    for (Index k = 0; k < columns; k += lanes<C>)
      pack<C, C>(n, min(lanes<C>, columns - k),
                 {from.data + k * from.depth + first * lanes<C>, lanes<C>, 1}, to + k, columns,
                 min(lanes<C>, columns - k));
  }
  void give(const Mixer<C>& p, const MixerColumns<C>& at, const MixerWeights<C>& to) const {
    const auto copy = [](C* a, const C* b, Index n) { std::memcpy(a, b, n * sizeof(C)); };
    at.each_reading(to, [&](Index column, Index n, Linear<C> l) {
      give_columns(reading, column, n, l.weight);
      copy(l.bias, of_reading + column, n);
    });
    at.each_run_of_w1([&](Index column, Index o, Index n) {
      give_rows(w1, column, n, p.hyper, to.w1.weight + o * p.hyper);
      copy(to.w1.bias + o, of_w1 + column, n);
    });
    give_rows(w2, 0, p.embed, p.hyper, to.w2.weight);
    copy(to.w2.bias, of_w2, p.embed);
    copy(to.v.weight, of_v, p.embed);
    copy(to.v.bias, bias_of_v, 1);
  }
};

// Rows at a time, at most: of each there are more numbers than forward.
constexpr Index unmixed_rows = 96;

template <class C>
struct MixerBackwardSpace {
  Index w1_row, row, s_row;
  C *w1, *w2, *grads, *s;  // gradients of W1, of W2, of what is kept, and of the state
  C *of_v, *parts;         // shares in those of V's last weight, parts of those of q

  MixerBackwardSpace(Arena<C>& space, const MixerColumns<C>& at, bool of_s)
      : w1_row(odd_lines<C>(at.w1)),
        row(odd_lines<C>(at.all)),
        s_row(odd_lines<C>(at.state)),
        w1(space.take(unmixed_rows * w1_row)),
        w2(space.take(unmixed_rows * at.w2)),
        grads(space.take(unmixed_rows * row)),
        s(space.take(of_s ? unmixed_rows * s_row : 0)),
        of_v(space.take(unmixed_rows * at.w2)),
        parts(space.take(unmixed_rows * at.agents * width<C>)) {}
};

// Columns of W1 as Mixed takes them: the gradient of each is stored, and those of q, of which every
// lane adds up its own part.
template <class C>
struct Unmixed {
  Stored<C> to;
  const C* bias;
  View<const C> q, grad;  // grad of the hidden values
  C* parts;               // (rows, agents) vectors
  bool add;
  Vec<C> there;  // not 0 in lanes that are outputs; in others W1 is 0, whatever the row holds

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    constexpr int w = width<C>;
    const Index agent = j / w;
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<C> g = load(grad.data + (o + m) * grad.row);
      const C* const values = q.data + (o + m) * q.row + agent;
      C* const part = parts + (o + m) * q.row * w + j;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<C> sum = sums[m][v] + load(bias + j + v * w);
        const Vec<C> made = there != C(0) ? sum : Vec<C>{}, of_q = g * magnitude_of<C>(made);
        store(part + v * w, add ? load(part + v * w) + of_q : of_q);
        sums[m][v] = by_sign<C>(made, values[v] * g);
      }
    }
    to(sums, o, j);
  }
};

// What comes back through a ReLU, which made `made`.
template <class C>
struct Gated {
  Stored<C> to;
  const C* made;
  Index row;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    const C* const by = made + o * row + j;
    each_sum<C, M, V>(
        sums, [&](Vec<C>& s, int m, int v) { s = load(by + m * row + v) <= C(0) ? Vec<C>{} : s; });
    to(sums, o, j);
  }
};

template <class C>
static void unmix(const MixerBackward<C>& b, const MixerBackwardPanels<C>& panels,
                  const MixerSums<C>& sums, Index first, Index m) {
  constexpr int w = width<C>;
  const Mixer<C>& p = b.forward;
  const MixerColumns<C>& at = panels.at;
  const auto space = in_scratch<MixerBackwardSpace<C>, C>(Slot::block, at, b.s != nullptr);
  const C* const made = p.kept + first * at.all;
  const C* const grad = b.grad + first;

  panels.w2.multiply(m, {made + at.of_w2, at.all, 1}, {space.w2, at.w2, 1},
                     Biased<C>{{space.w2, at.w2}, panels.w2.bias});
  for (Index r = 0; r < m; ++r) {
    const C* const row = made + r * at.all;
    C *const to = space.grads + r * space.row, *const w2 = space.w2 + r * at.w2;
    each_padded<C>(p.embed, [&](Index i, int lanes) {
      const auto e = activation<Act::elu>(load(row + at.of_b1 + i), C(0));
      const Vec<C> made_w2 = load(w2 + i), v = load(row + at.of_v + i);
      const Vec<C> of_v = grad[r] * get(p.w.v.weight + i, lanes);
      store(to + at.of_v + i, v <= C(0) ? Vec<C>{} : of_v);
      store(to + at.of_b1 + i, only<C>(grad[r] * magnitude_of<C>(made_w2) * e.slope, lanes));
      store(w2 + i, only<C>(by_sign<C>(made_w2, grad[r] * e.value), lanes));
      store(space.of_v + r * at.w2 + i, grad[r] * v);
    });
  }

  const View<const C> q{p.q + first * p.agents, p.agents, 1};
  for (Index v = 0; v < at.vecs; ++v) {
    const Index column = v * at.agents * w;
    const Lanes<C> some = panels.w1.part(column, at.agents * w);
    C* const to = space.w1 + column;
    some.multiply(m, {made, at.all, 1}, {to, space.w1_row, 1},
                  Unmixed<C>{{to, space.w1_row},
                             some.bias,
                             q,
                             {space.grads + at.of_b1 + v * w, space.row, 1},
                             space.parts,
                             v > 0,
                             only<C>(C(1) - Vec<C>{}, int(min(w, p.embed - v * w)))});
  }
  if (b.q) row_sums<C>(m * p.agents, w, {space.parts, w, 1}, false, b.q + first * p.agents);
  if (!b.of_hidden()) return;

  panels.from_w1.multiply(m, {space.w1, space.w1_row, 1}, {space.grads, space.row, 1},
                          Gated<C>{{space.grads, space.row}, made, at.all});
  C* const of_w2 = space.grads + at.of_w2;
  panels.from_w2.multiply(m, {space.w2, at.w2, 1}, {of_w2, space.row, 1},
                          Gated<C>{{of_w2, space.row}, made + at.of_w2, at.all});
  if (b.s) {
    // Gaps are read with the rest: what is infinite makes numbers of no meaning there.
    for (Index r = 0; r < m; ++r)
      at.each_gap([&](Index column, Index n) {
        std::memset(space.grads + r * space.row + column, 0, n * sizeof(C));
      });
    panels.from_reading.multiply(m, {space.grads, space.row, 1}, {space.s, space.s_row, 1},
                                 Stored<C>{space.s, space.s_row});
    for (Index r = 0; r < m; ++r)
      std::memcpy(b.s + (first + r) * p.state, space.s + r * space.s_row, p.state * sizeof(C));
  }
  if (!b.of_weights()) return;

  sums.w1.add(m, space.w1, space.w1_row, made, at.all);
  sums.w2.add(m, space.w2, at.w2, made + at.of_w2, at.all);
  sums.reading.add(m, p.s + first * p.state, p.state, space.grads, space.row);
  add_rows(m, at.w1, space.w1, space.w1_row, sums.of_w1);
  add_rows(m, p.embed, space.w2, at.w2, sums.of_w2);
  add_rows(m, p.embed, space.of_v, at.w2, sums.of_v);
  add_rows(m, 1, grad, 1, sums.bias_of_v);
  add_rows(m, at.all, space.grads, space.row, sums.of_reading);
}

// Rows of a share, so that sums of them err as plain PyTorch's do; and how many shares there are at
// most, whose sums, so many numbers each, have to be stored: 256, or 256 MiB.
constexpr Index share_rows = 512;
template <class C>
static Index most_shares(Index numbers) {
  const Index fit = (Index{256} << 20) / Index(sizeof(C)) / numbers / 8 * 8;
  return min(max(fit, 8), 256);
}

template <class C>
static void mixer_backward(const MixerBackward<C>& b) {
  const Mixer<C>& p = b.forward;
  const auto panels = in_scratch<MixerBackwardPanels<C>, C>(Slot::head, b);
  panels.pack(b);
  const MixerColumns<C>& at = panels.at;
  const bool sums_up = b.of_weights();
  const Index size = sums_up ? MixerSums<C>::size(at) : 0;
  // As many for each of up to eight threads.
  const Index few = min(ceil_div(p.rows, 256), 8);
  const Index shares =
      min(max(round_up(ceil_div(p.rows, share_rows), 8), 8), most_shares<C>(max(size, 1)));
  const Index count = max(few < 8 ? few : shares, 1), each = ceil_div(p.rows, count);
  const Index together = rows_together(each, unmixed_rows, 1);
  C* const all = scratch<C>(Slot::sums, count * size);
  const Index work = each * at.all * p.state;
  parallel(count, max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
    for (Index k = begin; k < end; ++k) {
      if (sums_up) std::memset(all + k * size, 0, size * sizeof(C));
      Arena<C> space{all + k * size};
      const MixerSums<C> sums(space, at);
      const Index stop = min((k + 1) * each, p.rows);
      for (Index first = k * each; first < stop; first += together)
        unmix<C>(b, panels, sums, first, min(together, stop - first));
    }
  });
  if (!sums_up) return;
  add_up<C>(count, size, all, all);
  Arena<C> space{all};
  MixerSums<C>(space, at).give(p, at, b.w);
}

}  // namespace hyperfast::HF_ISA
