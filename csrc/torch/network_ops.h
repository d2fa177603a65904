// The ops of generated networks, for those that are made of them.
#pragma once

#include <tuple>
#include <vector>

#include "torch/shapes.h"
#include "torch/text.h"

namespace hyperfast {

std::tuple<Tensor, Tensor> hyper_mlp(const Tensor& x, const Tensor& h, const Tensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& task_ids,
                                     const Text& network, bool keep);

std::tuple<Tensor, Tensor, Tensor, Tensor> hyper_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& task_ids, const Tensor& preactivations,
    const Text& network, const std::vector<bool>& output_mask);

}  // namespace hyperfast
