// Registration, and nothing else: each function checks its arguments, so that the kernels behind it
// can never read or write out of bounds, and hands raw pointers over. The schemas are in
// hyperfast/ops/layer.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

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
  countable_rows(x, out);
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
  const Tensor rows = readable(x, task_ids, false);
  const Tensor y = x.like_rows(out);
  kernels().task_linear({dtype,
                         groups.view(),
                         out,
                         in,
                         Arg("x", rows).rows(),
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
  countable_rows(x, out);
  const Tensor grads = readable(grad, task_ids, true), rows = readable(x, task_ids, true);
  const Tensor y = x.empty({tasks, out, in});
  kernels().task_linear_grad_weight({dtype, groups.view(), out, in, Arg("grad", grads).rows(),
                                     Arg("x", rows).rows(), y.mutable_data_ptr()});
  return y;
}

// How to run a layer: the plan that was asked for, else the best one.
Plan choose_plan(const std::string& wanted, Makes makes, Dtype dtype, const Groups& groups,
                 Index params, Index features) {
  if (wanted.empty())
    return default_plan(makes, dtype, groups, params, features, kernels().matrix_unit,
                        kernels().pairs);
  if (wanted == "contract") return Plan::contract;
  if (wanted == "tile") return Plan::tile;
  if (wanted == "materialize") return Plan::materialize;
  fail("plan must be \"\", \"contract\", \"tile\" or \"materialize\", got \"", wanted, "\"");
}

Transform transform_of(const std::string& name) {
  if (name.empty()) return Transform::none;
  if (name == "abs") return Transform::abs;
  if (name == "softplus") return Transform::softplus;
  if (name == "exp") return Transform::exp;
  if (name == "square") return Transform::square;
  fail("transform must be \"\", \"abs\", \"exp\", \"softplus\" or \"square\", got \"", name, "\"");
}

TaskVector features_of(const Arg& h) { return {h.data(), h.stride(0), h.stride(1)}; }

// What generates a layer: matrix (out, in, features), and with it a vector (out, features).
class Head {
 public:
  Head(const Tensor& matrix, const OptionalTensor& vector, const Arg& x)
      : matrix_(matrix), vector_(vector) {
    const Arg m("matrix", matrix);
    m.rank(3, "(out, in, features)");
    m.same_dtype(x);
    m.size(1, x.size(-1), "the columns of x");
    if (!vector) return;
    const Arg v("vector", *vector);
    v.rank(2, "(out, features)");
    v.same_dtype(x);
    v.size(0, m.size(0), "the outputs of matrix");
    v.size(1, m.size(2), "the features of matrix");
  }

  Index out() const { return matrix_.size(0); }
  Index in() const { return matrix_.size(1); }
  Index features() const { return matrix_.size(2); }
  Index params() const { return out() * (in() + vector_.has_value()); }

  // Kernels pack features of both side by side, so they have to be equally far apart in both. Where
  // they are not, they are copied; the matrix but where its features are apart too, which takes as
  // long as to generate the weights of a task.
  void align() {
    if (!vector_ || vector_->stride(1) == matrix_.stride(2)) return;
    if (matrix_.stride(2) != 1) matrix_ = as_contiguous(matrix_);
    vector_ = as_contiguous(*vector_);
  }

  // Kernels of gradients take all as rows of one block (params, features) at equal steps, as the
  // views of a head's weight lie. What does not is copied, which takes as long as to generate the
  // weights of a task.
  void join() {
    const Index row = in() ? matrix_.stride(1) : 0, bytes = Index(matrix_.element_size());
    const bool rows = out() <= 1 || matrix_.stride(0) == in() * row;
    if (rows && (in() == 0 || !vector_ || follows(out() * in() * row * bytes, row))) return;
    const Tensor block = torch::stable::new_empty(matrix_, {params(), features()});
    const Index n = out() * in();
    Tensor matrix = block;
    matrix = torch::stable::narrow(matrix, 0, 0, n);
    matrix = torch::stable::view(matrix, {out(), in(), features()});
    torch::stable::copy_(matrix, matrix_);
    matrix_ = matrix;
    if (!vector_) return;
    Tensor all = block, vector = torch::stable::narrow(all, 0, n, out());
    torch::stable::copy_(vector, *vector_);
    vector_ = vector;
  }

  HeadMatrix matrix(const OptionalTensor& bias) const {
    HeadMatrix m{
        matrix_.data_ptr(), matrix_.stride(0), matrix_.stride(1), matrix_.stride(2), nullptr, 0, 0};
    // Where there are no inputs the vector begins the block.
    if (in() == 0 && vector_)
      m = {vector_->data_ptr(), 0, vector_->stride(0), vector_->stride(1), nullptr, 0, 0};
    if (!bias) return m;
    const Arg b("matrix_bias", *bias);
    b.rank(2, "(out, in)");
    b.size(0, out(), "the outputs of matrix");
    b.size(1, in(), "the inputs of matrix");
    same_dtype(b);
    m.bias = b.data();
    m.bias_out_stride = b.stride(0);
    m.bias_in_stride = b.stride(1);
    return m;
  }

  // Of one column. Without a vector of its own its bias is one that all tasks share.
  HeadMatrix vector(const OptionalTensor& bias) const {
    HeadMatrix v{};
    if (vector_)
      v = {vector_->data_ptr(), vector_->stride(0), 0, vector_->stride(1), nullptr, 0, 0};
    if (!bias) return v;
    const Arg b("vector_bias", *bias);
    b.rank(1, "(out,)");
    b.size(0, out(), "the outputs of matrix");
    same_dtype(b);
    v.bias = b.data();
    v.bias_out_stride = b.stride(0);
    return v;
  }

 private:
  // Whether the vector's rows come so many bytes behind the matrix, at steps of `row`.
  bool follows(Index bytes, Index row) const {
    const auto address = [](const Tensor& t) { return static_cast<const char*>(t.data_ptr()); };
    return address(*vector_) == address(matrix_) + bytes &&
           (out() <= 1 || vector_->stride(0) == row) && vector_->stride(1) == matrix_.stride(2);
  }

  void same_dtype(const Arg& bias) const { bias.same_dtype(Arg("matrix", matrix_)); }

  Tensor matrix_;
  OptionalTensor vector_;
};

Tensor hyper_linear(const Tensor& x_, const Tensor& h_, const Tensor& matrix,
                    const OptionalTensor& matrix_bias, const OptionalTensor& vector,
                    const OptionalTensor& vector_bias, const OptionalTensor& task_ids,
                    const Text& transform, const Text& plan) {
  const Arg x("x", x_), h("h", h_);
  const Dtype dtype = x.dtype();
  h.rank(2, "(B, features)");
  h.same_dtype(x);
  const Index tasks = h.size(0), features = h.size(1);
  const Grouping groups = group_rows(x, task_ids, tasks, generated_piece);
  Head head(matrix, vector, x);
  Arg("matrix", matrix).size(2, features, "the features of h");
  countable(tasks, head.out(), head.in(), features);
  countable_rows(x, head.out());
  head.align();
  const HeadMatrix made = head.matrix(matrix_bias), offset = head.vector(vector_bias);
  const Plan how =
      choose_plan(plan.value, Makes::weights, dtype, groups.view(), head.params(), features);
  const Tensor y = x.like_rows(head.out());
  if (y.numel() == 0) return y;
  const Tensor rows = readable(x, task_ids, false);
  kernels().hyper_linear({dtype, how, groups.view(), head.out(), head.in(), features,
                          Arg("x", rows).rows(), features_of(h), made, offset, Arg("y", y).rows(),
                          transform_of(transform.value)});
  trim_scratch();
  return y;
}

// What the gradients of a layer are made of, checked and readable.
struct GradRows {
  const Arg grad, x;
  const Dtype dtype;
  const Grouping groups;
  const Index tasks, out, in;

  GradRows(const Tensor& grad_, const Tensor& x_, const OptionalTensor& task_ids, Index tasks)
      : grad("grad", grad_),
        x("x", x_),
        dtype(x.dtype()),
        groups(checked(grad, x, task_ids, tasks)),
        tasks(tasks),
        out(grad.size(-1)),
        in(x.size(-1)),
        grads_(readable(grad, task_ids, true)),
        rows_(readable(x, task_ids, true)) {}

  // A call that wants nothing yet.
  HyperLinearGrad call(const Text& plan, bool has_bias, Index features) const {
    countable(tasks, out, in, features);
    countable_rows(x, out);
    const Plan how = choose_plan(plan.value, Makes::gradients, dtype, groups.view(),
                                 out * (in + has_bias), features);
    HyperLinearGrad c{};
    c.dtype = dtype;
    c.plan = how;
    c.groups = groups.view();
    c.out = out;
    c.in = in;
    c.features = features;
    c.has_bias = has_bias;
    c.grad = Arg("grad", grads_).rows();
    c.x = Arg("x", rows_).rows();
    return c;
  }

 private:
  static Grouping checked(const Arg& grad, const Arg& x, const OptionalTensor& task_ids,
                          Index tasks) {
    if (tasks < 0) fail("tasks must not be negative, got ", tasks);
    grad.same_dtype(x);
    grad.same_rows(x);
    return group_rows(x, task_ids, tasks, generated_piece);
  }

  const Tensor grads_, rows_;
};

// The head as the gradients of its features take it.
void add_head(Head& head, const OptionalTensor& matrix_bias, HyperLinearGrad& call) {
  if (call.plan == Plan::contract && call.transform == Transform::none) head.join();
  call.matrix = head.matrix(matrix_bias);
  call.vector = head.vector({});
}

std::tuple<Tensor, Tensor, Tensor> hyper_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h_, const Tensor& matrix,
    const OptionalTensor& matrix_bias, const OptionalTensor& vector, const OptionalTensor& task_ids,
    const Text& transform, const std::vector<bool>& output_mask, const Text& plan) {
  const Arg h("h", h_);
  h.rank(2, "(B, features)");
  const GradRows rows(grad, x, task_ids, h.size(0));
  h.same_dtype(rows.x);
  Head head(matrix, vector, rows.x);
  Arg("matrix", matrix).size(0, rows.out, "the columns of grad");
  Arg("matrix", matrix).size(2, h.size(1), "the features of h");
  if (output_mask.size() != 3) fail("output_mask must have 3 entries, got ", output_mask.size());
  HyperLinearGrad call = rows.call(plan, vector.has_value(), h.size(1));
  call.transform = transform_of(transform.value);
  call.h = features_of(h);
  add_head(head, matrix_bias, call);
  const Index params = call.params(), features = call.features;
  const auto wanted = [&](Index i, std::initializer_list<Index> shape, void*& to) {
    const Tensor t = output_mask[i] ? rows.x.empty(shape) : rows.x.empty({0});
    to = output_mask[i] ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  const Tensor of_h = wanted(0, {rows.tasks, features}, call.grad_h);
  const Tensor of_weight = wanted(1, {params, features}, call.grad_weight);
  const Tensor of_bias = wanted(2, {params}, call.grad_bias);
  kernels().hyper_linear_grad(call);
  trim_scratch();
  return {of_h, of_weight, of_bias};
}

Tensor hyper_linear_grad_h(const Tensor& grad, const Tensor& x, const Tensor& matrix,
                           const OptionalTensor& vector, const OptionalTensor& task_ids,
                           Index tasks, const Text& plan) {
  const GradRows rows(grad, x, task_ids, tasks);
  Head head(matrix, vector, rows.x);
  Arg("matrix", matrix).size(0, rows.out, "the columns of grad");
  HyperLinearGrad call = rows.call(plan, vector.has_value(), head.features());
  add_head(head, {}, call);
  const Tensor y = rows.x.empty({tasks, head.features()});
  call.grad_h = y.mutable_data_ptr();
  kernels().hyper_linear_grad(call);
  trim_scratch();
  return y;
}

Tensor hyper_linear_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& h_,
                                const OptionalTensor& task_ids, bool vector, const Text& plan) {
  const Arg h("h", h_);
  h.rank(2, "(B, features)");
  const GradRows rows(grad, x, task_ids, h.size(0));
  h.same_dtype(rows.x);
  HyperLinearGrad call = rows.call(plan, vector, h.size(1));
  call.h = features_of(h);
  const Tensor y = rows.x.empty({call.params(), call.features});
  call.grad_weight = y.mutable_data_ptr();
  kernels().hyper_linear_grad(call);
  trim_scratch();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("task_linear", TORCH_BOX(&task_linear));
  m.impl("task_linear_grad_weight", TORCH_BOX(&task_linear_grad_weight));
  m.impl("hyper_linear", TORCH_BOX(&hyper_linear));
  m.impl("hyper_linear_backward", TORCH_BOX(&hyper_linear_backward));
  m.impl("hyper_linear_grad_h", TORCH_BOX(&hyper_linear_grad_h));
  m.impl("hyper_linear_grad_weight", TORCH_BOX(&hyper_linear_grad_weight));
}

}  // namespace hyperfast
