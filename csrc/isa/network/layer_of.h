// A layer of a generated network, as the kernels of single layers take it.
#pragma once

#include "isa/common.h"
#include "isa/simd/vector.h"
#include "isa/unit/amx.h"
#include "plan.h"

namespace hyperfast::HF_ISA {

// The head's part for a layer.
template <class T>
static HeadMatrix matrix_of(const NetHead& head, const Layer& l) {
  return {static_cast<T*>(head.weight) + l.begin * head.row,
          l.in * head.row,
          head.row,
          head.feature,
          head.bias ? static_cast<T*>(head.bias) + l.begin * head.bias_step : nullptr,
          l.in * head.bias_step,
          head.bias_step};
}
template <class T>
static HeadMatrix vector_of(const NetHead& head, const Layer& l) {
  if (!l.own_bias()) return {};
  const Index first = l.begin + l.out * l.in;
  return {static_cast<T*>(head.weight) + first * head.row,
          head.row,
          0,
          head.feature,
          head.bias ? static_cast<T*>(head.bias) + first * head.bias_step : nullptr,
          head.bias_step,
          0};
}

// A layer of a network, without its rows.
template <class T>
static HyperLinear layer_of(const HyperMlp& p, const Layer& l, Plan plan) {
  return {p.dtype,
          plan,
          p.groups,
          l.out,
          l.in,
          p.features,
          {},
          p.h,
          matrix_of<T>(p.head, l),
          vector_of<T>(p.head, l),
          {},
          l.transform};
}

static inline Plan plan_of(const HyperMlp& p, const Layer& l) {
  return default_plan(Makes::weights, p.dtype, p.groups, l.params(), p.features, has_matrix_unit,
                      has_pair_dot);
}

}  // namespace hyperfast::HF_ISA
