// The gradients of a HyperLSTM's weights, which are sums over all rows: those of one worker.
#pragma once

#include "isa/lstm/chunk.h"

namespace hyperfast::HF_ISA {

// Of an LSTM with n units: of its normalisations, and of the biases before them.
template <class C>
struct CellSums {
  Index n;
  C* data;

  CellSums(Arena<C>& space, Index n) : n(n), data(space.take(size(n))) {}
  static Index size(Index n) { return 14 * n; }
  LstmNorm<C> norm() const { return {data, data + 4 * n, data + 8 * n, data + 9 * n}; }
  C* bias() const { return data + 10 * n; }

  void clear() const { std::memset(data, 0, size(n) * sizeof(C)); }
  void add(const CellSums& part) const {
    for (Index i = 0; i < size(n); ++i) data[i] += part.data[i];
  }
  void give(LstmNorm<C> to, C* to_bias) const {
    std::memcpy(to_bias, bias(), 4 * n * sizeof(C));
    if (!to.scale) return;
    std::memcpy(to.scale, norm().scale, 4 * n * sizeof(C));
    std::memcpy(to.shift, norm().shift, 4 * n * sizeof(C));
    std::memcpy(to.c_scale, norm().c_scale, n * sizeof(C));
    std::memcpy(to.c_shift, norm().c_shift, n * sizeof(C));
  }
};

template <class C>
struct LstmSums {
  Panels<C> ih, hh, hyper_hh, z, d[12];  // as the weights, but those of d are turned around
  C* z_bias;
  CellSums<C> main, hyper;

  LstmSums(Arena<C>& space, const HyperLstm<C>& p, const LstmWeights<C>& wanted)
      : ih(space.take_panels(wanted.ih ? p.gates() : 0, p.ins)),
        hh(space.take_panels(wanted.hh ? p.gates() : 0, p.hidden)),
        hyper_hh(space.take_panels(wanted.hyper_hh ? 4 * p.hyper : 0, p.hyper)),
        z(space.take_panels(wanted.z ? 12 * p.embedding : 0, p.hyper)),
        d{},
        z_bias(space.take(12 * p.embedding)),
        main(space, p.hidden),
        hyper(space, p.hyper) {
    for (Panels<C>& one : d) one = space.take_panels(wanted.d ? p.embedding : 0, p.hidden);
  }

  void give(const HyperLstm<C>& p, const LstmWeights<C>& to) const {
    const auto unpack = [](const Panels<C>& from, C* w) {
      if (w) from.unpack({w, from.n, 1});
    };
    unpack(ih, to.ih);
    unpack(hh, to.hh);
    unpack(hyper_hh, to.hyper_hh);
    unpack(z, to.z);
    for (Index j = 0; to.d && j < 12; ++j)
      d[j].unpack({to.d + j * p.hidden * p.embedding, 1, p.embedding});
    std::memcpy(to.z_bias, z_bias, 12 * p.embedding * sizeof(C));
    main.give(to.norm, to.bias);
    hyper.give(to.hyper_norm, to.hyper_bias);
  }
};

// The sums of one worker, as sums of sums of some hundred rows', which lose fewer digits: `recent`
// ones, and in `total`, of as many elements, those of all rows before.
template <class C>
struct WorkerSums {
  // Sums of 12,800 rows err as plain PyTorch's do; to gather them takes 0 to 3% of a training step.
  static constexpr Index rows_together = 512;

  Index size;
  C *total, *own;
  LstmSums<C> recent;
  Index rows = 0;  // in `recent`

  static Index size_of(const HyperLstmBackward<C>& b) {
    Arena<C> count{nullptr};
    LstmSums<C>(count, b.forward, b.w);
    return count.taken;
  }
  // In memory for 2 * size elements.
  WorkerSums(const HyperLstmBackward<C>& b, Index size, C* memory)
      : size(size), total(memory), own(memory + size), recent(at(own, b)) {
    std::memset(memory, 0, 2 * size * sizeof(C));
  }
  static LstmSums<C> at(C* memory, const HyperLstmBackward<C>& b) {
    Arena<C> space{memory};
    return {space, b.forward, b.w};
  }

  // So many rows more are in `recent`.
  void count(Index m) {
    if ((rows += m) >= rows_together) gather();
  }
  void gather() {
    for (Index i = 0; i < size; ++i) total[i] += own[i], own[i] = 0;
    rows = 0;
  }
};

}  // namespace hyperfast::HF_ISA
