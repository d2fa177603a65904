// The parameters of one network: as they are stored, and as they are applied.
#pragma once

#include "isa/common.h"
#include "isa/simd/stretch.h"
#include "isa/simd/transform.h"

namespace hyperfast::HF_ISA {

// A layer's matrix (out, in), the scales (out) of its rows if it is of int8, its bias (out) or
// null. A matrix that multiplies rows in pairs is given as it is stored, instead.
template <class W, class C>
struct LayerWeights {
  const W* matrix;
  const float* scales;
  const C* bias;
  const bf16* pairs;
};

// Where a network's parameters are; int8 ones are matrices alone, with scales and biases beside.
template <class W>
struct Weights {
  const W* data;
  const float* scales_and_biases;
  const bf16* first_pairs = nullptr;

  // Those of the next layer. A bias that is not of C is widened.
  template <class C>
  LayerWeights<W, C> take(const Layer& l) {
    LayerWeights<W, C> layer{data, scales_and_biases, nullptr, first_pairs};
    first_pairs = nullptr;
    data += l.out * l.in;
    if constexpr (std::is_same_v<W, std::int8_t>) {
      scales_and_biases += l.out;
      if (l.own_bias()) layer.bias = scales_and_biases, scales_and_biases += l.out;
    } else if (l.own_bias()) {
      if constexpr (std::is_same_v<W, C>) {
        layer.bias = data;
      } else {
        C* bias = scratch<C>(Slot::local_c, l.out);
        for (Index o = 0; o < l.out; ++o) bias[o] = widen(data[o]);
        layer.bias = bias;
      }
      data += l.out;
    }
    return layer;
  }
};

// Whether the first layer multiplies many rows of type T in pairs of bf16, as both are given.
template <class T, class W>
static bool first_in_pairs(const Net& net) {
  constexpr bool pairs = std::is_same_v<T, bf16> && std::is_same_v<W, bf16>;
  return has_pair_dot && pairs && net.layers[0].in > 1 &&
         net.layers[0].transform == Transform::none;
}

// All parameters in C, the matrices as they are applied: times their scales, and transformed. A
// copy, unless they are stored so; without the first matrix, if that is taken in pairs.
template <class C, class W>
static Weights<C> plain_weights(const Net& net, Weights<W> weights, bool pairs) {
  if constexpr (std::is_same_v<W, C>)
    if (!net.transforms) return {weights.data, nullptr};
  C* const plain = scratch<C>(Slot::plain, net.params);
  Weights<C> made{plain, nullptr};
  if constexpr (std::is_same_v<W, bf16>)
    if (pairs) made.first_pairs = weights.data;
  for (Index n = 0; n < net.count; ++n) {
    const Layer& l = net.layers[n];
    C* const to = plain + l.begin;
    const LayerWeights<W, C> from = weights.template take<C>(l);
    if (n > 0 || !made.first_pairs) convert(l.out * l.in, from.matrix, to);
    for (Index o = 0; from.scales && o < l.out; ++o)
      for (Index i = 0; i < l.in; ++i) to[o * l.in + i] *= from.scales[o];
    transform<C>(l.transform, l.out * l.in, to);
    for (Index o = 0; from.bias && o < l.out; ++o) to[l.out * l.in + o] = from.bias[o];
  }
  return made;
}

// g, the gradients of the parameters as they are applied, becomes that of those that are stored.
template <class C, class W>
static void undo_transforms(const Net& net, const W* stored, C* g) {
  for (Index n = 0; net.transforms && n < net.count; ++n) {
    const Layer& l = net.layers[n];
    if (l.transform == Transform::none) continue;
    const W* from = stored + l.begin;
    if constexpr (std::is_same_v<W, C>) {
      transform_slope<C>(l.transform, l.out * l.in, from, g + l.begin);
    } else {
      C* wide = scratch<C>(Slot::plain, l.out * l.in);
      convert(l.out * l.in, from, wide);
      transform_slope<C>(l.transform, l.out * l.in, wide, g + l.begin);
    }
  }
}

}  // namespace hyperfast::HF_ISA
