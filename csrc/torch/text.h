// A string argument of an op. Torch's own conversion to std::string (as of 2.13) never frees
// the copy it makes: 48 bytes a call, which pin the heap and keep it from being reused.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace hyperfast {

struct Text {
  std::string value;
};

}  // namespace hyperfast

template <>
struct torch::stable::detail::ToImpl<hyperfast::Text> {
  static hyperfast::Text call(StableIValue value, std::uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    std::size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    hyperfast::Text text{{data, length}};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
