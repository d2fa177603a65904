// Registration of the ops that run whole networks: checks, and raw pointers for the kernels. The
// schemas are in hyperfast/ops/network.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dispatch.h"
#include "network.h"
#include "torch/network_ops.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

// What forward and backward read alike.
struct Generated {
  Arg x, h, weight;
  Network network;
  Net net;
  Grouping groups;
  Index rows;
  NetHead head;

  Generated(const Tensor& x_, const Tensor& h_, const Tensor& weight_, const OptionalTensor& bias_,
            const OptionalTensor& task_ids, const Text& text)
      : x("x", x_),
        h("h", h_),
        weight("weight", weight_),
        network(text.value),
        net(network.view()),
        groups((h.rank(2, "(B, features)"), group_rows(x, task_ids, h.size(0), generated_piece))) {
    x.dtype();
    h.same_dtype(x);
    weight.rank(2, "(P, features)");
    weight.same_dtype(x);
    weight.size(0, network.params(), "the parameters of a network");
    weight.size(1, h.size(1), "the features of h");
    x.size(-1, network.in(), "the inputs of network");
    rows = x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0);
    countable(h.size(0), network.params(), 1, h.size(1));
    countable_rows(x, network.outputs());
    head = {weight.data(), weight.stride(0), weight.stride(1), nullptr, 0};
    if (!bias_) return;
    const Arg bias("bias", *bias_);
    bias.rank(1, "(P,)");
    bias.size(0, network.params(), "the rows of weight");
    bias.same_dtype(x);
    head.bias = bias.data();
    head.bias_step = bias.stride(0);
  }

  HyperMlp view(const Tensor& rows_of_x, Rows y, void* preactivations) const {
    return {x.dtype(),
            groups.view(),
            net,
            h.size(1),
            Arg("x", rows_of_x).rows(),
            {h.data(), h.stride(0), h.stride(1)},
            head,
            y,
            preactivations};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> hyper_mlp(const Tensor& x, const Tensor& h, const Tensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& task_ids,
                                     const Text& network, bool keep) {
  const Generated g(x, h, weight, bias, task_ids, network);
  Tensor y = g.x.like_rows(g.network.out());
  Tensor preactivations = g.x.empty({keep ? g.rows * g.network.kept() : 0});
  if (g.rows > 0) {
    const Tensor rows = readable(g.x, task_ids, false);
    void* kept = keep ? preactivations.mutable_data_ptr() : nullptr;
    kernels().hyper_mlp(g.view(rows, Arg("y", y).rows(), kept));
    trim_scratch();
  }
  return {y, preactivations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hyper_mlp_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& h, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& task_ids, const Tensor& preactivations_,
    const Text& network, const std::vector<bool>& output_mask) {
  const Generated g(x, h, weight, bias, task_ids, network);
  const Arg grad("grad", grad_), preactivations("preactivations", preactivations_);
  grad.same_dtype(g.x);
  grad.same_rows(g.x);
  grad.size(-1, g.network.out(), "the outputs of network");
  preactivations.same_dtype(g.x);
  preactivations.rank(1, "(rows * kept widths,)");
  if (preactivations.size(0))
    preactivations.size(0, g.rows * g.network.kept(),
                        "rows times the widths of what is kept, or 0");
  if (output_mask.size() != 4) fail("output_mask must have 4 entries, got ", output_mask.size());

  const Index features = g.h.size(1), params = g.network.params();
  const auto wanted = [&](int i, std::initializer_list<Index> shape) {
    return output_mask[i] ? g.x.empty(shape) : g.x.empty({0});
  };
  Tensor grad_x = output_mask[0] ? g.x.like_rows(g.network.in()) : g.x.empty({0});
  Tensor grad_h = wanted(1, {g.h.size(0), features});
  Tensor grad_weight = wanted(2, {params, features}), grad_bias = wanted(3, {params});
  if (output_mask == std::vector<bool>(4)) return {grad_x, grad_h, grad_weight, grad_bias};
  const auto data = [&](int i, Tensor& t) {
    return output_mask[i] ? t.mutable_data_ptr() : nullptr;
  };
  const Tensor own = g.network.changes_output() ? as_contiguous(torch::stable::clone(grad_))
                                                : as_contiguous(grad_);
  const Tensor kept = as_contiguous(preactivations_);
  const Tensor rows = readable(g.x, task_ids, true);
  kernels().hyper_mlp_backward(
      {g.view(rows, {}, preactivations.size(0) ? kept.data_ptr() : nullptr),
       Arg("grad", own).rows(), data(0, grad_x), data(1, grad_h), data(2, grad_weight),
       data(3, grad_bias)});
  trim_scratch();
  return {grad_x, grad_h, grad_weight, grad_bias};
}

namespace {

Tensor task_mlp(const Tensor& x_, const Tensor& weight_, const OptionalTensor& scales_,
                const OptionalTensor& task_ids, const Text& text) {
  const Arg x("x", x_), weight("weight", weight_);
  const Network network(text.value);
  const Net net = network.view();
  weight.rank(2, "(B, parameters)");
  const Index tasks = weight.size(0);
  const Dtype dtype = x.dtype();
  countable(tasks, network.params(), 1);
  const Grouping groups = group_rows(x, task_ids, tasks);
  x.size(-1, network.in(), "the inputs of network");
  countable_rows(x, network.outputs());
  const Tensor rows = readable(x, task_ids, false);
  TaskMlp p{dtype, groups.view(), net, Arg("x", rows).rows(), nullptr, 0, nullptr, 0, {}};
  OptionalTensor scales;
  if (scales_) {
    const Arg a("scales_and_biases", *scales_);
    x.is(torch::headeronly::ScalarType::Float);
    weight.is(torch::headeronly::ScalarType::Char);
    weight.size(1, network.matrices(), "the weights of a network without its biases");
    a.is(torch::headeronly::ScalarType::Float);
    a.rank(2, "(B, scales and biases)");
    a.size(0, tasks, "tasks");
    a.size(1, network.outputs() + network.biases(), "scales and biases");
    scales = a.stride(1) == 1 ? *scales_ : as_contiguous(*scales_);
    p.scales_and_biases = scales->data_ptr();
    p.scales_and_biases_task = scales->stride(0);
  } else {
    weight.same_dtype(x);
    weight.size(1, network.params(), "the parameters of a network");
  }
  const Tensor own = weight.stride(1) == 1 ? weight_ : as_contiguous(weight_);
  p.weight = own.data_ptr();
  p.weight_task = own.stride(0);
  const Tensor y = x.like_rows(network.out());
  p.y = Arg("y", y).rows();
  kernels().task_mlp(p);
  trim_scratch();
  return y;
}

std::tuple<Tensor, Tensor> task_mlp_backward(const Tensor& grad_, const Tensor& x_,
                                             const Tensor& weight_, const OptionalTensor& task_ids,
                                             const Text& text,
                                             const std::vector<bool>& output_mask) {
  const Arg grad("grad", grad_), x("x", x_), weight("weight", weight_);
  const Network network(text.value);
  const Net net = network.view();
  weight.rank(2, "(B, parameters)");
  const Index tasks = weight.size(0), params = network.params();
  const Dtype dtype = x.dtype();
  weight.same_dtype(x);
  weight.size(1, params, "the parameters of a network");
  countable(tasks, params, 1);
  countable_rows(x, network.outputs());
  if (output_mask.size() != 2) fail("output_mask must have 2 entries, got ", output_mask.size());
  Index rows = 1;
  for (Index i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  const Grouping groups = group_rows(x, task_ids, tasks, gradient_piece(rows, params), true);
  x.size(-1, network.in(), "the inputs of network");
  grad.same_dtype(x);
  grad.same_rows(x);
  grad.size(-1, network.out(), "the outputs of network");
  const Tensor own = weight.stride(1) == 1 ? weight_ : as_contiguous(weight_);
  const Tensor rows_of_x = readable(x, task_ids, true),
               rows_of_grad = readable(grad, task_ids, true);
  Tensor grad_x = output_mask[0] ? x.like_rows(network.in()) : x.empty({0});
  Tensor grad_weight = output_mask[1] ? x.empty({tasks, params}) : x.empty({0});
  if (!output_mask[0] && !output_mask[1]) return {grad_x, grad_weight};
  kernels().task_mlp_backward({dtype, groups.view(), net, Arg("x", rows_of_x).rows(),
                               own.data_ptr(), own.stride(0), nullptr,
                               Arg("grad", rows_of_grad).rows(),
                               output_mask[0] ? grad_x.mutable_data_ptr() : nullptr,
                               output_mask[1] ? grad_weight.mutable_data_ptr() : nullptr});
  trim_scratch();
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("hyper_mlp", TORCH_BOX(&hyper_mlp));
  m.impl("hyper_mlp_backward", TORCH_BOX(&hyper_mlp_backward));
  m.impl("task_mlp", TORCH_BOX(&task_mlp));
  m.impl("task_mlp_backward", TORCH_BOX(&task_mlp_backward));
}

}  // namespace hyperfast
