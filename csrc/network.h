// A network: its text parsed into layers, and where their numbers lie.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hyperfast {

class Network {
 public:
  Network(const std::vector<Index>& sizes, bool bias, const std::string& activations);

  Net view() const {
    return {layers_.data(), Index(layers_.size()), bias_, params_, outputs_, kept_, widest_};
  }
  Index in() const { return layers_.front().in; }
  Index out() const { return layers_.back().out; }
  Index params() const { return params_; }      // of a network
  Index matrices() const { return matrices_; }  // without biases
  Index outputs() const { return outputs_; }    // of all layers
  Index kept() const { return kept_; }          // widths of the pre-activations that backward needs
  bool changes_output() const { return layers_.back().kept; }

 private:
  std::vector<Layer> layers_;
  bool bias_;
  Index params_ = 0, matrices_ = 0, outputs_ = 0, kept_ = 0, widest_ = 0;
};

}  // namespace hyperfast
