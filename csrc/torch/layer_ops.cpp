// Registration, and nothing else: each function checks its arguments, so that the kernels behind it
// can never read or write out of bounds, and hands raw pointers over. The schemas are in
// hyperfast/ops.py.
#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "torch/shapes.h"
#include "torch/text.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

Tensor task_linear(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
                   const OptionalTensor& task_ids) {
  const Arg x("x", x_), weight("weight", weight_);
  weight.rank(3, "(B, out, in)");
  const Index tasks = weight.size(0), out = weight.size(1), in = weight.size(2);
  const Dtype dtype = x.dtype();
  weight.same_dtype(x);
  countable(tasks, out, in);
  const Grouping groups = group_rows(x, task_ids, tasks);
  x.size(-1, in, "in, the last size of weight");
  TaskVector bias{};
  if (bias_) {
    const Arg b("bias", *bias_);
    b.rank(2, "(B, out)");
    b.size(0, tasks, "tasks");
    b.size(1, out, "out");
    b.same_dtype(x);
    bias = {b.data(), b.stride(0), b.stride(1)};
  }
  const Tensor y = x.like_rows(out);
  kernels().task_linear({dtype,
                         groups.view(),
                         out,
                         in,
                         x.rows(),
                         {weight.data(), weight.stride(0), weight.stride(1), weight.stride(2)},
                         bias,
                         Arg("y", y).rows()});
  return y;
}

Tensor task_linear_grad_weight(const Tensor& grad_, const Tensor& x_,
                               const OptionalTensor& task_ids, Index tasks) {
  const Arg grad("grad", grad_), x("x", x_);
  if (tasks < 0) fail("tasks must not be negative, got ", tasks);
  const Dtype dtype = x.dtype();
  grad.same_dtype(x);
  grad.same_rows(x);
  const Grouping groups = group_rows(x, task_ids, tasks, whole, true);
  const Index out = grad.size(-1), in = x.size(-1);
  countable(tasks, out, in);
  const Tensor y = x.empty({tasks, out, in});
  kernels().task_linear_grad_weight(
      {dtype, groups.view(), out, in, grad.rows(), x.rows(), y.mutable_data_ptr()});
  return y;
}

// The head's slice of one layer: rows of matrix (out, in), then, with target_bias, of vector (out).
struct Head {
  HeadMatrix matrix{}, vector{};

  Head(const Arg& weight, const OptionalTensor& bias, Index out, Index in, bool target_bias) {
    weight.size(0, out * (in + target_bias), target_bias ? "out * (in + 1)" : "out * in");
    const Index row = weight.stride(0), feature = weight.stride(1);
    const Index size = weight.element_size();
    char* rows = weight.data<char>();
    matrix = {rows, in * row, row, feature, nullptr, 0, 0};
    if (target_bias) vector = {rows + out * in * row * size, row, 0, feature, nullptr, 0, 0};
    if (!bias) return;
    const Arg b("bias", *bias);
    b.rank(1, "(P,)");
    b.size(0, weight.size(0), "the rows of weight");
    b.same_dtype(weight);
    const Index step = b.stride(0);
    matrix.bias = b.data();
    matrix.bias_out_stride = in * step;
    matrix.bias_in_stride = step;
    if (target_bias) {
      vector.bias = b.data<char>() + out * in * step * size;
      vector.bias_out_stride = step;
    }
  }
};

// How to run a layer: the plan that was asked for, else the best one.
Plan choose_plan(const std::string& wanted, Makes makes, Dtype dtype, const Groups& groups,
                 Index params, Index features) {
  if (wanted.empty())
    return default_plan(makes, dtype, groups, params, features, kernels().matrix_unit);
  if (wanted == "contract") return Plan::contract;
  if (wanted == "tile") return Plan::tile;
  if (wanted == "materialize") return Plan::materialize;
  fail("plan must be \"\", \"contract\", \"tile\" or \"materialize\", got \"", wanted, "\"");
}

Tensor hyper_linear(const Tensor& x_, const Tensor& h_, const Tensor& weight_,
                    const OptionalTensor& bias, const OptionalTensor& task_ids, bool target_bias,
                    const Text& plan) {
  const Arg x("x", x_), h("h", h_), weight("weight", weight_);
  const Dtype dtype = x.dtype();
  h.rank(2, "(B, features)");
  h.same_dtype(x);
  weight.rank(2, "(P, features)");
  weight.same_dtype(x);
  const Index tasks = h.size(0), features = h.size(1);
  weight.size(1, features, "the features of h");
  const Grouping groups = group_rows(x, task_ids, tasks, generated_piece);
  const Index in = x.size(-1), per_output = in + target_bias;
  if (per_output == 0) fail("x must have at least one column without target_bias");
  const Index out = weight.size(0) / per_output;
  countable(tasks, out, in, features);
  const Head head(weight, bias, out, in, target_bias);
  const Tensor y = x.like_rows(out);
  if (y.numel() == 0) return y;
  kernels().hyper_linear({dtype,
                          choose_plan(plan.value, Makes::weights, dtype, groups.view(),
                                      out * (in + target_bias), features),
                          groups.view(),
                          out,
                          in,
                          features,
                          x.rows(),
                          {h.data(), h.stride(0), h.stride(1)},
                          head.matrix,
                          head.vector,
                          Arg("y", y).rows()});
  trim_scratch();
  return y;
}

