// Registration, and nothing else: each function checks its arguments, so that the kernels behind it can
// never read or write out of bounds, and hands raw pointers over. The schemas are in hyperfast/ops.py.
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "dispatch.h"
#include "groups.h"

namespace hyperfast {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The layout of x (and of everything shaped like it): (B, N, columns), or (R, columns) with task_ids.
Grouping group_rows(const Arg& x, const OptionalTensor& task_ids, Index tasks, Index cut = max_piece,
                    bool all = false) {
  if (!task_ids) {
    x.rank(3, "(B, N, columns)");
    x.size(0, tasks, "tasks");
    return Grouping::batched(tasks, x.size(1), cut);
  }
  x.rank(2, "(R, columns), as task_ids is given");
  const Arg ids("task_ids", *task_ids);
  ids.is(torch::headeronly::ScalarType::Long);
  ids.rank(1, "(R,)");
  ids.size(0, x.size(0), "one for each row of x");
  return Grouping::ragged(ids.data<const Index>(), ids.stride(0), x.size(0), tasks, cut, all);
}

Tensor task_linear(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
                   const OptionalTensor& task_ids) {
  const Arg x("x", x_), weight("weight", weight_);
  weight.rank(3, "(B, out, in)");
  const Index tasks = weight.size(0), out = weight.size(1), in = weight.size(2);
  const Dtype dtype = x.dtype();
  weight.same_dtype(x);
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
  kernels().task_linear({dtype, groups.view(), out, in, x.rows(),
                         {weight.data(), weight.stride(0), weight.stride(1), weight.stride(2)},
                         bias, Arg("y", y).rows()});
  return y;
}

Tensor task_linear_grad_weight(const Tensor& grad_, const Tensor& x_, const OptionalTensor& task_ids,
                               Index tasks) {
  const Arg grad("grad", grad_), x("x", x_);
  if (tasks < 0) fail("tasks must not be negative, got ", tasks);
  const Dtype dtype = x.dtype();
  grad.same_dtype(x);
  grad.same_rows(x);
  const Grouping groups = group_rows(x, task_ids, tasks, whole, true);
  const Index out = grad.size(-1), in = x.size(-1);
  const Tensor y = x.empty({tasks, out, in});
  kernels().task_linear_grad_weight(
      {dtype, groups.view(), out, in, grad.rows(), x.rows(), y.mutable_data_ptr()});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("task_linear", TORCH_BOX(&task_linear));
  m.impl("task_linear_grad_weight", TORCH_BOX(&task_linear_grad_weight));
}

}  // namespace hyperfast
