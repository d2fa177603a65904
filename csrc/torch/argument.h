// An argument of an op: its name for messages, its checks, its raw face.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "error.h"
#include "torch/new_memory.h"

namespace hyperfast {

// As Python prints a tuple.
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (std::size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// A tensor of these sizes on the CPU, of the dtype of another, in huge pages if it is large.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  // Without the dispatcher, by which torch::stable::new_empty goes.
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<std::int64_t>(sizes[i], 1);
  std::int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &made))
    throw std::runtime_error("no memory for a tensor of shape " + shape_text(sizes));
  const torch::stable::Tensor t(made);
  prepare(t.data_ptr(), std::size_t(t.numel()) * std::size_t(t.element_size()));
  return t;
}

// The tensor, or a copy that is contiguous; without the dispatcher, which takes 1 us, where it is.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

class Arg {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  Arg(const char* name, const Tensor& tensor)
      : name_(name), tensor_(tensor), sizes_(tensor.sizes()), strides_(tensor.strides()) {
    if (!tensor.is_cpu()) fail(name, " must be on the CPU");
  }

  const Tensor& tensor() const { return tensor_; }
  Index dim() const { return Index(sizes_.size()); }
  Index size(Index i) const { return sizes_[i < 0 ? i + dim() : i]; }
  Index stride(Index i) const { return strides_[i < 0 ? i + dim() : i]; }

  void rank(Index expected, const char* shape) const {
    if (dim() != expected) fail(name_, " must have shape ", shape, ", got ", shape_text());
  }

  void size(Index i, Index expected, const char* what) const {
    if (size(i) != expected)
      fail(name_, ".size(", i, ") must be ", expected, " (", what, "), got ", shape_text());
  }

  void is(ScalarType expected) const {
    if (tensor_.scalar_type() != expected)
      fail(name_, " must have dtype ", type_name(expected), ", got ", type_text());
  }

  void is_float_or_double() const {
    const ScalarType type = tensor_.scalar_type();
    if (type != ScalarType::Double && type != ScalarType::Float)
      fail(name_, " must have dtype float64 or float32, got ", type_text());
  }

  Dtype dtype() const {
    switch (tensor_.scalar_type()) {
      case ScalarType::Double: return Dtype::f64;
      case ScalarType::Float: return Dtype::f32;
      case ScalarType::BFloat16: return Dtype::bf16;
      case ScalarType::Half: return Dtype::f16;
      default:
        fail(name_, " must have dtype float64, float32, bfloat16 or float16, got ", type_text());
    }
  }

  void same_dtype(const Arg& other) const {
    if (tensor_.scalar_type() != other.tensor_.scalar_type())
      fail(name_, " must have the dtype of ", other.name_, ", ", other.type_text(), ", got ",
           type_text());
  }

  // The tensor, contiguous, if it has the dtype of another and this shape, which `what` says.
  torch::stable::Tensor shaped(const std::vector<Index>& shape, const Arg& other,
                               const char* what) const {
    same_dtype(other);
    if (dim() != Index(shape.size()))
      rank(Index(shape.size()), hyperfast::shape_text(shape).c_str());
    for (std::size_t i = 0; i < shape.size(); ++i) size(Index(i), shape[i], what);
    return as_contiguous(tensor_);
  }

  // All sizes but the last agree.
  void same_rows(const Arg& other) const {
    bool same = dim() == other.dim() && dim() > 0;
    for (Index i = 0; same && i + 1 < dim(); ++i) same = size(i) == other.size(i);
    if (!same)
      fail(name_, " must have as many rows as ", other.name_, ", ", other.shape_text(), ", got ",
           shape_text());
  }

  template <class T = void>
  T* data() const {
    return static_cast<T*>(tensor_.data_ptr());
  }

  Index element_size() const { return Index(tensor_.element_size()); }

  // Of rank 3 or, ragged, 2.
  Rows rows() const { return {data(), dim() == 3 ? stride(0) : 0, stride(-2), stride(-1)}; }

  Tensor empty(std::initializer_list<Index> sizes) const {
    return new_tensor(tensor_, {sizes.begin(), sizes.size()});
  }

  // A contiguous new tensor of the same rows.
  Tensor like_rows(Index columns) const {
    return dim() == 3 ? empty({size(0), size(1), columns}) : empty({size(0), columns});
  }

 private:
  std::string shape_text() const { return hyperfast::shape_text(sizes_); }
  std::string type_text() const { return type_name(tensor_.scalar_type()); }

  // The names that Python uses, where they differ from the C++ ones.
  static std::string type_name(ScalarType type) {
    switch (type) {
      case ScalarType::Double: return "float64";
      case ScalarType::Float: return "float32";
      case ScalarType::Half: return "float16";
      case ScalarType::BFloat16: return "bfloat16";
      case ScalarType::Long: return "int64";
      case ScalarType::Int: return "int32";
      default: return torch::headeronly::toString(type);
    }
  }

  const char* name_;
  const Tensor& tensor_;
  torch::headeronly::IntHeaderOnlyArrayRef sizes_, strides_;
};

}  // namespace hyperfast
