// Registration of the ops that run all steps of a HyperLSTM. The schemas are in
// hyperfast/ops/hyper_lstm.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "dispatch.h"
#include "torch/lstm_given.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

// Calls body with a number of the type of x.
template <class F>
void with_dtype(const LstmGiven& g, const F& body) {
  g.dtype() == Dtype::f64 ? body(double{}) : body(float{});
}

void run(const HyperLstm<float>& p) { kernels().hyper_lstm_f32(p); }
void run(const HyperLstm<double>& p) { kernels().hyper_lstm_f64(p); }
void run(const HyperLstmBackward<float>& p) { kernels().hyper_lstm_backward_f32(p); }
void run(const HyperLstmBackward<double>& p) { kernels().hyper_lstm_backward_f64(p); }

Tensors hyper_lstm(const Tensor& x, const OptionalTensor& keep, const Tensors& start,
                   const Tensors& weights, const std::vector<Index>& sizes, bool all) {
  const LstmGiven g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper, kept = all ? g.rows : 0;
  Tensors made = {g.empty({g.rows, H})};
  for (const Index width : {H, H, E, E}) made.push_back(g.empty({g.sequences(), width}));
  for (const Index width : {H, E, E, g.made_width()}) made.push_back(g.empty({kept, width}));
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    if (g.sequences() == 0) return;
    HyperLstm<C> p = g.view<C>();
    p.ends = state_of<C>(made, 1);
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
  const LstmGiven g(x, keep, start, weights, sizes);
  const Index H = g.hidden, E = g.hyper;
  g.count("kept", kept.size(), 5);
  g.count("grad_ends", grad_ends.size(), 4);
  g.count("wanted", wanted.size(), 1 + g.weights());
  Tensors states;
  const Index widths[] = {H, H, E, E, g.made_width()};
  for (int i = 0; i < 5; ++i)
    states.push_back(g.take(g.item("kept", i), kept[i], {g.rows, widths[i]}));
  OptionalTensor of_h;
  if (grad_h) of_h = g.take("grad_h", *grad_h, {g.rows, H});
  Tensors made = {wanted[0] ? g.empty({g.rows, g.ins}) : g.empty({0})};
  for (int i = 0; i < 4; ++i) {
    const Shape shape = {g.sequences(), widths[i]};
    made.push_back(g.empty(shape));
    torch::stable::copy_(made.back(), g.take(g.item("grad_ends", i), grad_ends[i], shape));
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
    b.forward.states = state_of<C>(states);
    b.forward.made = data<C>(states[4]);
    b.grad_h = of_h ? data<C>(*of_h) : nullptr;
    b.x = data<C>(made[0]);
    b.carried = state_of<C>(made, 1);
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
