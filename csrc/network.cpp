#include "network.h"

#include <algorithm>
#include <locale>

#include "error.h"

namespace hyperfast {
namespace {

void parse(const std::string& entry, Layer& layer) {
  static constexpr struct {
    const char* name;
    Act act;
  } known[] = {
      {"identity", Act::identity}, {"relu", Act::relu},       {"leaky_relu", Act::leaky_relu},
      {"elu", Act::elu},           {"sigmoid", Act::sigmoid}, {"silu", Act::silu},
      {"sin", Act::sin},           {"tanh", Act::tanh}};
  const std::size_t colon = std::min(entry.find(':'), entry.size());
  for (const auto& k : known) {
    if (entry.compare(0, colon, k.name) != 0) continue;
    layer.act = k.act;
    if (colon + 1 >= entry.size()) return;
    std::istringstream number(entry.substr(colon + 1));
    number.imbue(std::locale::classic());  // whatever the process writes for a decimal point
    if (!(number >> layer.parameter) || number.peek() != EOF)
      fail("activations must be names or name:number, got \"", entry, "\"");
    return;
  }
  fail("activations must be identity, relu, leaky_relu, elu, sigmoid, silu, sin or tanh, got \"",
       entry, "\"");
}

}  // namespace

Network::Network(const std::vector<Index>& sizes, bool bias, const std::string& activations)
    : bias_(bias) {
  if (sizes.size() < 2) fail("sizes must hold at least two widths, got ", sizes.size());
  for (Index size : sizes)
    if (size < 1) fail("sizes must hold widths above 0, got ", size);
  widest_ = sizes[0];
  std::size_t begin = 0;
  for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
    if (begin > activations.size())
      fail("activations must name ", sizes.size() - 1, ", one a layer, got \"", activations, "\"");
    const std::size_t end = std::min(activations.find(',', begin), activations.size());
    Layer layer{sizes[l], sizes[l + 1], Act::identity, 1, params_, true};
    parse(activations.substr(begin, end - begin), layer);
    begin = end + 1;
    // The backward pass needs the pre-activations of every layer but a last one that nothing
    // follows.
    layer.kept = l + 2 < sizes.size() || layer.act != Act::identity;
    countable(double(layer.out) * (double(layer.in) + 1) + double(params_));
    params_ += layer.out * (layer.in + bias);
    outputs_ += layer.out;
    matrices_ += layer.out * layer.in;
    if (layer.kept) kept_ += layer.out;
    widest_ = std::max(widest_, layer.out);
    layers_.push_back(layer);
  }
  if (begin <= activations.size())
    fail("activations must name ", sizes.size() - 1, ", one a layer, got \"", activations, "\"");
}

}  // namespace hyperfast
