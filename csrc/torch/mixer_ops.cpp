// Registration of QMIX's mixer. The schemas are in hyperfast/ops/mixer.py.
#include "mixer.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "dispatch.h"
#include "torch/shapes.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

using Tensors = std::vector<Tensor>;
using Shape = std::vector<Index>;

// What both ways are given, checked and contiguous.
class MixerGiven {
 public:
  Index rows, agents, state, embed, hyper;

  MixerGiven(const Tensor& q, const Tensor& s, const Tensors& weights) : q_(q) {
    const Arg values("q", q), states("s", s);
    values.is_float_or_double();
    values.rank(2, "(rows, agents)");
    states.rank(2, "(rows, state)");
    if (weights.size() != 14) fail("weights must hold 14 entries, got ", weights.size());
    const Arg first("weights[0]", weights[0]), b1("weights[12]", weights[12]);
    first.rank(2, "(hyper, state)");
    b1.rank(2, "(embed, state)");
    rows = q.size(0), agents = q.size(1), state = s.size(1);
    hyper = first.size(0), embed = b1.size(0);
    for (const Index size : {agents, state, embed, hyper})
      if (size < 1) fail("agents, state, embed and hyper must be at least 1, got ", size);
    const double wide = 64 + double(agents) * (double(embed) + 64) + double(state) + double(hyper);
    countable((double(rows) + 1) * wide);
    countable(wide * wide);
    s_ = take("s", s, {rows, state});
    for (std::size_t i = 0; i < weights.size(); ++i)
      weights_.push_back(take("weights[" + std::to_string(i) + "]", weights[i], shape(i)));
    q_ = as_contiguous(q);
  }

  Dtype dtype() const { return Arg("q", q_).dtype(); }
  Tensor empty(const Shape& shape) const { return new_tensor(q_, shape); }

  // Of weight or bias i of the layers, in their order.
  Shape shape(std::size_t i) const {
    const Index out[] = {hyper, agents * embed, hyper, embed, embed, 1, embed};
    const Index in[] = {state, hyper, state, hyper, state, embed, state};
    const std::size_t layer = i / 2;
    return i % 2 ? Shape{out[layer]} : Shape{out[layer], in[layer]};
  }

  // t, of this shape and of the dtype of q, contiguous.
  Tensor take(const std::string& name, const Tensor& t, const Shape& shape) const {
    return Arg(name.c_str(), t).shaped(shape, Arg("q", q_), "by q, s, weights[0] and weights[12]");
  }

  template <class C>
  Mixer<C> view() const {
    Mixer<C> p{};
    p.rows = rows, p.agents = agents, p.state = state, p.embed = embed, p.hyper = hyper;
    p.q = data<C>(q_), p.s = data<C>(s_), p.w = layers<const C>(weights_);
    return p;
  }
  template <class C>
  static MixerWeights<C> layers(const Tensors& t) {
    const auto l = [&](int i) { return Linear<C>{data<C>(t[2 * i]), data<C>(t[2 * i + 1])}; };
    return {l(0), l(1), l(2), l(3), l(4), l(5), l(6)};
  }
  template <class C>
  static C* data(const Tensor& t) {
    return static_cast<C*>(t.data_ptr());
  }

 private:
  Tensor q_, s_;
  Tensors weights_;
};

// Calls body with a number of the type of q.
template <class F>
void with_dtype(const MixerGiven& g, const F& body) {
  g.dtype() == Dtype::f64 ? body(double{}) : body(float{});
}

void run(const Mixer<float>& p) { kernels().mixer_f32(p); }
void run(const Mixer<double>& p) { kernels().mixer_f64(p); }
void run(const MixerBackward<float>& p) { kernels().mixer_backward_f32(p); }
void run(const MixerBackward<double>& p) { kernels().mixer_backward_f64(p); }

Tensors mixer(const Tensor& q, const Tensor& s, const Tensors& weights, bool keep) {
  const MixerGiven g(q, s, weights);
  Tensors made = {g.empty({g.rows, 1})};
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    Mixer<C> p = g.view<C>();
    made.push_back(g.empty({keep ? g.rows : 0, p.kept_width()}));
    if (g.rows == 0) return;
    p.y = g.data<C>(made[0]);
    p.kept = keep ? g.data<C>(made[1]) : nullptr;
    run(p);
    trim_scratch();
  });
  return made;
}

Tensors mixer_backward(const Tensor& grad, const Tensor& q, const Tensor& s, const Tensors& weights,
                       const Tensor& kept, const std::vector<bool>& output_mask) {
  const MixerGiven g(q, s, weights);
  if (output_mask.size() != 3) fail("output_mask must have 3 entries, got ", output_mask.size());
  const bool of_q = output_mask[0], of_s = output_mask[1], wanted = output_mask[2];
  Tensors made = {g.empty(of_q ? Shape{g.rows, g.agents} : Shape{0}),
                  g.empty(of_s ? Shape{g.rows, g.state} : Shape{0})};
  Tensors of_weights;
  for (std::size_t i = 0; wanted && i < weights.size(); ++i)
    of_weights.push_back(g.empty(g.shape(i)));
  with_dtype(g, [&](auto zero) {
    using C = decltype(zero);
    MixerBackward<C> b{g.view<C>(), nullptr, of_q ? g.data<C>(made[0]) : nullptr,
                       of_s ? g.data<C>(made[1]) : nullptr,
                       wanted ? g.layers<C>(of_weights) : MixerWeights<C>{}};
    const Tensor of_y = g.take("grad", grad, {g.rows, 1});
    const Tensor states = g.take("kept", kept, {g.rows, b.forward.kept_width()});
    b.grad = g.data<C>(of_y);
    b.forward.kept = g.data<C>(states);
    run(b);
    trim_scratch();
  });
  made.insert(made.end(), of_weights.begin(), of_weights.end());
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("mixer", TORCH_BOX(&mixer));
  m.impl("mixer_backward", TORCH_BOX(&mixer_backward));
}

}  // namespace hyperfast
