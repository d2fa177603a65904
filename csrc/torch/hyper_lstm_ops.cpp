// Registration of the ops that run all steps of a HyperLSTM: checks, and typed pointers for the
// kernels. The schemas are in hyperfast/ops/hyper_lstm.py.
#include "hyper_lstm.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "dispatch.h"
#include "torch/shapes.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

using Tensors = std::vector<Tensor>;

// What both ways are given, checked and contiguous.
class Given {
 public:
  Index hidden = 0, hyper = 0, embedding = 0, rows = 0;

  Given(const Tensor& x, const OptionalTensor& keep, const Tensors& start, const Tensors& weights,
        const std::vector<Index>& sizes)
      : sizes_(sizes), x_(torch::stable::contiguous(x)) {
    if (start.size() != 4) fail("start must hold 4 tensors, got ", start.size());
    if (weights.size() != 6 && weights.size() != 14)
      fail("weights must hold 6 tensors, or 14 with normalisations, got ", weights.size());
    const Arg like("x", x), h("start[0]", start[0]), c("start[2]", start[2]), d("weights[4]", weights[4]);
    like.rank(2, "(rows, 4 hidden + 4 hyper)");
    h.rank(2, "(sequences, hidden)");
    c.rank(2, "(sequences, hyper)");
    d.rank(3, "(12, hidden, embedding)");
    rows = like.size(0), hidden = h.size(1), hyper = c.size(1), embedding = d.size(2);
    const Index H = hidden, E = hyper, n = embedding;
    for (const Index size : {H, E, n})
      if (size < 1) fail("hidden, hyper and embedding sizes must be at least 1, got ", size);
    countable((double(rows) + 1) * (8 * (double(H) + double(E)) + 12 * double(n)));
    countable(16 * (double(H) + double(E)) * (double(H) + double(E) + double(n)));
    check_steps();
    take("x", x_, {rows, 4 * (H + E)}, x);
    for (int i = 0; i < 4; ++i) start_.push_back(take("start", start[i], {sequences(), i < 2 ? H : E}, x));
    const std::vector<std::vector<Index>> shapes = {
        {4 * (H + E), H}, {4 * E, E}, {12 * n, E}, {12 * n}, {12, H, n}, {4, 1, H},
        {4, 1, H},        {4, 1, H},  {H},         {H},      {4, 1, E},  {4, 1, E}, {E}, {E}};
    for (std::size_t i = 0; i < weights.size(); ++i)
      weights_.push_back(take("weights", weights[i], shapes[i], x));
    if (keep) keep_ = take("keep", *keep, {rows, H}, x);
  }

  Index sequences() const { return sizes_.empty() ? 0 : sizes_[0]; }
  bool has_norm() const { return weights_.size() > 6; }
  Dtype dtype() const { return Arg("x", x_).dtype(); }

  // t, of this shape and of the dtype of x, contiguous.
  static Tensor take(const char* name, const Tensor& t, const std::vector<Index>& shape,
                     const Tensor& x) {
    const Arg given(name, t);
    given.same_dtype(Arg("x", x));
    given.rank(Index(shape.size()), "of the kind that hyperfast/ops/hyper_lstm.py says");
    for (std::size_t i = 0; i < shape.size(); ++i) given.size(Index(i), shape[i], "by x and start");
    return torch::stable::contiguous(t);
  }

  template <class C>
  HyperLstm<C> view() const {
    HyperLstm<C> p{};
    p.hidden = hidden, p.hyper = hyper, p.embedding = embedding, p.rows = rows;
    p.steps = Index(sizes_.size()), p.sizes = sizes_.data();
    p.x = data<C>(x_), p.keep = keep_ ? data<C>(*keep_) : nullptr;
    p.start = state<C>(start_);
    const auto w = [&](int i) { return data<C>(weights_[i]); };
    p.w = {w(0), w(1), w(2), w(3), w(4), w(5), {}, {}};
    if (has_norm()) p.w.norm = {w(6), w(7), w(8), w(9)}, p.w.hyper_norm = {w(10), w(11), w(12), w(13)};
    return p;
  }

  template <class C>
  static C* data(const Tensor& t) {
    return static_cast<C*>(t.data_ptr());
  }
  template <class C>
  static LstmState<C> state(const Tensors& t, int from = 0) {
    return {data<C>(t[from]), data<C>(t[from + 1]), data<C>(t[from + 2]), data<C>(t[from + 3])};
  }
  Tensor empty(std::initializer_list<Index> shape) const { return Arg("x", x_).empty(shape); }

 private:
  void check_steps() const {
    Index sum = 0, before = sequences();
    for (const Index size : sizes_) {
      if (size < 0 || size > before) fail("sizes must not grow, nor be negative, got ", size);
      if (size > rows - sum) fail("sizes must add up to the ", rows, " rows of x");
      sum += size, before = size;
    }
    if (sum != rows) fail("sizes must add up to the ", rows, " rows of x, got ", sum);
  }

