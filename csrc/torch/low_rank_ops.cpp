// Registration of layers of low rank. The schemas are in hyperfast/ops/low_rank.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dispatch.h"
#include "torch/shapes.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

// What both ways are given, checked.
struct Factors {
  const Arg x, a, b;
  const Index tasks, rank, in, out;

  Factors(const Tensor& x_, const Tensor& a_, const Tensor& b_)
      : x("x", x_),
        a(matrix("a", a_, "(B, rank, in)")),
        b(matrix("b", b_, "(B, out, rank)")),
        tasks(a.size(0)),
        rank(a.size(1)),
        in(a.size(2)),
        out(b.size(1)) {
    x.is_float_or_double();
    a.same_dtype(x);
    b.same_dtype(x);
    b.size(0, tasks, "the tasks of a");
    b.size(2, rank, "the rank of a");
    countable(tasks, out, rank);
    countable(tasks, rank, in);
    countable_rows(x, out);
    countable_rows(x, rank);
  }

  // A call with sizes and factors, once x has been grouped, which checks its rank.
  template <class Call>
  Call call(const Grouping& groups) const {
    x.size(-1, in, "in, the last size of a");
    Call c{};
    static_cast<LowRankCall&>(c) = {x.dtype(), groups.view(), out, in, rank, view(a), view(b)};
    return c;
  }

  // t, if its rows are those of x and as wide as the outputs, with columns side by side.
  Tensor rows_of_outputs(const char* name, const Tensor& t) const {
    const Arg rows(name, t);
    rows.same_dtype(x);
    rows.same_rows(x);
    rows.size(-1, out, "the outputs of b");
    return out <= 1 || rows.stride(-1) == 1 ? t : as_contiguous(t);
  }

 private:
  static TaskMatrix view(const Arg& w) { return {w.data(), w.stride(0), w.stride(1), w.stride(2)}; }

  static Arg matrix(const char* name, const Tensor& t, const char* shape) {
    const Arg m(name, t);
    m.rank(3, shape);
    return m;
  }
};

// y = init + B A x + bias; y may be init.
void run(const Factors& f, const Grouping& groups, const OptionalTensor& bias_,
         const OptionalTensor& init, const OptionalTensor& task_ids, const Tensor& y) {
  LowRank call = f.call<LowRank>(groups);
  if (bias_) {
    const Arg bias("bias", *bias_);
    bias.rank(2, "(B, out)");
    bias.size(0, f.tasks, "the tasks of a");
    bias.size(1, f.out, "the outputs of b");
    bias.same_dtype(f.x);
    call.bias = {bias.data(), bias.stride(0), bias.stride(1)};
  }
  if (init) call.init = Arg("init", *init).rows();
  const Tensor rows = readable(f.x, task_ids, false);
  call.x = Arg("x", rows).rows();
  call.y = Arg("y", y).rows();
  kernels().low_rank(call);
  trim_scratch();
}

Tensor low_rank(const Tensor& x_, const Tensor& a_, const Tensor& b_, const OptionalTensor& bias,
                const OptionalTensor& init_, const OptionalTensor& task_ids) {
  const Factors f(x_, a_, b_);
  const Grouping groups = group_rows(f.x, task_ids, f.tasks, low_rank_piece);
  const OptionalTensor init =
      init_ ? OptionalTensor(f.rows_of_outputs("init", *init_)) : OptionalTensor();
  const Tensor y = f.x.like_rows(f.out);
  run(f, groups, bias, init, task_ids, y);
  return y;
}

void add_low_rank(Tensor y, const Tensor& x_, const Tensor& a_, const Tensor& b_,
                  const OptionalTensor& bias, const OptionalTensor& task_ids) {
  const Factors f(x_, a_, b_);
  const Grouping groups = group_rows(f.x, task_ids, f.tasks, low_rank_piece);
  f.rows_of_outputs("y", y);
  if (!y.is_contiguous()) fail("y must be contiguous");
  run(f, groups, bias, y, task_ids, y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_backward(const Tensor& grad_, const Tensor& x_,
                                                             const Tensor& a_, const Tensor& b_,
                                                             const OptionalTensor& task_ids,
                                                             const std::vector<bool>& output_mask) {
  const Factors f(x_, a_, b_);
  if (output_mask.size() != 4) fail("output_mask must have 4 entries, got ", output_mask.size());
  const bool of_tasks = output_mask[1] || output_mask[2] || output_mask[3];
  const Grouping groups = group_rows(f.x, task_ids, f.tasks, low_rank_piece, of_tasks);
  LowRankGrad call = f.call<LowRankGrad>(groups);
  const Tensor grad = f.rows_of_outputs("grad", grad_), rows = readable(f.x, task_ids, true);
  call.grad = Arg("grad", grad).rows();
  call.x = Arg("x", rows).rows();
  const auto wanted = [&](int i, std::initializer_list<Index> shape, void*& to) {
    const Tensor t = output_mask[i] ? f.x.empty(shape) : f.x.empty({0});
    to = output_mask[i] ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  const Tensor of_x = output_mask[0] ? f.x.like_rows(f.in) : f.x.empty({0});
  if (output_mask[0]) call.grad_x = Arg("grad_x", of_x).rows();
  const Tensor of_a = wanted(1, {f.tasks, f.rank, f.in}, call.grad_a);
  const Tensor of_b = wanted(2, {f.tasks, f.out, f.rank}, call.grad_b);
  const Tensor of_bias = wanted(3, {f.tasks, f.out}, call.grad_bias);
  kernels().low_rank_grad(call);
  trim_scratch();
  return {of_x, of_a, of_b, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank));
  m.impl("add_low_rank_", TORCH_BOX(&add_low_rank));
  m.impl("low_rank_backward", TORCH_BOX(&low_rank_backward));
}

}  // namespace hyperfast
