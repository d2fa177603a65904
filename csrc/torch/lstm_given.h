// What the ops of a HyperLSTM are given: checks of it, and typed pointers for the kernels.
#pragma once

#include <string>
#include <vector>

#include "hyper_lstm.h"
#include "torch/shapes.h"

namespace hyperfast {

using Tensors = std::vector<Tensor>;
using Shape = std::vector<Index>;

template <class C>
C* data(const Tensor& t) {
  return t.numel() ? static_cast<C*>(t.data_ptr()) : nullptr;
}

template <class C>
LstmState<C> state_of(const Tensors& t, int at = 0) {
  return {data<C>(t[at]), data<C>(t[at + 1]), data<C>(t[at + 2]), data<C>(t[at + 3])};
}

template <class C>
LstmWeights<C> weights_of(const Tensors& t, int at = 0) {
  const auto w = [&](int i) { return data<C>(t[at + i]); };
  LstmWeights<C> found{w(0), w(1), w(2), w(3), w(4), w(5), w(6), w(7), {}, {}};
  if (t.size() == std::size_t(at + 8)) return found;
  found.norm = {w(8), w(9), w(10), w(11)};
  found.hyper_norm = {w(12), w(13), w(14), w(15)};
  return found;
}

// What both ways are given, checked and contiguous.
class LstmGiven {
 public:
  LstmGiven(const Tensor& x, const OptionalTensor& keep, const Tensors& start,
            const Tensors& weights, const std::vector<Index>& sizes)
      : x_(x), sizes_(sizes) {
    Arg("x", x).is_float_or_double();
    count("start", start.size(), 4);
    if (weights.size() != 16) count("weights without normalisations", weights.size(), 8);
    measure(Arg("x", x), Arg("start[0]", start[0]), Arg("start[2]", start[2]),
            Arg("weights[4]", weights[4]));
    check_steps();
    for (std::size_t i = 0; i < 4; ++i)
      start_.push_back(take(item("start", i), start[i], {sequences(), i < 2 ? hidden : hyper}));
    const std::vector<Shape> shapes = shapes_of_weights();
    for (std::size_t i = 0; i < weights.size(); ++i)
      weights_.push_back(take(item("weights", i), weights[i], shapes[i]));
    if (keep) keep_ = take("keep", *keep, {rows, hidden});
    x_ = as_contiguous(x);
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

  static void count(const char* name, std::size_t found, std::size_t expected) {
    if (found != expected) fail(name, " must hold ", expected, " entries, got ", found);
  }
  static std::string item(const char* list, std::size_t i) {
    return list + ("[" + std::to_string(i) + "]");
  }

  // t, of this shape and of the dtype of x, contiguous.
  Tensor take(const std::string& name, const Tensor& t, const Shape& shape) const {
    return Arg(name.c_str(), t).shaped(shape, Arg("x", x_), "by x, start and weights[4]");
  }

  Tensor empty(const Shape& shape) const { return new_tensor(x_, shape); }

  template <class C>
  HyperLstm<C> view() const {
    HyperLstm<C> p{};
    p.ins = ins, p.hidden = hidden, p.hyper = hyper, p.embedding = embedding;
    p.steps = Index(sizes_.size()), p.rows = rows, p.sizes = sizes_.data();
    p.x = data<C>(x_), p.keep = keep_ ? data<C>(*keep_) : nullptr;
    p.start = state_of<const C>(start_), p.w = weights_of<const C>(weights_);
    return p;
  }

 private:
  void measure(const Arg& x, const Arg& h, const Arg& hyper_h, const Arg& z) {
    x.rank(2, "(rows, ins)");
    h.rank(2, "(sequences, hidden)");
    hyper_h.rank(2, "(sequences, hyper)");
    z.rank(2, "(12 embedding, hyper)");
    rows = x.size(0), ins = x.size(1), hidden = h.size(1), hyper = hyper_h.size(1);
    embedding = z.size(0) / 12;
    for (const Index size : {ins, hidden, hyper, embedding})
      if (size < 1) fail("ins, hidden, hyper and embedding must be at least 1, got ", size);
    const double units = double(hidden) + double(hyper),
                 wide = units + double(ins) + 12. * double(embedding);
    countable((double(rows) + 1) * 8 * wide);
    countable(64 * units * wide);
  }

  void check_steps() const {
    Index sum = 0, before = sequences();
    for (const Index size : sizes_) {
      if (size < 0 || size > before) fail("sizes must neither grow nor be negative, got ", size);
      if (size > rows - sum) fail("sizes must add up to the rows of x, ", rows, ", got more");
      sum += size, before = size;
    }
    if (sum != rows) fail("sizes must add up to the rows of x, ", rows, ", got ", sum);
  }

  Tensor x_;
  const std::vector<Index> sizes_;
  OptionalTensor keep_;
  Tensors start_, weights_;
};

}  // namespace hyperfast