  const std::vector<Index> sizes_;
  Tensor x_;
  OptionalTensor keep_;
  Tensors start_, weights_;
};

// Calls body with a number of the type of x.
template <class F>
void with_dtype(const Given& g, const F& body) {
  switch (g.dtype()) {
    case Dtype::f64: return body(double{});
    case Dtype::f32: return body(float{});
    default: fail("x must have dtype float64 or float32");
  }
}

void run(const HyperLstm<float>& p) { kernels().hyper_lstm_f32(p); }
void run(const HyperLstm<double>& p) { kernels().hyper_lstm_f64(p); }
void run(const HyperLstmBackward<float>& p) { kernels().hyper_lstm_backward_f32(p); }
void run(const HyperLstmBackward<double>& p) { kernels().hyper_lstm_backward_f64(p); }

// h of all rows and the states of all ends; with `all` also c, hyper_h, hyper_c of all rows and
// what the way back needs beside them, else as many empty tensors.
Tensors hyper_lstm(const Tensor& x, const OptionalTensor& keep, const Tensors& start,
                   const Tensors& weights, const std::vector<Index>& sizes, bool all) {
  const Given g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper, kept = all ? g.rows : 0;
  Tensors made = {g.empty({g.rows, H})};
  for (const Index width : {H, H, E, E}) made.push_back(g.empty({g.sequences(), width}));
  for (const Index width : {H, E, E, 4 * (H + E)}) made.push_back(g.empty({kept, width}));
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    if (g.sequences() == 0) return;
    HyperLstm<C> p = g.view<C>();
    p.ends = g.state<C>(made, 1);
    p.states = {g.data<C>(made[0]), nullptr, nullptr, nullptr};
    if (all) {
      p.states = {p.states.h, g.data<C>(made[5]), g.data<C>(made[6]), g.data<C>(made[7])};
      p.made = g.data<C>(made[8]);
    }
    run(p);
    trim_scratch();
  });
  return made;
}

// Gradients: of x, of h times its weights, of the embeddings, all of every row; of start; of
// weights[4], if `want_d`, weights[5] and the normalisations.
Tensors hyper_lstm_backward(const OptionalTensor& grad_h, const Tensors& grad_ends, const Tensor& x,
                            const OptionalTensor& keep, const Tensors& start,
                            const Tensors& weights, const std::vector<Index>& sizes,
                            const Tensors& kept, bool want_d) {
  const Given g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper, n = g.embedding, wide = 4 * (H + E);
  if (kept.size() != 5) fail("kept must hold 5 tensors, got ", kept.size());
  if (grad_ends.size() != 4) fail("grad_ends must hold 4 tensors, got ", grad_ends.size());
  Tensors states;
  const Index widths[] = {H, H, E, E, wide};
  for (int i = 0; i < 5; ++i)
    states.push_back(g.take("kept", kept[i], {g.rows, widths[i]}, x));
  OptionalTensor of_h;
  if (grad_h) of_h = g.take("grad_h", *grad_h, {g.rows, H}, x);
  Tensors made;
  for (const Index width : {wide, wide, 12 * n}) made.push_back(g.empty({g.rows, width}));
  for (int i = 0; i < 4; ++i) {
    made.push_back(g.empty({g.sequences(), widths[i]}));
    torch::stable::copy_(made.back(), g.take("grad_ends", grad_ends[i], {g.sequences(), widths[i]}, x));
  }
  made.push_back(want_d ? g.empty({12, H, n}) : g.empty({0}));
  made.push_back(g.empty({4, 1, H}));
  for (const Index units : {H, E}) {
    if (!g.has_norm()) break;
    for (int i = 0; i < 2; ++i) made.push_back(g.empty({4, 1, units}));
    for (int i = 0; i < 2; ++i) made.push_back(g.empty({units}));
  }
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    if (g.sequences() == 0) {
      for (std::size_t i = 7; i < made.size(); ++i) torch::stable::zero_(made[i]);
      return;
    }
    HyperLstmBackward<C> b{};
    const auto out = [&](int i) { return g.data<C>(made[i]); };
    b.forward = g.view<C>();
    b.forward.states = g.state<C>(states);
    b.forward.made = g.data<C>(states[4]);
    b.grad_h = of_h ? g.data<C>(*of_h) : nullptr;
    b.carried = g.state<C>(made, 3);
    b.dx = out(0), b.dp = out(1), b.dz = out(2), b.d = want_d ? out(7) : nullptr, b.bias = out(8);
    if (g.has_norm())
      b.norm = {out(9), out(10), out(11), out(12)}, b.hyper_norm = {out(13), out(14), out(15), out(16)};
    run(b);
    trim_scratch();
  });
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("hyper_lstm", TORCH_BOX(&hyper_lstm));
  m.impl("hyper_lstm_backward", TORCH_BOX(&hyper_lstm_backward));
}

}  // namespace hyperfast
