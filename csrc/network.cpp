#include "network.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <optional>
#include <string_view>

#include "error.h"

namespace hyperfast {
namespace {

constexpr struct {
  std::string_view name;
  Act act;
  double parameter;
} activations[] = {
#define HF_ROW(name, parameter) {#name, Act::name, parameter},
    HF_ACTIVATIONS(HF_ROW)
#undef HF_ROW
};

constexpr struct {
  std::string_view name;
  Transform transform;
} transforms[] = {{"abs(W)", Transform::abs},
                  {"softplus(W)", Transform::softplus},
                  {"exp(W)", Transform::exp},
                  {"square(W)", Transform::square}};

template <class Table>
std::string names(const Table& table) {
  std::string all;
  for (const auto& row : table) all += (all.empty() ? "" : ", ") + std::string(row.name);
  return all;
}

// The text up to `separator`, which is taken off it with it; all of it where there is none.
std::string_view take(std::string_view& text, std::string_view separator) {
  const std::size_t end = text.find(separator);
  const std::string_view first = text.substr(0, end);
  text = end == text.npos ? std::string_view() : text.substr(end + separator.size());
  return first;
}

bool only(std::string_view text, std::string_view characters) {
  return !text.empty() && text.find_first_not_of(characters) == text.npos;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Index width(std::string_view token) const {
    if (!only(token, "0123456789") || token[0] == '0' || token.size() > 18)
      refuse("a width above 0", token);
    Index n = 0;
    for (char digit : token) n = 10 * n + (digit - '0');
    return n;
  }

  // What follows a layer's width, in this order.
  void options(std::string_view rest, Layer& layer) const {
    while (!rest.empty()) {
      const std::string_view token = take(rest, " ");
      if (!bias(token, layer) && !activation(token, layer) && !transform(token, layer))
        refuse("b or s, then one of " + names(activations) + ", then one of " + names(transforms),
               token);
    }
  }

  [[noreturn]] void refuse(const std::string& wanted, std::string_view got) const {
    fail("network must be like \"64 > 64 b relu, 10\", with ", wanted, " in place of \"", got,
         "\", got \"", text_, "\"");
  }

 private:
  static bool bias(std::string_view token, Layer& layer) {
    if (token.size() != 1 || (token[0] != 'b' && token[0] != 's')) return false;
    if (layer.bias != Bias::none || layer.act != Act::identity ||
        layer.transform != Transform::none)
      return false;
    layer.bias = token[0] == 'b' ? Bias::own : Bias::shared;
    return true;
  }

  bool activation(std::string_view token, Layer& layer) const {
    if (layer.act != Act::identity || layer.transform != Transform::none) return false;
    const std::size_t colon = std::min(token.find(':'), token.size());
    for (const auto& known : activations) {
      if (known.name != token.substr(0, colon)) continue;
      layer.act = known.act;
      layer.parameter = std::isnan(known.parameter) ? 1 : known.parameter;
      if (colon == token.size()) return true;
      if (std::isnan(known.parameter)) refuse(std::string(known.name) + " without a number", token);
      layer.parameter = number(token.substr(colon + 1), token);
      return true;
    }
    return false;
  }

  static bool transform(std::string_view token, Layer& layer) {
    if (layer.transform != Transform::none) return false;
    for (const auto& known : transforms) {
      if (known.name != token) continue;
      layer.transform = known.transform;
      return true;
    }
    return false;
  }

  // As Python writes a float: 30.0, 1e-05.
  double number(std::string_view text, std::string_view token) const {
    double value;
    std::istringstream stream{std::string(text)};
    stream.imbue(std::locale::classic());  // whatever the process writes for a decimal point
    if (!only(text, "0123456789.e+-") || text[0] == '+' || text.find_first_of(".e") == text.npos ||
        !(stream >> value) || stream.peek() != EOF)
      refuse("a number as in sin:30.0", token);
    return value;
  }

  const std::string& text_;
};

}  // namespace

Network::Network(const std::string& text) : text_(text) {
  const Parser parser(text_);
  if (text.empty() || text.back() == ' ' || text.find(" > ") == text.npos)
    parser.refuse("a width, \" > \" and layers", text);
  std::string_view rest = text_;
  Index in = widest_ = parser.width(take(rest, " > "));
  while (!rest.empty()) {
    const std::size_t before = rest.size();
    std::string_view entry = take(rest, ", ");
    if (rest.empty() && entry.size() != before) parser.refuse("a layer after each comma", ",");
    const bool more = entry.find(' ') != entry.npos;
    Layer layer{in, parser.width(take(entry, " ")), Act::identity, 1};
    if (more && (entry.empty() || entry.back() == ' ')) parser.refuse("single spaces", " ");
    parser.options(entry, layer);
    layer.begin = params_;
    // The backward pass needs the pre-activations of every layer but a last one that nothing
    // follows.
    layer.kept = !rest.empty() || layer.act != Act::identity;
    countable(double(layer.out) * (double(in) + 1) + double(params_));
    params_ += layer.params();
    outputs_ += layer.out;
    matrices_ += layer.out * in;
    if (layer.kept) kept_ += layer.out;
    widest_ = std::max(widest_, layer.out);
    layers_.push_back(layer);
    in = layer.out;
  }
}

std::string Network::refusal() const {
  for (const Layer& layer : layers_)
    if (layer.bias == Bias::shared) return "no shared biases (s)";
  return "";
}

Net Network::view() const {
  const std::string reason = refusal();
  if (!reason.empty()) fail("network must have ", reason, ", got \"", text_, "\"");
  const bool transforms = std::any_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
    return layer.transform != Transform::none;
  });
  return {layers_.data(), Index(layers_.size()), params_, kept_, widest_, transforms};
}

}  // namespace hyperfast
