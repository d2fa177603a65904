// A network: its text parsed into layers, and where their numbers lie.
//
//   "64 > 64 b relu, 32 b sin:30.0, 10"
//
//   network := INT " > " layer (", " layer)*
//   layer   := OUT [" " BIAS] [" " ACTIVATION] [" " TRANSFORM]
//
// BIAS is "b" (one of each task) or "s" (one that all tasks share), ACTIVATION a name of
// isa/simd/activation.h, with ":" and a number where it takes one, TRANSFORM what becomes of a
// generated matrix, as "exp(W)". hyperfast/layout.py writes this text.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hyperfast {

class Network {
 public:
  // Throws std::invalid_argument where the text is anything but that.
  explicit Network(const std::string& text);

  // Why the kernels of whole networks do not run it, if so: shared biases.
  std::string refusal() const;

  // What these kernels see; throws std::invalid_argument where they refuse it.
  Net view() const;

  Index in() const { return layers_.front().in; }
  Index out() const { return layers_.back().out; }
  Index params() const { return params_; }      // of a task
  Index matrices() const { return matrices_; }  // without biases
  Index outputs() const { return outputs_; }    // of all layers
  Index biases() const { return params_ - matrices_; }
  Index kept() const { return kept_; }  // widths of the pre-activations that backward needs
  bool changes_output() const { return layers_.back().kept; }

 private:
  std::string text_;
  std::vector<Layer> layers_;
  Index params_ = 0, matrices_ = 0, outputs_ = 0, kept_ = 0, widest_ = 0;
};

}  // namespace hyperfast
