// Registration of the ops that run generated networks with the trunk before them. A trunk of linear
// layers and activations is a network of one task, whose rows are latents: it runs as such. The
// schemas are in hyperfast/ops/trunk.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

#include "dispatch.h"
#include "network.h"
#include "torch/network_ops.h"
#include "torch/threads.h"

namespace hyperfast {
namespace {

using Tensors = std::vector<Tensor>;

class Trunk {
 public:
  Trunk(const Tensor& z, const Tensors& parameters, const Text& text)
      : z_("z", z), network_(text.value), net_(network_.view()) {
    z_.dtype();
    z_.rank(2, "(B, latents)");
    z_.size(1, network_.in(), "the inputs of the trunk");
    countable(z_.size(0), network_.params(), 1);
    countable_rows(z_, network_.outputs());
    std::size_t at = 0;
    for (Index n = 0; n < net_.count; ++n) {
      const Layer& l = net_.layers[n];
      take(parameters, at++, {l.out, l.in});
      if (l.own_bias()) take(parameters, at++, {l.out});
    }
    if (at != parameters.size()) fail("trunk must hold ", at, " tensors, got ", parameters.size());
  }

  // The features of all latents.
  Tensor forward() const {
    Tensor h = z_.empty({z_.size(0), network_.out()});
    if (z_.size(0) == 0) return h;
    const Grouping rows = pieces();
    kernels().task_mlp({z_.dtype(),
                        rows.view(),
                        net_,
                        latents(),
                        flat(),
                        network_.params(),
                        nullptr,
                        0,
                        {h.mutable_data_ptr(), 0, network_.out(), 1}});
    return h;
  }

  // What forward made, contiguous.
  Tensor features(const Tensor& h) const {
    return Arg("h", h).shaped({z_.size(0), network_.out()}, z_, "what the trunk makes of z");
  }

  // Of the gradient of the features h, those of the latents and of the parameters; empty where they
  // are not wanted.
  Tensors backward(const Tensor& grad, const Tensor& h, bool of_z, bool of_parameters) const {
    // What a ReLU has made has the slope of what it was made from (rounded, as PyTorch does before
    // it), and becomes itself: the one layer before it is not computed again.
    const bool known = net_.count == 1 && net_.layers[0].act == Act::relu;
    Tensors made = {of_z ? z_.empty({z_.size(0), z_.size(1)}) : z_.empty({0})};
    const Grouping rows = pieces();
    char* const gradient = of_parameters ? bytes(Slot::trunk_gradient) : nullptr;
    if (of_z || of_parameters)
      kernels().task_mlp_backward({z_.dtype(),
                                   rows.view(),
                                   net_,
                                   latents(),
                                   flat(),
                                   network_.params(),
                                   known ? h.data_ptr() : nullptr,
                                   {grad.data_ptr(), 0, network_.out(), 1},
                                   of_z ? made[0].mutable_data_ptr() : nullptr,
                                   gradient});
    const char* from = gradient;
    for (const Tensor& p : parameters_) {
      const auto sizes = p.sizes();
      made.push_back(of_parameters ? new_tensor(p, sizes) : z_.empty({0}));
      if (of_parameters) from = copy(made.back().mutable_data_ptr(), from, size_of(p));
    }
    trim_scratch();
    return made;
  }

 private:
  // One parameter; contiguous, as it will be copied.
  void take(const Tensors& parameters, std::size_t at, const std::vector<Index>& shape) {
    if (at >= parameters.size()) fail("trunk must hold more than ", parameters.size(), " tensors");
    const std::string name = "trunk[" + std::to_string(at) + "]";
    parameters_.push_back(
        Arg(name.c_str(), parameters[at]).shaped(shape, z_, "by the text of the trunk"));
  }

  // Threads share latents by so many: fewer than rows of a large task, as there are fewer.
  Grouping pieces() const {
    return Grouping::batched(1, z_.size(0), gradient_piece(z_.size(0), network_.params(), 128));
  }
  Rows latents() const { return {z_.data(), 0, z_.stride(0), z_.stride(1)}; }

  std::size_t size_of(const Tensor& t) const {
    return std::size_t(t.numel()) * std::size_t(z_.element_size());
  }
  static const char* copy(void* to, const char* from, std::size_t size) {
    std::memcpy(to, from, size);
    return from + size;
  }
  char* bytes(Slot slot) const {
    return static_cast<char*>(
        scratch(slot, std::size_t(network_.params()) * std::size_t(z_.element_size())));
  }

  // The parameters one behind another, as a network's lie.
  char* flat() const {
    char *const all = bytes(Slot::trunk), *to = all;
    for (const Tensor& p : parameters_) {
      std::memcpy(to, p.data_ptr(), size_of(p));
      to += size_of(p);
    }
    return all;
  }

  const Arg z_;
  const Network network_;
  const Net net_;
  Tensors parameters_;
};

std::tuple<Tensor, Tensor, Tensor> trunk_mlp(const Tensor& x, const Tensor& z, const Tensors& trunk,
                                             const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& task_ids, const Text& layers,
                                             const Text& network, bool keep) {
  const Tensor h = Trunk(z, trunk, layers).forward();
  const auto [y, preactivations] = hyper_mlp(x, h, weight, bias, task_ids, network, keep);
  return {y, h, preactivations};
}

Tensors trunk_mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& z,
                           const Tensors& trunk, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& task_ids, const Tensor& h,
                           const Tensor& preactivations, const Text& layers, const Text& network,
                           const std::vector<bool>& output_mask) {
  if (output_mask.size() != 5) fail("output_mask must have 5 entries, got ", output_mask.size());
  const bool of_x = output_mask[0], of_z = output_mask[1], of_trunk = output_mask[2];
  const Trunk before(z, trunk, layers);
  const Tensor features = before.features(h);
  const auto [grad_x, grad_h, grad_weight, grad_bias] =
      hyper_mlp_backward(grad, x, features, weight, bias, task_ids, preactivations, network,
                         {of_x, of_z || of_trunk, output_mask[3], output_mask[4]});
  Tensors made = before.backward(grad_h, features, of_z, of_trunk);
  made.insert(made.begin() + 1, {grad_weight, grad_bias});
  made.insert(made.begin(), grad_x);
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hyperfast, CPU, m) {
  m.impl("trunk_mlp", TORCH_BOX(&trunk_mlp));
  m.impl("trunk_mlp_backward", TORCH_BOX(&trunk_mlp_backward));
}

}  // namespace hyperfast
