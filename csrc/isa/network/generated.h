// Networks whose parameters are generated: by layer or by network (plan.h).
#pragma once

#include "isa/network/by_layer.h"
#include "isa/network/by_network.h"
#include "plan.h"

namespace hyperfast::HF_ISA {

static bool runs_whole(Makes makes, const HyperMlp& p) {
  return hyperfast::runs_whole(makes, p.dtype, p.groups, p.net.params, has_matrix_unit,
                               has_pair_dot);
}

static void hyper_mlp(const HyperMlp& p) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    (runs_whole(Makes::weights, p) ? hyper_mlp_by_network<T> : hyper_mlp_by_layers<T>)(p);
  });
}

static void hyper_mlp_backward(const HyperMlpBackward& b) {
  with_type(b.forward.dtype, [&](auto t) {
    using T = decltype(t);
    (runs_whole(Makes::gradients, b.forward) ? hyper_mlp_backward_by_network<T>
                                             : hyper_mlp_backward_by_layers<T>)(b);
  });
}

}  // namespace hyperfast::HF_ISA
