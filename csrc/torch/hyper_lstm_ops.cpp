// Registration of the ops that run all steps of a HyperLSTM: checks, and typed pointers for the
// kernels. The schemas are in hyperfast/ops/hyper_lstm.py.
#include "hyper_lstm.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "dispatch.h"
#include "torch/pages.h"
#include "torch/shapes.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

using Tensors = std::vector<Tensor>;
using Shape = std::vector<Index>;

template <class C>
C* data(const Tensor& t) {
  return t.numel() ? static_cast<C*>(t.data_ptr()) : nullptr;
}

template <class C>
LstmState<C> state(const Tensors& t, int at = 0) {
  return {data<C>(t[at]), data<C>(t[at + 1]), data<C>(t[at + 2]), data<C>(t[at + 3])};
}

template <class C>
LstmWeights<C> weights_of(const Tensors& t, int at = 0) {
  const auto w = [&](int i) { return data<C>(t[at + i]); };
  LstmWeights<C> found{w(0), w(1), w(2), w(3), w(4), w(5), w(6), w(7), {}, {}};
  if (t.size() > std::size_t(at + 8)) {
    found.norm = {w(8), w(9), w(10), w(11)};
    found.hyper_norm = {w(12), w(13), w(14), w(15)};
  }
  return found;
}

// What both ways are given, checked and contiguous.
class Given {
 public:
  Given(const Tensor& x, const OptionalTensor& keep, const Tensors& start, const Tensors& weights,
        const std::vector<Index>& sizes)
      : x_(x), sizes_(sizes) {
    if (start.size() != 4) fail("start must hold 4 tensors, got ", start.size());
    if (weights.size() != 8 && weights.size() != 16)
      fail("weights must hold 8 tensors, or 16 with normalisations, got ", weights.size());
    const Arg rows_of_x("x", x_), h("h", start[0]), hyper_h("hyper_h", start[2]);
    rows_of_x.rank(2, "(rows, ins)");
    h.rank(2, "(sequences, hidden)");
    hyper_h.rank(2, "(sequences, hyper)");
    const Arg z("weights[4]", weights[4]);
    z.rank(2, "(12 embedding, hyper)");
    rows = rows_of_x.size(0), ins = rows_of_x.size(1);
    hidden = h.size(1), hyper = hyper_h.size(1), embedding = z.size(0) / 12;
    for (const Index size : {ins, hidden, hyper, embedding})
      if (size < 1) fail("ins, hidden, hyper and embedding must be at least 1, got ", size);
    const double units = double(hidden) + double(hyper),
                 wide = units + double(ins) + 12. * double(embedding);
    countable((double(rows) + 1) * 8 * wide);
    countable(64 * units * wide);
    check_steps();
    for (int i = 0; i < 4; ++i)
      start_.push_back(take("start", start[i], {sequences(), i < 2 ? hidden : hyper}));
    const std::vector<Shape> shapes = shapes_of_weights();
    for (std::size_t i = 0; i < weights.size(); ++i)
      weights_.push_back(take("weights", weights[i], shapes[i]));
    if (keep) keep_ = take("keep", *keep, {rows, hidden});
    x_ = torch::stable::contiguous(x);
  }

  Index rows, ins, hidden, hyper, embedding;

  Index sequences() const { return sizes_.empty() ? 0 : sizes_[0]; }
  Index made_width() const { return 8 * hidden + 4 * hyper; }
  std::size_t weights() const { return weights_.size(); }
  Dtype dtype() const { return Arg("x", x_).dtype(); }

  std::vector<Shape> shapes_of_weights() const {
    const Index H = hidden, E = hyper, n = embedding, gates = 4 * (H + E);
    return {{gates, ins}, {gates, H}, {4 * E, E}, {4 * E},   {12 * n, E}, {12 * n},
            {12, H, n},   {4, 1, H},  {4, 1, H},  {4, 1, H}, {H},         {H},
            {4, 1, E},    {4, 1, E},  {E},        {E}};
  }

  // t, of this shape and of the dtype of x, contiguous.
  Tensor take(const char* name, const Tensor& t, const Shape& shape) const {
    const Arg given(name, t);
    given.same_dtype(Arg("x", x_));
    given.rank(Index(shape.size()), "that hyperfast/ops/hyper_lstm.py says");
    for (std::size_t i = 0; i < shape.size(); ++i)
      given.size(Index(i), shape[i], "by x, start and z");
    return torch::stable::contiguous(t);
  }

  Tensor empty(const Shape& shape) const {
    Tensor t = torch::stable::new_empty(x_, shape);
    ask_for_huge_pages(t.data_ptr(), std::size_t(t.numel()) * std::size_t(t.element_size()));
    return t;
  }

