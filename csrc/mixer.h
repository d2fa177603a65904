// What the kernels of QMIX's mixer are given: typed pointers, all contiguous. The equations are in
// hyperfast/nets/mixers.py.
#pragma once

#include "kernels.h"

namespace hyperfast {

// A linear layer: weight (out, in), bias (out).
template <class C>
struct Linear {
  C *weight, *bias;
};

// Of W1, W2 and V, which have two layers, and of b1.
template <class C>
struct MixerWeights {
  Linear<C> into_w1, w1, into_w2, w2, into_v, v, b1;
};

// y = |W2(s)| elu(|W1(s)| q + b1(s)) + V(s) of every row, W1 (agents, embed).
template <class C>
struct Mixer {
  Index rows, agents, state, embed, hyper;
  const C* q;  // (rows, agents)
  const C* s;  // (rows, state)
  MixerWeights<const C> w;
  C* y;     // (rows)
  C* kept;  // (rows, kept_width()), or null: what the hidden layers make, and what enters the elu

  // Columns of a piece of what is kept, in any build whole vectors.
  static Index padded(Index n) { return (n + 15) / 16 * 16; }
  Index kept_width() const { return 2 * (padded(hyper) + padded(embed)); }
};

// Its gradients, from what a forward pass kept.
template <class C>
struct MixerBackward {
  Mixer<C> forward;  // without y
  const C* grad;     // (rows)
  // Null where they are not wanted; of the weights, all or none.
  C *q, *s;
  MixerWeights<C> w;

  bool of_weights() const { return w.v.bias; }
  bool of_hidden() const { return s || of_weights(); }
};

}  // namespace hyperfast