// The same layer turned around: what maps inputs to outputs maps gradients of outputs to those of
// inputs.
Tensor hyper_linear_grad_x(const Tensor& grad_, const Tensor& h_, const Tensor& weight_,
                           const OptionalTensor& bias, const OptionalTensor& task_ids,
                           const Text& plan) {
  const Arg grad("grad", grad_), h("h", h_), weight("weight", weight_);
  const Dtype dtype = grad.dtype();
  h.rank(2, "(B, features)");
  h.same_dtype(grad);
  weight.rank(2, "(out * in, features)");
  weight.same_dtype(grad);
  const Index tasks = h.size(0), features = h.size(1);
  weight.size(1, features, "the features of h");
  const Grouping groups = group_rows(grad, task_ids, tasks, generated_piece);
  const Index out = grad.size(-1);
  if (out == 0) fail("grad must have at least one column");
  const Index in = weight.size(0) / out;
  countable(tasks, out, in, features);
  const HeadMatrix matrix = Head(weight, bias, out, in, false).matrix.transposed();
  const Tensor y = grad.like_rows(in);
  if (y.numel() == 0) return y;
  kernels().hyper_linear(
      {dtype,
       choose_plan(plan.value, Makes::weights, dtype, groups.view(), out * in, features),
       groups.view(),
       in,
       out,
       features,
       grad.rows(),
       {h.data(), h.stride(0), h.stride(1)},
       matrix,
       {},
       Arg("y", y).rows()});
  trim_scratch();
  return y;
}

Tensor hyper_linear_grad_h(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                           const OptionalTensor& task_ids, Index tasks, bool target_bias,
                           const Text& plan) {
  const Arg grad("grad", grad_), x("x", x_), weight("weight", weight_);
  if (tasks < 0) fail("tasks must not be negative, got ", tasks);
  const Dtype dtype = x.dtype();
  grad.same_dtype(x);
  grad.same_rows(x);
  weight.rank(2, "(P, features)");
  weight.same_dtype(x);
  const Grouping groups = group_rows(x, task_ids, tasks, generated_piece);
  const Index out = grad.size(-1), in = x.size(-1), features = weight.size(1);
  countable(tasks, out, in, features);
  const Head head(weight, std::nullopt, out, in, target_bias);
  const Tensor y = x.empty({tasks, features});
  const Plan how = choose_plan(plan.value, Makes::gradients, dtype, groups.view(),
                               out * (in + target_bias), features);
  kernels().hyper_linear_grad({dtype,
                               how,
                               groups.view(),
                               out,
                               in,
                               features,
                               target_bias,
                               grad.rows(),
                               x.rows(),
                               {},
                               head.matrix,
                               head.vector,
                               y.mutable_data_ptr(),
                               nullptr,
                               nullptr});
  trim_scratch();
  return y;
}

Tensor hyper_linear_grad_weight(const Tensor& grad_, const Tensor& x_, const Tensor& h_,
                                const OptionalTensor& task_ids, bool target_bias,
                                const Text& plan) {
  const Arg grad("grad", grad_), x("x", x_), h("h", h_);
  const Dtype dtype = x.dtype();
  grad.same_dtype(x);
  grad.same_rows(x);
  h.rank(2, "(B, features)");
  h.same_dtype(x);
  const Grouping groups = group_rows(x, task_ids, h.size(0), generated_piece);
  const Index out = grad.size(-1), in = x.size(-1), features = h.size(1);
  countable(h.size(0), out, in, features);
  const Tensor y = x.empty({out * (in + target_bias), features});
  const Plan how = choose_plan(plan.value, Makes::gradients, dtype, groups.view(),
                               out * (in + target_bias), features);
  kernels().hyper_linear_grad({dtype,
                               how,
                               groups.view(),
                               out,
                               in,
                               features,
                               target_bias,
                               grad.rows(),
                               x.rows(),
                               {h.data(), h.stride(0), h.stride(1)},
                               {},
                               {},
                               nullptr,
                               y.mutable_data_ptr(),
                               nullptr});
  trim_scratch();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("task_linear", TORCH_BOX(&task_linear));
  m.impl("task_linear_grad_weight", TORCH_BOX(&task_linear_grad_weight));
  m.impl("hyper_linear", TORCH_BOX(&hyper_linear));
  m.impl("hyper_linear_grad_x", TORCH_BOX(&hyper_linear_grad_x));
  m.impl("hyper_linear_grad_h", TORCH_BOX(&hyper_linear_grad_h));
  m.impl("hyper_linear_grad_weight", TORCH_BOX(&hyper_linear_grad_weight));
}

}  // namespace hyperfast