  template <class C>
  HyperLstm<C> view() const {
    HyperLstm<C> p{};
    p.ins = ins, p.hidden = hidden, p.hyper = hyper, p.embedding = embedding;
    p.steps = Index(sizes_.size()), p.rows = rows, p.sizes = sizes_.data();
    p.x = data<C>(x_), p.keep = keep_ ? data<C>(*keep_) : nullptr;
    p.start = state<C>(start_);
    p.w = {};
    const LstmWeights<C> w = weights_of<C>(weights_);
    p.w = {w.ih, w.hh, w.hyper_hh, w.hyper_bias, w.z, w.z_bias, w.d, w.bias, {}, {}};
    const auto norm = [](const LstmNorm<C>& of) {
      return LstmNorm<const C>{of.scale, of.shift, of.c_scale, of.c_shift};
    };
    p.w.norm = norm(w.norm), p.w.hyper_norm = norm(w.hyper_norm);
    return p;
  }

 private:
  void check_steps() const {
    Index sum = 0, before = sequences();
    for (const Index size : sizes_) {
      if (size < 0 || size > before) fail("sizes must neither grow nor be negative, got ", size);
      if (size > rows - sum) fail("sizes must add up to the rows of x, ", rows);
      sum += size, before = size;
    }
    if (sum != rows) fail("sizes must add up to the rows of x, ", rows, ", got ", sum);
  }

  Tensor x_;
  const std::vector<Index> sizes_;
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

Tensors hyper_lstm(const Tensor& x, const OptionalTensor& keep, const Tensors& start,
                   const Tensors& weights, const std::vector<Index>& sizes, bool all) {
  const Given g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper, kept = all ? g.rows : 0;
  Tensors made = {g.empty({g.rows, H})};
  for (const Index width : {H, H, E, E}) made.push_back(g.empty({g.sequences(), width}));
  for (const Index width : {H, E, E, g.made_width()}) made.push_back(g.empty({kept, width}));
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    if (g.sequences() == 0) return;
    HyperLstm<C> p = g.view<C>();
    p.ends = state<C>(made, 1);
    p.states = {data<C>(made[0]), data<C>(made[5]), data<C>(made[6]), data<C>(made[7])};
    p.made = data<C>(made[8]);
    run(p);
    trim_scratch();
  });
  return made;
}

Tensors hyper_lstm_backward(const OptionalTensor& grad_h, const Tensors& grad_ends, const Tensor& x,
                            const OptionalTensor& keep, const Tensors& start,
                            const Tensors& weights, const std::vector<Index>& sizes,
                            const Tensors& kept, const std::vector<bool>& wanted) {
  const Given g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper;
  if (kept.size() != 5) fail("kept must hold 5 tensors, got ", kept.size());
  if (grad_ends.size() != 4) fail("grad_ends must hold 4 tensors, got ", grad_ends.size());
  if (wanted.size() != 1 + g.weights())
    fail("wanted must hold ", 1 + g.weights(), " entries, got ", wanted.size());
  Tensors states;
  const Index widths[] = {H, H, E, E, g.made_width()};
  for (int i = 0; i < 5; ++i) states.push_back(g.take("kept", kept[i], {g.rows, widths[i]}));
  OptionalTensor of_h;
  if (grad_h) of_h = g.take("grad_h", *grad_h, {g.rows, H});
  Tensors made = {wanted[0] ? g.empty({g.rows, g.ins}) : g.empty({0})};
  for (int i = 0; i < 4; ++i) {
    const Shape shape = {g.sequences(), widths[i]};
    made.push_back(g.empty(shape));
    torch::stable::copy_(made.back(), g.take("grad_ends", grad_ends[i], shape));
  }
  const std::vector<Shape> shapes = g.shapes_of_weights();
  for (std::size_t i = 0; i < g.weights(); ++i) {
    const bool matrix = i < 3 || i == 4 || i == 6;  // all else costs nothing
    made.push_back(!matrix || wanted[1 + i] ? g.empty(shapes[i]) : g.empty({0}));
  }
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    if (g.sequences() == 0) {
      for (Tensor& t : made) torch::stable::zero_(t);
      return;
    }
    HyperLstmBackward<C> b{};
    b.forward = g.view<C>();
    b.forward.states = state<C>(states);
    b.forward.made = data<C>(states[4]);
    b.grad_h = of_h ? data<C>(*of_h) : nullptr;
    b.x = data<C>(made[0]);
    b.carried = state<C>(made, 1);
    b.w = weights_of<C>(made, 5);
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
